"""The configuration: every mistake is one clear line, and none is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptra_plugin.config import AdaptraConfig, parse_config
from adaptra_plugin.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.json"))


def test_absent_null_and_false_are_disabled():
    assert not parse_config(None).enabled
    assert not parse_config(False).enabled
    assert parse_config({}).enabled and parse_config(True).enabled
    assert not parse_config({"enabled": False}).enabled


def test_three_mistakes_are_three_lines():
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {
                "shedule": "1f1b",
                "transport": {"connections_per_direction": 99},
                "simulate": {"links": [{"src": 1, "dst": 1, "latency_ms": 5}]},
            }
        )
    head, *lines = str(caught.value).splitlines()
    assert head == '3 mistakes in the "adaptra" configuration:'
    assert len(lines) == 3
    unknown = next(line for line in lines if "shedule" in line)
    assert "unknown key" in unknown and "'1f1b'" in unknown and "schedule" in unknown.split("allowed here:")[1]
    bounds = next(line for line in lines if "connections_per_direction" in line)
    assert "99" in bounds and "less than or equal to 16" in bounds
    assert any("adaptra.simulate.links.0" in line and "two different stages" in line for line in lines)


@pytest.mark.parametrize(
    ("block", "key", "says"),
    [
        ({"schedule": "fastest"}, "adaptra.schedule", "'slack-adaptive'"),
        ({"detector": {"windw": 3}}, "adaptra.detector.windw", "window"),
        ({"max_activations": 0}, "adaptra.max_activations", "0 is not allowed: a whole number of at least 1"),
        ({"transport": {"deadline_s": -1}}, "adaptra.transport.deadline_s", "greater than 0"),
        ({"report": {"wandb": "maybe"}}, "adaptra.report.wandb", "'auto', 'on' or 'off'"),
    ],
)
def test_a_mistake_names_key_value_and_what_is_allowed(block, key, says):
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    assert key in str(caught.value) and says in str(caught.value)


LIMIT = "a whole number of at least 1, a list of such numbers with one per stage, or null"


@pytest.mark.parametrize(
    ("block", "key", "value", "allowed"),
    [
        ({"enabled": "no"}, "enabled", "'no'", "boolean"),
        ({"split_backward": "off"}, "split_backward", "'off'", "boolean"),
        ({"transport": {"ring_mib": True}}, "transport.ring_mib", "True", "'auto', or a whole number from 1"),
        ({"transport": {"ring_mib": 64.0}}, "transport.ring_mib", "64.0", "whole number"),
        ({"refine_s": True}, "refine_s", "True", "number"),
        ({"refine_s": float("nan")}, "refine_s", "nan", "finite"),
        ({"detector": {"min_delay_ms": float("inf")}}, "detector.min_delay_ms", "inf", "finite"),
        ({"detector": {"window": 8, "min_history": 9}}, "detector.min_history", "9", "at most window (8)"),
        ({"detector": {"min_history": 17}}, "detector.min_history", "17", "at most window (16)"),
        ({"max_activations": []}, "max_activations", "[]", LIMIT),
        ({"max_activations": "x"}, "max_activations", "'x'", LIMIT),
        ({"max_activations": True}, "max_activations", "True", LIMIT),
        ({"max_activations": [4, 0, "x"]}, "max_activations", "[4, 0, 'x']", LIMIT),
        ({"transport": 3}, "transport", "3", "an object with some of the keys rail,"),
        ({"simulate": {"links": "x"}}, "simulate.links", "'x'", "a list"),
    ],
)
def test_types_are_strict_and_each_mistake_is_one_line(block, key, value, allowed):
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    head, line = str(caught.value).splitlines()
    assert head.startswith("1 mistake ")
    assert line.startswith(f"  - adaptra.{key}: {value} is not allowed: ") and allowed in line


def test_a_rule_for_two_keys_is_reported_beside_other_mistakes():
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {
                "max_activations": 0,
                "refine_s": -1,
                "detector": {"min_history": 20, "confirm": 0},
                "simulate": {"links": [{"src": 1, "dst": 1, "latency_ms": 1, "from_iteration": 5, "to_iteration": 5}]},
            }
        )
    keys = [line.split(":")[0].removeprefix("  - adaptra.") for line in str(caught.value).splitlines()[1:]]
    assert keys == [
        "max_activations",
        "refine_s",
        "detector.min_history",
        "detector.confirm",
        "simulate.links.0.dst",
        "simulate.links.0.to_iteration",
    ]


def test_whole_numbers_stand_for_fractions_and_lists_for_tuples():
    link = {"src": 0, "dst": 1, "latency_ms": 5}
    config = parse_config({"refine_s": 0, "max_activations": [4, 3], "simulate": {"links": [link]}})
    assert config.refine_s == 0.0 and config.max_activations == (4, 3)
    assert config.simulate.links[0].latency_ms == 5.0
    assert parse_config({"max_activations": (4, 3)}).max_activations == (4, 3)
    assert parse_config({"detector": {"window": 8, "min_history": 8}}).detector.min_history == 8


def test_a_block_that_is_no_object():
    with pytest.raises(ConfigError, match="must be an object"):
        parse_config([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path):
    assert parse_config(json.loads(path.read_text())["adaptra"]).enabled


def test_every_field_has_a_description():
    def check(model):
        for name, field in model.model_fields.items():
            nested = field.annotation if isinstance(field.annotation, type) else None
            if nested is not None and hasattr(nested, "model_fields"):
                check(nested)
            else:
                assert field.description, f"{model.__name__}.{name} has no docstring"

    check(AdaptraConfig)


def fault(**values):
    return {"simulate": {"faults": [{"src": 0, "dst": 1, **values}]}}


@pytest.mark.parametrize(
    "block",
    [
        fault(kind="latency", ms=3),
        fault(kind="jitter", ms=0.5, rail="tcp", from_iteration=3, to_iteration=5),
        fault(kind="bandwidth", mb_per_s=100, rail="rdma0"),
        fault(kind="stall", rail="tcp1", from_s=1, to_s=2),
        fault(kind="corruption", rate=0.01, part="header", seed=7),
        fault(kind="corruption", rate=1),
        fault(kind="corruption", rate=0.01),
        fault(kind="death", rail="shm", from_s=2, to_s=2.5),
        fault(kind="death", rate=0.001),
    ],
)
def test_every_kind_of_fault_can_be_configured(block):
    (found,) = parse_config(block).simulate.faults
    assert found.kind == block["simulate"]["faults"][0]["kind"]


@pytest.mark.parametrize(
    ("block", "key", "says"),
    [
        (fault(kind="los", rate=0.1), "kind", "'los' is not allowed: input should be 'latency', 'jitter'"),
        (fault(kind="loss", rate=0.1), "kind", "'loss' is not allowed: no rail does that"),
        (
            fault(kind="duplication", rate=0.1),
            "kind",
            "come once and in order until it stalls ('stall') or fails ('death')",
        ),
        (fault(kind="reordering", rate=0.1, ms=3), "kind", "'reordering' is not allowed: no rail does that"),
        (fault(kind="corruption"), "rate", "None is not allowed: a fault of kind 'corruption' needs it"),
        (fault(kind="corruption", rate=0), "rate", "greater than 0"),
        (fault(kind="corruption", rate=1.5), "rate", "less than or equal to 1"),
        (fault(kind="death", rate=0.1, ms=3), "ms", "3 is not allowed: a fault of kind 'death' has rate instead"),
        (fault(kind="stall", ms=3), "ms", "3 is not allowed: a fault of kind 'stall' has none instead"),
        (fault(kind="latency"), "ms", "a fault of kind 'latency' needs it"),
        (fault(kind="bandwidth", mb_per_s=0), "mb_per_s", "greater than 0"),
        (fault(kind="jitter"), "ms", "a fault of kind 'jitter' needs it"),
        (fault(kind="corruption", rate=0.1, part="tail"), "part", "'body' or 'header'"),
        (fault(kind="death", part="body"), "part", "a fault of kind 'death' has rate instead"),
        (fault(kind="death", rail="tcp-1"), "rail", "pattern"),
        (fault(kind="death", dst=0), "dst", "two different stages"),
        (fault(kind="death", from_s=2, to_s=2), "to_s", "greater than from_s (2)"),
        (fault(kind="death", from_iteration=4, to_iteration=4), "to_iteration", "greater than from_iteration (4)"),
        (fault(kind="death", rtae=1), "rtae", "unknown key"),
    ],
)
def test_a_mistake_in_a_fault_is_one_line(block, key, says):
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(f"  - adaptra.simulate.faults.0.{key}: ") and says in line
