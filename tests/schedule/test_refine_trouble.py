"""The worker of the exact refinement among a user's files, and its ends: a plan, or one error that says why."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adaptra_plugin.errors import PlanError
from adaptra_plugin.isolated import isolated_command, isolated_environment
from adaptra_plugin.schedule import refine as module
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import Profile, StageProfile
from adaptra_plugin.schedule.refine import Refinement, refine
from tests.schedule.test_refine import UNEVEN

pytest.importorskip("ortools")

HARD = Profile(32, tuple(StageProfile(9.7 + s % 3, 11.3 - s % 2, 5.9 + s % 4, 4 + s % 5) for s in range(8)), ())
FIRST = plan(HARD)
assert not FIRST.optimal


def plant(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("raise SystemExit('the user\\'s module is not for helpers')\n")


@pytest.mark.parametrize("where", ["working directory", "PYTHONPATH", "beside the script"])
def test_a_user_s_modules_named_like_the_standard_library_s(where, tmp_path, monkeypatch):
    plant(tmp_path, "queue.py", "json.py", "signal.py", "selectors.py", "sitecustomize.py", "usercustomize.py")
    if where == "working directory":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", ["", *sys.path])
    elif where == "PYTHONPATH":
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    else:
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert refine(UNEVEN, plan(UNEVEN), seconds=90).optimal


def test_what_changes_an_interpreter_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("PYTHONINSPECT", "1")
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    names = {name for name in isolated_environment() if name.startswith("PYTHON")}
    assert names <= {"PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONPYCACHEPREFIX"}
    assert "PYTHONHASHSEED" in names
    assert refine(UNEVEN, plan(UNEVEN), seconds=90).optimal


def test_arguments_and_the_package_reach_isolated_code():
    code = "import adaptra_plugin, numpy\nprint(sys.argv[1:], adaptra_plugin.__file__)"
    done = subprocess.run(
        isolated_command(code, "a b", "c"), env=isolated_environment(), capture_output=True, text=True, cwd="/"
    )
    import adaptra_plugin

    assert done.stdout.strip() == f"['a b', 'c'] {adaptra_plugin.__file__}", done.stderr


def test_a_killed_worker_says_how_it_ended():
    with Refinement(HARD, FIRST, seconds=300) as refinement:
        refinement._process.kill()
        with pytest.raises(PlanError, match="the worker was killed by SIGKILL"):
            refinement.result(timeout=20)
    assert refinement.best.makespan_ms <= FIRST.makespan_ms


def test_a_stopped_worker_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    refinement = Refinement(HARD, FIRST, seconds=1.0)
    os.kill(refinement._process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(PlanError, match="has not ended within"):
        refinement.result(timeout=60)
    assert time.monotonic() - begun < 10
    assert refinement._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import os; os.write(2, b'x' * (1 << 20)); ", None),  # far more than a pipe holds
        ("print('a library that greets'); print([1]); print(2); ", None),
        ("raise OSError('libortools.so: no such file'); ", "libortools.so: no such file"),
        ("import os; os._exit(3); ", r"exit code 3 \(without a word\)"),
    ],
    ids=["stderr", "stdout", "import", "exit"],
)
def test_whatever_the_worker_says(before, said, monkeypatch):
    monkeypatch.setattr(module, "_WORKER", before + "\n" + module._WORKER)
    if said is None:
        assert refine(UNEVEN, plan(UNEVEN), seconds=90).optimal
        return
    with pytest.raises(PlanError, match=said):
        refine(UNEVEN, plan(UNEVEN), seconds=90)


def test_or_tools_that_cannot_be_imported_are_named(tmp_path, monkeypatch):
    (tmp_path / "ortools").mkdir()
    (tmp_path / "ortools-9.99.dist-info").mkdir()
    (tmp_path / "ortools" / "__init__.py").write_text("raise ImportError('GLIBC_2.99 not found')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(PlanError, match=r"GLIBC_2\.99 not found"):
        refine(UNEVEN, plan(UNEVEN), seconds=90)


def test_no_process_can_be_started(monkeypatch):
    def full(*args, **kwargs):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    with pytest.raises(PlanError, match=r"no worker can be started .*Resource temporarily unavailable"):
        Refinement(HARD, FIRST, seconds=5)


def test_no_thread_can_be_started_and_no_worker_is_left(monkeypatch):
    def full(self):
        raise RuntimeError("can't start new thread")

    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[0]
    )
    monkeypatch.setattr(threading.Thread, "start", full)
    with pytest.raises(PlanError, match="can't start new thread"):
        Refinement(HARD, FIRST, seconds=5)
    assert started[0].returncode == -signal.SIGKILL
