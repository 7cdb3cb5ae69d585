"""`adaptra check`: what a configuration can have, by the code that decides when the job starts."""

from __future__ import annotations

import json

import pytest

from adaptra_plugin.cli import main
from adaptra_plugin.patches import deepspeed_support

BASE = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8, "adaptra": {"enabled": True}}


@pytest.fixture
def check(tmp_path, capsys):
    def run(settings, *options):
        path = tmp_path / "ds.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        code = main(["check", "--deepspeed", str(path), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("settings", "options", "level", "code", "words"),
    [
        ({}, [], "full", 0, None),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, ["--tensor", "2"], "full", 0, None),
        ({"bf16": {"enabled": True}}, ["--stages", "12", "--tensor", "4"], "full", 0, None),
        ({"compile": {"enabled": True}}, [], "stock-order", 0, "torch.compile"),
        ({"zero_optimization": {"stage": 3}, "compile": {"enabled": True}}, [], "refused", 1, "ZeRO-2 and ZeRO-3"),
        ({"adaptra": {"enabled": False}}, [], "stock", 0, "enabled is false"),
        ({}, ["--stages", "1"], "stock", 0, "one stage"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_levels(check, settings, options, level, code, words):
    settings = {**BASE, **settings}
    found, text, _ = check(settings, *options)
    assert found == code and text.startswith(f"{level}: ")
    found, text, _ = check(settings, *options, "--json")
    document = json.loads(text)
    assert found == code and document["level"] == level
    assert set(document) == {"job", "level", "stages", "chunks", "tensor", "reasons"}
    if words is None:
        assert document["reasons"] == []
    else:
        assert any(words in reason["why"] and reason["remedy"] for reason in document["reasons"])
        assert "refused" not in {reason["level"] for reason in document["reasons"]} or code == 1


def test_without_the_block_nothing_happens(check):
    code, text, _ = check({"gradient_accumulation_steps": 8})
    assert code == 0 and text.startswith("stock: ") and 'no "adaptra" block' in text


def test_reasons_are_those_of_the_start(check):
    for settings in ({"amp": {"enabled": True}}, {"sparse_gradients": True}, {"eigenvalue": {"enabled": True}}):
        document = json.loads(check({**BASE, **settings}, "--json")[1])
        expected = deepspeed_support.reasons_of_config(settings)
        assert [reason["why"] for reason in document["reasons"]] == [reason.why for reason in expected] != []


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ("{", [], "cannot be read as JSON"),
        ("[]", [], "expected an object"),
        ({**BASE, "adaptra": {"shedule": 1}}, [], "unknown key"),
        ({**BASE, "adaptra": {"max_activations": [4, 4]}}, ["--stages", "4"], "2 entries for 4 stages"),
        ({**BASE, "adaptra": {"max_activations": 1, "schedule": "1f1b"}}, ["--stages", "4"], "limits cannot be kept"),
        (
            {**BASE, "adaptra": {"simulate": {"links": [{"src": 2, "dst": 3, "latency_ms": 9}]}}},
            [],
            "2-3 is not a link between neighbours of 2 stages",
        ),
        (BASE, ["--stages", "0"], "--stages 0: expected a whole number"),
        (BASE, ["--tensor", "-1"], "--tensor -1: expected a whole number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_end_the_job_at_its_start_is_told(check, settings, options, words):
    code, text, told = check(settings, *options)
    assert code == 2 and text == "" and words in told


def test_a_missing_file(capsys, tmp_path):
    assert main(["check", "--deepspeed", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err
