"""The package needs neither torch nor a host framework, and gives the same plan with and without numba."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from adaptra_plugin.schedule.planner import plan
from tests.schedule.helpers import even

PROGRAM = """
import importlib, json, pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None
import adaptra_plugin.schedule as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile
made = plan(Profile.from_json(json.loads(sys.argv[1])))
heavy = [name for name in ("torch", "deepspeed", "megatron", "wandb", "matplotlib") if sys.modules.get(name)]
print(json.dumps([made.makespan_ms, made.ranks, heavy]))
"""


@pytest.mark.parametrize("blocked", [["torch", "deepspeed", "megatron"], ["numba", "ortools"]])
def test_the_same_plan_without_the_optional_and_the_forbidden(blocked):
    profile = even(3, 5, (3, 4, 2), links=[(1, 2, 9.0)], cap=3)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(blocked=blocked), json.dumps(profile.to_json())],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    makespan, ranks, heavy = json.loads(run.stdout)
    here = plan(profile)
    assert (makespan, ranks, heavy) == (here.makespan_ms, here.ranks, [])
