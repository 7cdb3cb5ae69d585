"""The real W&B, offline, read back from its files. One process per case: W&B keeps global state."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.report.wandb_files import Run

pytest.importorskip("wandb")

PRELUDE = """
import wandb
from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report import Reporter
from tests.report.events import HEALED, SLOW
from tests.report.settle import settle

def metrics(i):
    return {"iteration": i, "iteration_ms": 300.0 + i, "bubble_ms": [1.0, 2.0], "link_delay_ms": {"2-3": 0.4}}

def reporter(mode):
    return Reporter(ReportConfig(directory=None, wandb=mode, wandb_alert_interval_s=0), 0, wandb_here=True)

"""


def train(folder: Path, script: str) -> Run:
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    code = PRELUDE + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return Run(folder)


def test_the_hosts_run_is_shared_and_neither_loses_a_value(tmp_path: Path) -> None:
    """The host logs as DeepSpeed does: two calls per batch, both with the number of samples as step."""
    run = train(
        tmp_path,
        """
        host = wandb.init(project="host")
        report = reporter("on")
        for i in range(12):
            wandb.log({"lr": i}, step=8 * (i + 1))
            if i % 2:
                wandb.log({"loss": i}, step=8 * (i + 1))
            report.iteration(metrics(i))
            settle(report._wandb)  # training iterations take longer than the sink needs
            if i % 2 == 0:
                wandb.log({"loss": i}, step=8 * (i + 1))
            if i == 5:
                report.event(SLOW)
            if i == 9:
                report.event(HEALED)
        report.close()
        assert wandb.run is host and host.step == 96  # neither finished nor advanced
        wandb.log({"after": 1}, step=200)
        wandb.finish()
        """,
    )
    assert run.series("lr") == run.series("loss") == list(range(12))
    assert run.series("adaptra/iteration") == list(range(12))
    assert run.series("adaptra/iteration_ms") == [300 + i for i in range(12)]
    assert [row["_step"] for row in run.rows if "loss" in row] == [8 * (i + 1) for i in range(12)]
    assert run.series("after") == [1] and run.exited
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in run.metrics}
    assert axes == {"adaptra/iteration": "", "adaptra/*": "adaptra/iteration"}
    assert [(alert.title, alert.level) for alert in run.alerts] == [
        ("Adaptra: link 2-3 slow", "WARN"),
        ("Adaptra: link 2-3 healed", "INFO"),
    ]
    table = run.table("adaptra/events")
    column = table["columns"].index("state")
    assert [row[column] for row in table["data"]] == ["slow", "healed"]


def test_a_run_of_our_own_has_every_iteration_and_is_finished(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        """
        report = reporter("on")
        for i in range(30):
            report.iteration(metrics(i))
        settle(report._wandb)
        assert report._wandb._own and wandb.run is None  # the name stays free for the host
        report.event(SLOW)
        report.close(60)
        """,
    )
    assert run.series("adaptra/iteration_ms") == [300 + i for i in range(30)] and run.exited
    # the last event came after the last iteration and belongs to it
    assert run.series("adaptra/iteration") == [*range(30), 29]
    assert run.series("adaptra/bubble_ms/1") == [2] * 30 and run.series("adaptra/link_delay_ms/2-3") == [0.4] * 30
    assert len(run.alerts) == 1 and run.alerts[0].text.startswith("link 2-3 (rank 2 on n1")
    assert run.table("adaptra/events")["data"][0][1:3] == ["link 2-3", "slow"]


def test_what_comes_last_is_not_lost_at_the_exit_of_the_process(tmp_path: Path) -> None:
    """W&B ends its own connection at exit; the reporter's handler, registered before W&B was loaded, would come too late."""
    run = train(
        tmp_path,
        """
        import atexit
        report = reporter("on")
        atexit.register(report.close)
        report.iteration(metrics(0))
        settle(report._wandb)
        report.event(SLOW)
        """,
    )
    assert run.exited and len(run.alerts) == 1
    assert run.table("adaptra/events")["data"][0][1:3] == ["link 2-3", "slow"]
