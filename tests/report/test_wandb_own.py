"""A run of our own, with the real W&B and a server on this machine: whatever the user and the server do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.wandb_files import Run, all_runs
from tests.report.wandb_process import PRELUDE, Outcome, run_script
from tests.report.wandb_server import WandbServer

pytest.importorskip("wandb")

PROMPT_S = 45.0
"""W&B by itself would wait for 90 s, and then again in its exit handler."""
TEN = """
report = reporter("on")
for i in range(10):
    report.iteration(metrics(i))
"""


def online(folder: Path, script: str, url: str) -> Outcome:
    return run_script(folder, script, WANDB_MODE="online", WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40)


def only_run(folder: Path) -> Run:
    """The run that somebody can upload; the process may still be writing it."""
    until = time.monotonic() + 30
    while True:
        runs = [run for run in all_runs(folder) if run.exited]
        if runs or time.monotonic() > until:
            (run,) = runs
            return run
        time.sleep(0.1)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.stop()


def test_it_has_every_iteration_and_is_finished(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        report = reporter("on")
        for i in range(30):
            report.iteration(metrics(i))
        own_run_opened(report._named["wandb"])
        report.event(SLOW)
        report.close(60)
        """,
    )
    assert done.code == 0, done.log
    run = Run(tmp_path)
    assert run.project == "adaptra" and f"report: W&B run {run.path.parent}" in done.log
    assert run.series("adaptra/iteration_ms") == [300 + i for i in range(30)] and run.exited
    # the last event came after the last iteration and belongs to it
    assert run.series("adaptra/iteration") == [*range(30), 29]
    assert run.series("adaptra/bubble_ms/1") == [2] * 30 and run.series("adaptra/link_delay_ms/2-3") == [0.4] * 30
    assert len(run.alerts) == 1 and run.alerts[0].text.startswith("link 2-3 (rank 2 on n1")
    assert run.table("adaptra/events")["data"][0][1:3] == ["link 2-3", "slow"]
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in run.metrics}
    assert axes == {"adaptra/iteration": "", "adaptra/*": "adaptra/iteration"}


def test_what_comes_last_is_not_lost_at_the_exit_of_the_process(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import atexit
        report = reporter("on")
        atexit.register(report.close)
        report.iteration(metrics(0))
        own_run_opened(report._named["wandb"])
        report.event(SLOW)
        """,
    )
    assert done.code == 0, done.log
    run = only_run(tmp_path)
    assert len(run.alerts) == 1
    assert run.table("adaptra/events")["data"][0][1:3] == ["link 2-3", "slow"]


def test_the_users_runs_are_his_and_ours_is_ours(tmp_path: Path) -> None:
    """He opens two, one after the other, with an id from the environment, ends all that W&B knows of, and forks."""
    done = run_script(
        tmp_path,
        """
        import os, sys
        report = reporter("on")
        report.iteration(metrics(0))
        ours = own_run_opened(report._named["wandb"])
        assert wandb.run is None and "WANDB_SERVICE" not in os.environ
        for name, first in (("one", 1), ("two", 6)):
            his = wandb.init(project=name)
            assert wandb.run is his and his.id not in ours.where and his.project == name
            for i in range(first, first + 5):
                report.iteration(metrics(i))
                wandb.log({"loss": i}, step=100 - 10 * first + i)  # smaller steps in the second
                settle(report._named["wandb"])
            child = os.fork()
            if not child:
                report.iteration(metrics(1000))
                sys.exit(0)  # runs the exit handlers of this process
            assert os.waitpid(child, 0)[1] == 0
            wandb.finish()
            wandb.teardown()
            os.environ.pop("WANDB_RUN_ID", None)
        report.close(60)
        """,
        WANDB_RUN_ID="chosen",
    )
    assert done.code == 0, done.log
    ours, one, two = all_runs(tmp_path)
    assert [run.project for run in (ours, one, two)] == ["adaptra", "one", "two"]
    assert ours.series("adaptra/iteration") == list(range(11)) and ours.series("loss") == [] and ours.exited
    assert one.path.name == "run-chosen.wandb" and one.series("loss") == [1, 2, 3, 4, 5]
    assert two.series("loss") == [6, 7, 8, 9, 10] and one.series("adaptra/iteration") == []


def test_online_the_rows_arrive(tmp_path: Path, server: WandbServer) -> None:
    done = online(tmp_path, TEN + "own_run_opened(report._named['wandb'])\nreport.close(60)", server.url)
    assert done.code == 0 and f"report: W&B run {server.url}/me/adaptra/runs/" in done.log, done.log
    assert [row["adaptra/iteration"] for row in server.rows if "adaptra/iteration" in row] == list(range(10))
    assert set(server.projects) == {"adaptra"}


def refused() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_nobody_listens(tmp_path: Path) -> None:
    done = online(tmp_path, TEN + "own_run_opened(report._named['wandb'])\nreport.close()", refused())
    assert done.code == 0 and done.seconds < PROMPT_S, done.log
    run = only_run(tmp_path)
    assert run.series("adaptra/iteration") == list(range(10)) and run.path.parent.name.startswith("offline-run")
    assert "does not answer" in done.log and str(run.path.parent) in done.log


def test_nobody_listens_and_training_ends_at_once(tmp_path: Path) -> None:
    done = online(tmp_path, TEN + "report.close(0.1)", refused())
    assert done.code == 0 and done.seconds < PROMPT_S, done.log
    assert only_run(tmp_path).series("adaptra/iteration") == list(range(10))


def test_the_server_accepts_and_says_nothing(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        done = online(tmp_path, TEN + "report.close()", f"http://127.0.0.1:{sock.getsockname()[1]}")
    assert done.code == 0 and done.seconds < PROMPT_S, done.log
    assert only_run(tmp_path).series("adaptra/iteration") == list(range(10))


def test_the_server_answers_but_opens_no_run_before_training_ends(tmp_path: Path) -> None:
    server = WandbServer(opens_runs=False)
    try:
        done = online(tmp_path, TEN + "report.close()", server.url)
    finally:
        server.stop()
    assert done.code == 0 and done.seconds < PROMPT_S and "no W&B run online (no answer" in done.log, done.log
    run = only_run(tmp_path)
    assert run.series("adaptra/iteration") == list(range(10)) and run.path.parent.name.startswith("offline-run")


def test_the_server_dies_during_training(tmp_path: Path, server: WandbServer) -> None:
    """The end is prompt, and what could not be uploaded lies in the run's folder."""
    script = f"""
import time, urllib.request
{TEN}
own_run_opened(report._named["wandb"])
open("opened", "w").close()
while True:
    try:
        urllib.request.urlopen("{server.url}")
        time.sleep(0.05)
    except OSError:
        break
for i in range(10, 20):
    report.iteration(metrics(i))
report.close()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script],
        env={
            **os.environ,
            **{"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_DIR": str(tmp_path)},
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "opened").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        server.stop()
        began = time.monotonic()
        _, log = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0 and time.monotonic() - began < PROMPT_S, log
    run = only_run(tmp_path)
    assert run.series("adaptra/iteration") == list(range(20))
    assert f"wandb sync {run.path.parent}" in log


def test_training_is_killed(tmp_path: Path) -> None:
    """What was reported is on the disk, and the process ends, though a worker of a data loader holds its pipe open."""
    code = PRELUDE + textwrap.dedent(
        """
        import os, time
        report = reporter("on")
        for i in range(10):
            report.iteration(metrics(i))
        ours = own_run_opened(report._named["wandb"])
        settle(report._named["wandb"])
        child = os.fork()
        if not child:
            time.sleep(100)
        open("pids", "w").write(f"{ours.pid} {child}")
        os.rename("pids", "ready")
        time.sleep(100)
        """
    )
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, cwd=tmp_path)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    own, worker = map(int, (tmp_path / "ready").read_text().split())
    try:
        run = only_run(tmp_path)
        until = time.monotonic() + 30
        while Path(f"/proc/{own}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{own}").exists()
    finally:
        os.kill(worker, signal.SIGKILL)
    assert run.series("adaptra/iteration") == list(range(10))


@pytest.mark.parametrize(
    ("module", "why"),
    [("raise RuntimeError('no such GLIBC')", "no such GLIBC"), ("import os; os._exit(3)", "exit code 3")],
)
def test_a_broken_installation_costs_one_line(tmp_path: Path, module: str, why: str) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(module)
    prelude = PRELUDE.replace("import wandb\n", "").replace(", settle\n", "\n").replace("own_run_opened", "DEADLINE_S")
    done = run_script(
        tmp_path,
        TEN + "report.event(SLOW)\nreport.close(60)",
        prelude=prelude,
        PYTHONPATH=f"{tmp_path / 'site'}:{Path(__file__).parents[2]}",
    )
    assert done.code == 0 and done.log.count("W&B failed") == 1 and why in done.log, done.log
    assert "link 2-3" in done.log


def test_files_and_folders_named_like_modules_are_not_imported(tmp_path: Path) -> None:
    for name in ("json", "signal", "select"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the user's own')")
    (tmp_path / "wandb").mkdir()  # where W&B itself writes
    done = run_script(tmp_path, "import sys; sys.path.remove('')\n" + PRELUDE + TEN + "report.close(60)", prelude="")
    assert done.code == 0, done.log
    assert only_run(tmp_path).series("adaptra/iteration") == list(range(10))


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    done = run_script(tmp_path, TEN + "report.close(60)", WANDB_MODE="disabled")
    assert done.code == 0 and "report:" not in done.log and all_runs(tmp_path) == [], done.log
