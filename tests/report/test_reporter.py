"""The reporter: who gets what."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report import Reporter
from tests.report.events import HEALED, SLOW


def reporter(folder: Path | None, **config: object) -> Reporter:
    settings = ReportConfig(directory=str(folder) if folder else None, wandb="off", **config)  # type: ignore[arg-type]
    return Reporter(settings, rank=3, run="r1", clock=lambda: 12.5)


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rank00003.jsonl").read_text().splitlines()]


def test_records_carry_type_time_and_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = reporter(tmp_path)
    with caplog.at_level(logging.INFO):
        report.iteration({"iteration": 0, "iteration_ms": 300.5, "bubble_ms": [1.0, 2.0]})
        report.event(SLOW)
        report.event(HEALED)
        report.message("plan", "plan v2 runs from iteration 24", version=2, rank=99, run="x")
        report.message("ring_full", blocked_ms=120.0)
        report.close()
    got = records(tmp_path)
    assert [record["type"] for record in got] == ["iteration", "event", "event", "plan", "ring_full"]
    assert {(record["time"], record["rank"], record["run"]) for record in got} == {(12.5, 3, "r1")}
    assert got[0]["bubble_ms"] == [1.0, 2.0] and got[1]["text"] == SLOW.sentence() and got[1]["pp_ranks"] == [2, 3]
    assert report.files() == [str(tmp_path / "rank00003.jsonl")]
    lines = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert lines == [
        ("adaptra", "WARNING", SLOW.sentence()),
        ("adaptra", "INFO", HEALED.sentence()),
        ("adaptra", "INFO", "plan v2 runs from iteration 24"),
    ]


def test_metrics_every(tmp_path: Path) -> None:
    report = reporter(tmp_path, metrics_every=4)
    for i in range(10):
        report.iteration({"iteration": i})
    report.close()
    assert [record["iteration"] for record in records(tmp_path)] == [0, 4, 8]


def test_metrics_of_the_pipeline_go_to_wandb_in_place_of_the_ranks_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[dict[str, object]] = []
    monkeypatch.setattr("adaptra_plugin.report.wandb_sink.WandbSink._put", lambda self, m: taken.append(m))
    report = Reporter(ReportConfig(directory=str(tmp_path), metrics_every=2), rank=3, run_rank=3, overviews=True)
    for i in range(4):
        report.iteration({"iteration": i, "own": 1})
        report.pipeline({"iteration": i, "all": 1})
    report.close()
    assert taken == [{"iteration": 0, "all": 1}, {"iteration": 2, "all": 1}]
    assert [record["type"] for record in records(tmp_path)] == ["iteration", "pipeline"] * 2


def test_metrics_may_be_reused_by_the_caller(tmp_path: Path) -> None:
    report, metrics = reporter(tmp_path), {"iteration": 0}
    for i in range(50):
        metrics["iteration"] = i
        report.iteration(metrics)
    report.close()
    assert [record["iteration"] for record in records(tmp_path)] == list(range(50))


def test_without_a_directory_only_the_log_is_left(caplog: pytest.LogCaptureFixture) -> None:
    report = reporter(None)
    report.iteration({"iteration": 0})
    report.event(SLOW)
    report.close()
    report.close()
    assert report.files() == [] and SLOW.sentence() in caplog.text
