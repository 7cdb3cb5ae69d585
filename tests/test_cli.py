"""The command line: files and pipes in, JSON, CSV, pictures and traces out, messages and exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from adaptra_plugin.cli import main
from adaptra_plugin.schedule.schedule import Schedule
from tests.schedule.helpers import even

PROFILE = even(4, 8, (9, 10, 6), links=[(2, 3, 30.0)])


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE.to_json()))
    return str(path)


def test_plan_writes_json_csv_picture_and_trace(profile, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, csv, png, trace = (str(tmp_path / name) for name in ("plan.json", "plan.csv", "plan.png", "trace.json"))
    assert main(["plan", profile, "--out", out, "--csv", csv, "--plot", png, "--trace", trace]) == 0
    assert capsys.readouterr().out == ""
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["schedule"] == "slack-adaptive"
    assert set(plan) == {
        "schedule", "makespan_ms", "lower_bound_ms", "optimal", "gap", "planning_ms", "warmup", "peak_activations",
        "ranks",
    }  # fmt: skip
    assert Schedule.from_csv((tmp_path / "plan.csv").read_text()).to_text() == plan["ranks"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    titles = [
        e["args"]["name"]
        for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        if e["name"] == "process_name"
    ]
    assert titles == ["1f1b, blocking links", "slack-adaptive, delegated links"]


def test_pipes(profile, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(PROFILE.to_json())))
    assert main(["plan", "-", "--schedule", "zb-h1"]) == 0
    plan = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(plan))
    assert main(["simulate", "-", "--profile", profile]) == 0
    replay = json.loads(capsys.readouterr().out)
    assert replay["makespan_ms"] == json.loads(plan)["makespan_ms"]
    assert set(replay["idle_ms"]) == {"dependency", "link", "blocking"}
    assert replay["peak_activations"] == [4, 4, 4, 4]
    assert replay["critical_path"][0] == "0F0"


def test_a_blocking_link_is_slower_and_says_so(profile, tmp_path, capsys):
    out = str(tmp_path / "plan.json")
    assert main(["plan", profile, "--schedule", "1f1b", "--out", out]) == 0
    made = {}
    for model in ("delegated", "blocking"):
        assert main(["simulate", out, "--profile", profile, "--link-model", model]) == 0
        made[model] = json.loads(capsys.readouterr().out)
    assert main(["simulate", out, "--profile", profile, "--link-model", "blocking", "--duplex", "half"]) == 0
    half = json.loads(capsys.readouterr().out)
    assert made["delegated"]["makespan_ms"] <= made["blocking"]["makespan_ms"] <= half["makespan_ms"]
    assert half["idle_ms"]["blocking"] > 0


def test_exact(profile, capsys):
    pytest.importorskip("ortools")
    assert main(["plan", profile, "--exact", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["optimal"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "missing.json"], "missing.json: No such file"),
        (["plan", "PROFILE", "--exact", "-1"], "above zero"),
        (["plan", "PROFILE", "--schedule", "1f1b", "--exact", "1"], "refines slack-adaptive"),
        (["plan", "PROFILE", "--csv", "-"], "both go to stdout"),
        (["plan", "PROFILE", "--plot", "a.pdf"], ".png or .svg"),
        (["plan", "PROFILE", "--schedule", "zb-v"], "2 stages a rank"),
        (["simulate", "-", "--profile", "-"], "both come from stdin"),
        (["simulate", "PROFILE", "--profile", "PROFILE"], "plan.ranks"),
        (["plan", "BROKEN"], "not JSON: line 1"),
        (["plan", "LATIN"], "latin.json is not UTF-8 text: byte 1"),
        (["plan", "DEEP"], "deep.json is nested too deeply"),
        (["plan", "DIGITS"], "digits.json cannot be read"),
        (["plan", "PROFILE", "--seed", "-1"], "seed is -1: expected a whole number from 0 to 2147483647"),
        (["plan", "PROFILE", "--seed", "2147483648"], "seed is 2147483648"),
        (["simulate", "FAR", "--profile", "PROFILE"], "stage 999999999999 in a schedule of 2 actions"),
        (["simulate", "FARTHER", "--profile", "PROFILE"], "stage 99999999999999999999 in a schedule of 2 actions"),
        (["simulate", "PROFILE", "--profile", "PROFILE", "--plot", "a.pdf"], ".png or .svg"),
        (["doctor", "--ranks", "0"], "--ranks 0: expected a whole number from 1 to 4096"),
        (["doctor", "--ranks", "4097"], "--ranks 4097"),
    ],
)
def test_wrong_input_is_a_message_and_exit_code_2(arguments, message, profile, tmp_path, capsys):
    contents = {
        "BROKEN": b"{", "LATIN": b'"\xe9"', "DEEP": b"[" * 200_000, "DIGITS": b"9" * 5000,
        "FAR": b'{"ranks": [["999999999999F0", "0B0"]]}', "FARTHER": b'{"ranks": [["99999999999999999999F0", "0B0"]]}',
    }  # fmt: skip
    places = {"PROFILE": profile}
    for name, content in contents.items():
        places[name] = str(tmp_path / f"{name.lower()}.json")
        (tmp_path / f"{name.lower()}.json").write_bytes(content)
    assert main([places.get(a, a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exact", "inf"], "--exact inf: expected seconds"),
        (["--exact", "nan"], "--exact nan"),
        (["--exact", "0"], "--exact 0"),
        (["--exact", "86401"], "at most 86400"),
        (["--exact", "1", "--schedule", "zb-h1"], "refines slack-adaptive"),
        (["--exact", "1", "--offload", "1"], "cannot be combined"),
        (["--offload", "1", "--schedule", "zb-h1"], "--offload is weighed"),
        (["--offload", "nan"], "--offload nan"),
        (["--plot", "a.pdf"], ".png or .svg"),
        (["--trace", "missing/trace.json"], "there is no folder missing"),
        (["--plot", "."], "is a folder"),
    ],
)
def test_wrong_options_are_refused_before_planning_and_nothing_is_written(
    arguments, message, profile, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("adaptra_plugin.schedule.planner.plan", lambda *_, **__: pytest.fail("planned"))
    monkeypatch.chdir(tmp_path)
    assert main(["plan", profile, "--out", "plan.json", "--csv", "plan.csv", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_a_picture_without_matplotlib_is_refused_before_planning(profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("adaptra_plugin.schedule.planner.plan", lambda *_, **__: pytest.fail("planned"))
    assert main(["plan", profile, "--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")]) == 2
    assert "pictures need matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


def test_a_reader_that_goes_away_is_no_traceback(profile):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "adaptra_plugin.cli", "plan", profile, "--schedule", "zb-h1"]
    try:
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (2, "")
