"""Sinks come from one registry; rank 0 feeds a sink of another rank."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report import Reporter
from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.remote import RemoteSink
from adaptra_plugin.report.sink import Sink
from adaptra_plugin.report.sinks import SINKS
from tests.report.events import HEALED, SLOW


class Notes(Sink):
    """Writes down what it is given."""

    shared = True

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.in_time = True

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        self.taken.append(("iteration", metrics["iteration"]))

    def pipeline(self, metrics: Mapping[str, Any]) -> None:
        self.taken.append(("pipeline", metrics["iteration"]))

    def event(self, event: Any) -> None:
        self.taken.append(event)

    def close(self, deadline_s: float) -> bool:
        self.taken.append("close")
        return self.in_time


def reporter(rank: int = 0, **more: Any) -> Reporter:
    return Reporter(ReportConfig(directory=None, wandb="off", metrics_every=2), rank, **more)


def test_a_sink_is_one_line_of_the_registry(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()
    monkeypatch.setitem(SINKS, "notes", lambda place: notes if place.rank == 0 else None)
    report = reporter()
    for i in range(3):
        report.iteration({"iteration": i})
        report.pipeline({"iteration": i})
    report.event(SLOW)
    report.message("plan", version=2)  # it does not care about those
    notes.in_time = False
    report.close(1.0)
    assert notes.taken == [*((kind, i) for i in (0, 2) for kind in ("iteration", "pipeline")), SLOW, "close"]
    assert "report: notes did not finish within 1 s" in caplog.text


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[Reporter, Reporter, Notes]:
    """Reporters of rank 0 and of the rank with the run, and the sink there."""
    notes = Notes()
    sent: list[Reporter] = []

    def send(rank: int, event: StragglerEvent | None, metrics: Mapping[str, Any] | None) -> None:
        assert rank == 3 and (event is None) != (metrics is None)
        sent[0].show(event, metrics)

    with monkeypatch.context() as patch:
        patch.setitem(SINKS, "wandb", lambda place: RemoteSink(place.run_rank, place.send))
        first = reporter(run_rank=3, send=send)
        patch.setitem(SINKS, "wandb", lambda place: notes)
        sent.append(reporter(3, run_rank=3))
    return first, sent[0], notes


def test_rank_0_feeds_the_rank_with_the_run(pair: tuple[Reporter, Reporter, Notes]) -> None:
    first, other, notes = pair
    first.iteration({"iteration": 0})  # its own
    first.pipeline({"iteration": 0})
    first.pipeline({"iteration": 1})  # not due
    first.event(SLOW)
    other.event(HEALED)
    assert notes.taken == [("pipeline", 0), SLOW, HEALED]


def test_the_last_overview_is_waited_for(pair: tuple[Reporter, Reporter, Notes]) -> None:
    first, other, notes = pair
    threading.Timer(0.2, first.pipeline, [{"iteration": 4}]).start()
    other.await_overview(5, lambda: False, patience_s=60.0)  # iteration 5 is not due
    assert notes.taken == [("pipeline", 4)]
    other.await_overview(7, lambda: True, patience_s=60.0)
    other.await_overview(7, lambda: False, patience_s=0.05)
    first.await_overview(7, lambda: False, patience_s=60.0)  # nothing comes to rank 0


@pytest.mark.parametrize(
    ("rank", "run_rank", "wandb", "expected"),
    [
        (0, 0, "auto", ["JsonlSink", "WandbSink"]),
        (0, 3, "auto", ["JsonlSink", "RemoteSink"]),
        (3, 3, "auto", ["JsonlSink", "WandbSink"]),
        (2, 3, "auto", ["JsonlSink"]),
        (0, 3, "off", ["JsonlSink"]),
    ],
)
def test_which_sinks_a_rank_has(tmp_path: Path, rank: int, run_rank: int, wandb: Any, expected: list[str]) -> None:
    report = Reporter(ReportConfig(directory=str(tmp_path), wandb=wandb), rank, run_rank=run_rank)
    assert [type(sink).__name__ for sink in report._sinks] == expected
    report.close()
