"""One registry of schedules, from which everybody derives what is allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest

from adaptra_plugin.cli import main
from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.names import SCHEDULES, Entry, adaptive
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.schedule import B, F, Schedule
from tests.schedule.helpers import even


def one_at_a_time(ranks: int, microbatches: int) -> Schedule:
    """Every microbatch goes through the whole pipeline and back before the next one."""
    return Schedule.from_words([[F, B] * microbatches for _ in range(ranks)])


def test_a_schedule_is_a_function_and_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SCHEDULES, "one-at-a-time", Entry("no overlap", "tests.schedule.test_names:one_at_a_time"))
    made = plan(even(3, 4), schedule="one-at-a-time")
    assert made.makespan_ms == 4 * 3 * 3 and made.peak_activations == (1, 1, 1)
    (tmp_path / "profile.json").write_text(json.dumps(even(3, 4).to_json()))
    assert main(["plan", str(tmp_path / "profile.json"), "--schedule", "one-at-a-time"]) == 0
    assert json.loads(capsys.readouterr().out)["makespan_ms"] == made.makespan_ms
    with pytest.raises(PlanError, match="one-at-a-time takes 1 stages a rank"):
        plan(even(4, 4, virtual=2), schedule="one-at-a-time")
    with pytest.raises(PlanError, match=r"unknown schedule 'none': expected one of gpipe, .*, one-at-a-time"):
        plan(even(3, 4), schedule="none")


def test_every_builder_exists():
    assert all(callable(entry.load()) and entry.what for entry in SCHEDULES.values())
    assert adaptive() == ["slack-adaptive", "slack-adaptive-interleaved"]


def test_a_job_runs_those_that_say_so():
    allowed = get_args(AdaptraConfig.model_fields["schedule"].annotation)
    assert set(allowed) == {"slack-adaptive", "1f1b", "zb-h1"}


def test_names_cost_no_imports():
    code = "import sys, adaptra_plugin.config; print([m for m in ('numpy', 'numba', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
