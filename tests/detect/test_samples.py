"""Reports on the wire: what fits comes back equal, everything else is refused with a sentence."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptra_plugin.detect import IterationReport, LinkDelay, StageTimes

TIME = st.floats(0, 1e9)
COUNT = st.integers(0, 2**50)


@st.composite
def reports(draw: st.DrawFn) -> IterationReport:
    stage = draw(st.integers(1, 1000))
    links = [LinkDelay(stage + step, stage, draw(st.floats(-1e6, 1e6)), draw(COUNT)) for step in (-1, 1)]
    return IterationReport(
        replica=draw(COUNT),
        pp_rank=stage,
        rank=draw(COUNT),
        host=draw(st.text(max_size=60)),
        iteration=draw(COUNT),
        microbatches=draw(st.integers(1, 1 << 20)),
        iteration_ms=draw(TIME),
        plan_version=draw(COUNT),
        chunks=tuple(StageTimes(draw(TIME), draw(TIME), draw(TIME)) for _ in range(draw(st.integers(1, 4)))),
        links=tuple(links[: draw(st.integers(0, 2))]),
        wait_ms=draw(TIME),
        compute_ms=draw(TIME),
    )


def valid() -> dict[str, Any]:
    times = (StageTimes(1.0, 2.0, 3.0),)
    report = IterationReport(0, 1, 1, "n1", 5, 8, 100.0, 1, times, (LinkDelay(0, 1, -0.5, 8),), 30.0, 60.0)
    return report.to_json()


@given(report=reports())
def test_round_trip(report: IterationReport) -> None:
    assert IterationReport.from_json(json.loads(json.dumps(report.to_json()))) == report


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), value=JSON)
def test_garbage_in_any_field_is_refused_or_harmless(data: st.DataObject, value: Any) -> None:
    report = valid()
    report[data.draw(st.sampled_from(sorted(report)))] = value
    try:
        read = IterationReport.from_json(report)
    except ValueError as error:
        assert len(str(error)) < 400
    else:
        assert math.isfinite(read.iteration_ms) and read.microbatches >= 1


@given(value=JSON)
def test_garbage_instead_of_a_report_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="report"):
        IterationReport.from_json(value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("iteration",), -1, "report.iteration: -1 is not a whole number from 0"),
        (("pp_rank",), True, "report.pp_rank: True"),
        (("microbatches",), 0, "report.microbatches: 0 is not a whole number from 1"),
        (("iteration_ms",), float("nan"), "report.iteration_ms: nan"),
        (("chunks", 0, "forward_ms"), -2.0, r"report.chunks\[0\].forward_ms: -2.0"),
        (("chunks",), [], "report.chunks is empty"),
        (("chunks", 0, "extra"), 1.0, r"report.chunks\[0\] has the unknown extra"),
        (("links", 0, "delay_ms"), float("inf"), r"report.links\[0\].delay_ms: inf"),
        (("links", 0, "dst"), 3, "0 -> 3 is not a link into stage 1"),
        (("links",), [valid()["links"][0]] * 65, "not a list of at most 64 entries"),
        (("host",), "x" * 300, "at most 255 characters"),
    ],
)
def test_refusals_name_the_field_and_the_value(path: tuple[Any, ...], value: Any, message: str) -> None:
    report = valid()
    where: Any = report
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        IterationReport.from_json(report)


def test_a_missing_field_is_named() -> None:
    report = valid()
    del report["links"]
    with pytest.raises(ValueError, match="report misses links"):
        IterationReport.from_json(report)


def test_bubble_is_what_was_not_compute() -> None:
    report = IterationReport.from_json(valid())
    assert report.bubble_ms == pytest.approx(40.0)
    assert IterationReport.from_json({**valid(), "compute_ms": 0.0}).bubble_ms == 30.0
