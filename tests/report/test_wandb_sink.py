"""The sink against a stand-in for W&B, to bring about what the real one does not do on request."""

from __future__ import annotations

import sys
import threading
import time
import types
from dataclasses import replace
from typing import Any

import pytest

from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report import WandbSink
from adaptra_plugin.report.wandb_feed import MAX_EVENTS
from adaptra_plugin.report.wandb_rows import EVENTS, flatten
from tests.report.events import HEALED, SLOW
from tests.report.settle import DEADLINE_S, settle


class Run:
    """One row per step; rows merge until the host moves on, as in W&B."""

    def __init__(self) -> None:
        self.step = 0
        self.rows: dict[int, dict[str, Any]] = {}
        self.alerts: list[tuple[str, str, str]] = []
        self.defined: list[str] = []
        self.finished = False
        self.broken: Exception | None = None
        self._is_finished = False
        self.lock = threading.Lock()

    def define_metric(self, name: str, **settings: Any) -> None:
        self._check()
        self.defined.append(name)

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self._check()
        with self.lock:
            if step is not None:
                assert step >= self.step, "W&B would drop this"
                self.step = step
            self.rows.setdefault(self.step, {}).update(data)
            if commit or (commit is None and step is None):
                self.step += 1

    def alert(self, title: str, text: str, level: str) -> None:
        self._check()
        self.alerts.append((title, text, level))

    def finish(self) -> None:
        self.finished = True

    def _check(self) -> None:
        if self.broken:
            raise self.broken
        if self._is_finished:
            raise RuntimeError("Run (x) is finished. The call to `log` will be ignored.")


class Module(types.ModuleType):
    """Stands in for the module `wandb`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.run: Run | None = None
        self.opened: list[str] = []  # projects of runs of our own, which are in another process (test_wandb_own)

    @staticmethod
    def Table(columns: list[str], data: list[list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in data]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Module:
    module = Module()
    monkeypatch.setitem(sys.modules, "wandb", module)

    def opened(project: str, *_: Any) -> None:
        module.opened.append(project)
        raise OSError("not in these tests")

    monkeypatch.setattr("adaptra_plugin.report.wandb_sink.OwnRun", opened)
    return module


def sink(mode: str = "auto", interval_s: float = 60.0, now: list[float] | None = None) -> WandbSink:
    clock = now or [0.0]
    config = ReportConfig(wandb=mode, wandb_alert_interval_s=interval_s)  # type: ignore[arg-type]
    return WandbSink(config, monotonic=lambda: clock[0])


@pytest.mark.parametrize("ours_first", [False, True])
def test_every_iteration_gets_a_row_of_a_host_that_names_its_steps(wandb: Module, ours_first: bool) -> None:
    wandb.run = run = Run()
    target = sink()
    for i in range(20):
        if ours_first:
            target.iteration({"iteration": i})
            settle(target)
        run.log({"lr": i}, step=8 * (i + 1))
        run.log({"loss": i}, step=8 * (i + 1))
        if not ours_first:
            target.iteration({"iteration": i})
            settle(target)
    assert target.close(DEADLINE_S)
    assert [row["adaptra/iteration"] for row in run.rows.values() if "adaptra/iteration" in row] == list(range(20))
    hosts = [row for step, row in run.rows.items() if step]
    assert [row["loss"] for row in hosts] == [row["lr"] for row in hosts] == list(range(20))
    assert not run.finished


def test_a_host_that_writes_rarely_gets_the_newest_and_keeps_its_steps(wandb: Module) -> None:
    wandb.run = run = Run()
    target = sink()
    for i in range(1, 101):
        target.iteration({"iteration": i})
        if i % 25 == 0:
            settle(target)
            run.log({"loss": i}, step=i)
            target.iteration({"iteration": i + 0.5})
            settle(target)
    target.close(DEADLINE_S)
    assert [step for step in run.rows if step] == [25, 50, 75, 100]
    assert [run.rows[step]["adaptra/iteration"] for step in (25, 50, 75, 100)] == [25.5, 50.5, 75.5, 100.5]


def test_nothing_is_lost_before_the_host_opens_its_run(wandb: Module) -> None:
    target = sink()
    target.event(SLOW)
    settle(target)
    wandb.run = run = Run()
    target.close(DEADLINE_S)
    assert [row["state"] for row in run.rows[0][EVENTS]] == ["slow"] and len(run.alerts) == 1


def test_auto_without_a_run_opens_none(wandb: Module) -> None:
    target = sink()
    target.iteration({"iteration": 0})
    target.event(SLOW)
    assert target.close(DEADLINE_S) and wandb.opened == []


def test_auto_does_not_import_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    target = sink()
    target.event(SLOW)
    target.close(DEADLINE_S)
    assert "wandb" not in sys.modules


def test_on_uses_the_hosts_run_if_there_is_one(wandb: Module) -> None:
    target = sink("on")
    settle(target)
    wandb.run = Run()  # opened after the sink, before the first record
    target.iteration({"iteration": 0})
    target.close(DEADLINE_S)
    assert wandb.opened == [] and wandb.run.rows and not wandb.run.finished


def test_a_run_that_the_host_has_finished_is_let_go(wandb: Module, caplog: pytest.LogCaptureFixture) -> None:
    wandb.run = run = Run()
    target = sink("on")
    target.iteration({"iteration": 0})
    settle(target)
    wandb.run, run._is_finished = None, True
    target.iteration({"iteration": 1})
    target.event(SLOW)
    target.close(DEADLINE_S)
    assert list(run.rows) == [0] and wandb.opened == [] and not caplog.records


def test_a_run_that_the_host_finishes_meanwhile_is_no_failure(wandb: Module, caplog: pytest.LogCaptureFixture) -> None:
    """W&B takes the name away only after it has refused further calls."""
    wandb.run = run = Run()
    target = sink("on")
    target.iteration({"iteration": 0})
    settle(target)
    run.step += 1
    run._is_finished = True
    for number in (1, 2, 3):
        target.iteration({"iteration": number})
        settle(target)
    wandb.run = None
    target.close(DEADLINE_S)
    assert list(run.rows) == [0] and wandb.opened == [] and not caplog.records


def test_each_run_of_the_host_gets_what_was_reported_while_it_was_open(wandb: Module) -> None:
    """Rows of the first run that the host never made room for, and what came between the two, are in the JSONL file only."""
    target = sink(interval_s=0)
    target.iteration({"iteration": 0})  # before the first: it belongs there
    wandb.run = first = Run()
    for i in (1, 2, 3):
        target.iteration({"iteration": i})
    target.event(SLOW)
    settle(target)
    first._is_finished, wandb.run = True, None
    target.iteration({"iteration": 4})
    target.event(SLOW)
    wandb.run = second = Run()
    target.iteration({"iteration": 5})
    settle(target)
    second.log({"loss": 1.0})
    target.iteration({"iteration": 6})
    target.event(HEALED)
    assert target.close(DEADLINE_S)
    assert [row.get("adaptra/iteration") for row in first.rows.values()] == [0]
    assert [row.get("adaptra/iteration") for row in second.rows.values()] == [5, 6]
    assert first.defined == second.defined == ["adaptra/iteration", "adaptra/*"]
    assert [row["state"] for row in second.rows[1][EVENTS]] == ["healed"]
    assert [title for title, _, _ in first.alerts + second.alerts] == [
        "Adaptra: link 2-3 slow",
        "Adaptra: link 2-3 healed",
    ]


def test_what_is_queued_when_the_run_changes_keeps_its_run(wandb: Module) -> None:
    """The thread is behind: what it finds open is not what was open."""
    gate = threading.Event()
    wandb.run = first = Run()
    real = first.log
    first.log = lambda *a, **k: (gate.wait(DEADLINE_S), real(*a, **k))  # type: ignore[method-assign]
    target = sink()
    for i in range(3):
        target.iteration({"iteration": i})
    wandb.run = second = Run()
    target.iteration({"iteration": 3})
    gate.set()
    assert target.close(DEADLINE_S)
    assert [row.get("adaptra/iteration") for row in second.rows.values()] == [3]


def test_a_missing_wandb_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    target = sink("on")
    for i in range(50):
        target.iteration({"iteration": i})
    target.event(SLOW)
    assert target.close(DEADLINE_S)
    assert len(caplog.records) == 1 and "W&B failed" in caplog.text


def test_a_failing_wandb_is_logged_once_and_left_alone(wandb: Module, caplog: pytest.LogCaptureFixture) -> None:
    wandb.run = Run()
    wandb.run.broken = OSError("connection refused")
    target = sink()
    for i in range(50):
        target.iteration({"iteration": i})
    assert target.close(DEADLINE_S)
    assert len(caplog.records) == 1 and "connection refused" in caplog.text


def test_a_hanging_wandb_blocks_neither_the_caller_nor_the_end(wandb: Module) -> None:
    gate = threading.Event()
    wandb.run = run = Run()
    run.log = lambda *a, **k: gate.wait(DEADLINE_S)  # type: ignore[method-assign]
    target = sink()
    start = time.monotonic()
    for i in range(10_000):
        target.iteration({"iteration": i})
    assert not target.close(0.05)
    assert time.monotonic() - start < 5
    gate.set()
    assert target.close(DEADLINE_S)


def test_alerts_are_limited_per_subject_and_the_last_one_counts(wandb: Module) -> None:
    wandb.run, now = Run(), [0.0]
    target = sink(now=now)
    other = replace(SLOW, link="0-1")
    for event in (SLOW, HEALED, other, SLOW, HEALED):
        target.event(event)
        settle(target)
    assert [title for title, _, _ in wandb.run.alerts] == ["Adaptra: link 2-3 slow", "Adaptra: link 0-1 slow"]
    now[0] = 61.0
    settle(target)
    assert wandb.run.alerts[2:] == [("Adaptra: link 2-3 healed", HEALED.sentence(), "INFO")]
    target.event(SLOW)
    target.close(DEADLINE_S)  # what waits is said at the end
    assert wandb.run.alerts[3:] == [("Adaptra: link 2-3 slow", SLOW.sentence(), "WARN")]
    assert len(wandb.run.rows[0][EVENTS]) == 6  # the table has them all


def test_the_table_is_bounded(wandb: Module) -> None:
    wandb.run = run = Run()
    target = sink()
    for i in range(MAX_EVENTS + 50):
        target.event(replace(SLOW, found_iteration=i))
    target.close(DEADLINE_S)
    assert [row["found_iteration"] for row in run.rows[0][EVENTS]] == list(range(50, MAX_EVENTS + 50))


def test_names_of_series() -> None:
    metrics = {"iteration": 3, "bubble_ms": [1.0, 2.0], "link_delay_ms": {"2-3": 0.4}, "note": "x", "none": None}
    assert flatten(metrics) == {
        "adaptra/iteration": 3,
        "adaptra/bubble_ms/0": 1.0,
        "adaptra/bubble_ms/1": 2.0,
        "adaptra/link_delay_ms/2-3": 0.4,
        "adaptra/note": "x",
    }
    assert flatten({"spans": [["F", 0.0, 1.0]], "names": ["a"]}) == {}
    assert flatten({"bubble_ms": list(range(101))}) == {"adaptra/bubble_ms/mean": 50.0, "adaptra/bubble_ms/max": 100}
