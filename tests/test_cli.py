"""The command line: files and pipes in, JSON, CSV, pictures and traces out, messages and exit codes."""

from __future__ import annotations

import io
import json

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
    ],
)
def test_wrong_input_is_a_message_and_exit_code_2(arguments, message, profile, tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    places = {"PROFILE": profile, "BROKEN": str(tmp_path / "broken.json")}
    assert main([places.get(a, a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
