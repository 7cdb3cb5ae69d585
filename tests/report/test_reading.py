"""Reports are read run by run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptra_plugin.cli import main
from adaptra_plugin.config import ReportConfig
from adaptra_plugin.errors import ConfigError
from adaptra_plugin.report import Reporter
from adaptra_plugin.report.reading import by_rank, choose, runs
from adaptra_plugin.report.reporter import new_run
from tests.report.events import HEALED, SLOW


def report(folder: Path, run: str, start: float, iterations: int, ranks: int = 2) -> None:
    """A job of some ranks, one after the other."""
    for rank in range(ranks):
        now = [start]
        reporter = Reporter(
            ReportConfig(directory=str(folder), wandb="off"),
            rank,
            run=run,
            clock=lambda now=now: now[0],
        )
        reporter.message("session")
        for i in range(iterations):
            now[0] += 1.0
            reporter.iteration({"iteration": i, "iteration_ms": start + i})
        reporter.message("plan", "plan v2 runs from iteration 3 on", version=2)
        if not rank:
            reporter.event(SLOW)
            reporter.event(HEALED)
        reporter.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs, the second of them begun last, and what older versions wrote."""
    (tmp_path / "rank00000.jsonl").write_text('{"type":"iteration","time":1.0,"rank":0,"iteration":0}\n{"type":"iter')
    report(tmp_path, "aaaa", 100.0, 5)
    report(tmp_path, "cccc", 300.0, 3)
    report(tmp_path, "bbbb", 200.0, 4)
    return tmp_path


def test_runs_are_told_apart(folder: Path) -> None:
    assert [one.run for one in runs(folder)] == ["-", "aaaa", "bbbb", "cccc"]
    found = choose(folder, "aaaa").to_json()
    assert found == {
        "run": "aaaa",
        "started": 100.0,
        "ended": 105.0,
        "ranks": [0, 1],
        "iterations": 5,
        "median_iteration_ms": 102.0,
        "events": [HEALED.sentence(), SLOW.sentence()],
        "plans": ["plan v2 runs from iteration 3 on"],
        "dropped": 0,
    }
    assert choose(folder).run == "cccc"
    ranks = by_rank(folder)
    assert [[record["iteration"] for record in rank if record["type"] == "iteration"] for rank in ranks] == [
        [0, 1, 2]
    ] * 2
    assert {record["run"] for record in by_rank(folder, "bbbb")[1]} == {"bbbb"}


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.startswith("run cccc: ") and SLOW.sentence() in printed and "3 iterations, median 301.0 ms" in printed
    )
    assert main(["report", str(folder), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "-", "aaaa", "bbbb", "cccc"]
    assert main(["report", str(folder), "--list", "--json"]) == 0
    assert [one["iterations"] for one in json.loads(capsys.readouterr().out)] == [1, 5, 4, 3]
    assert main(["report", str(folder), "--run", "bbbb", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["iterations"] == 4
    assert main(["report", str(folder), "--run", "bbbb", "--records"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["run"] for record in records} == {"bbbb"} and len(records) == 2 * 6 + 2


def test_what_is_not_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--run", "dddd"]) == 2
    assert "no run dddd there: expected one of -, aaaa, bbbb, cccc" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "no rank*.jsonl there" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "rank00000.jsonl").write_text("nonsense\n[1]\n{}\n")
    with pytest.raises(ConfigError, match="no records"):
        choose(tmp_path / "empty")


def test_ranks_agree_on_a_run_that_says_nothing_of_the_secret() -> None:
    secret = b"s" * 32
    assert new_run(secret) == new_run(secret) != new_run(b"t" * 32) and len(new_run(secret)) == 8
    assert new_run() != new_run()
    assert new_run(secret) not in secret.hex()


def test_what_cannot_be_read_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report(tmp_path, "aaaa", 100.0, 3, ranks=1)
    (tmp_path / "rank00001.jsonl").mkdir()
    (tmp_path / "rank00002.jsonl.gz").write_bytes(b"no text")
    assert [run.run for run in runs(tmp_path)] == ["aaaa"]
