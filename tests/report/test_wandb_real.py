"""The real W&B, offline, read back from its files. One process per case: W&B keeps global state."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.wandb_files import Run, all_runs
from tests.report.wandb_process import run_script

pytest.importorskip("wandb")


def train(folder: Path, script: str) -> Run:
    done = run_script(folder, script)
    assert done.code == 0, done.log
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
            settle(report._named["wandb"])  # training iterations take longer than the sink needs
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


def test_each_run_of_the_host_has_its_own_rows_events_and_axes(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        report = reporter("on")
        for name, first in (("one", 0), ("two", 10)):
            wandb.init(project=name)
            for i in range(first, first + 5):
                report.iteration(metrics(i))
                settle(report._named["wandb"])
                wandb.log({"loss": i})
            report.event(SLOW)
            settle(report._named["wandb"])
            report.iteration(metrics(first + 5))
            report.iteration(metrics(first + 6))  # one of the two finds no row
            wandb.finish()
            report.iteration(metrics(first + 7))
        report.close()
        """,
    )
    assert done.code == 0 and "report:" not in done.log, done.log
    one, two = all_runs(tmp_path)
    assert (one.project, two.project) == ("one", "two")
    assert one.series("adaptra/iteration")[:5] == one.series("loss") == [0, 1, 2, 3, 4]
    assert two.series("adaptra/iteration")[:5] == two.series("loss") == [10, 11, 12, 13, 14]
    assert max(one.series("adaptra/iteration")) <= 6
    for run in (one, two):
        assert run.exited and len(run.alerts) == len(run.table("adaptra/events")["data"]) == 1
        assert {metric.name or metric.glob_name for metric in run.metrics} == {"adaptra/iteration", "adaptra/*"}


def test_a_disabled_run_of_the_host_disturbs_nobody(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        report = reporter("on")
        run = wandb.init(project="host", mode="disabled")
        for i in range(20):
            report.iteration(metrics(i))
            wandb.log({"loss": i}, step=i)
        report.event(SLOW)
        report.close()
        wandb.finish()
        """,
    )
    assert done.code == 0 and "report:" not in done.log, done.log
    assert all_runs(tmp_path) == []
