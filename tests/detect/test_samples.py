"""Reports on the wire: what fits comes back equal, everything else is refused with a sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptra_plugin.detect import IterationReport, LinkDelay, StageTimes

TIME = st.floats(0, 1e9)
COUNT = st.integers(0, 2**32 - 1)
LARGE = st.integers(0, 2**53 - 1)


@st.composite
def reports(draw: st.DrawFn) -> IterationReport:
    stage = draw(st.integers(1, 1000))
    links = [LinkDelay(stage + step, stage, draw(st.floats(-1e6, 1e6)), draw(COUNT)) for step in (-1, 1)]
    return IterationReport(
        replica=draw(COUNT),
        pp_rank=stage,
        rank=draw(COUNT),
        host=draw(st.text(max_size=60)),
        iteration=draw(LARGE),
        microbatches=draw(st.integers(1, 1 << 20)),
        iteration_ms=draw(TIME),
        plan_version=draw(LARGE),
        chunks=tuple(StageTimes(draw(TIME), draw(TIME), draw(TIME)) for _ in range(draw(st.integers(1, 4)))),
        links=tuple(links[: draw(st.integers(0, 2))]),
        wait_ms=draw(TIME),
        compute_ms=draw(TIME),
    )


VALID = IterationReport(
    *(0, 1, 1, "n1", 5, 8, 100.0, 1, (StageTimes(1.0, 2.0, 3.0),), (LinkDelay(0, 1, -0.5, 8),), 30.0, 60.0)
)


@given(report=reports())
def test_round_trip(report: IterationReport) -> None:
    assert IterationReport.from_bytes(report.to_bytes()) == report


def test_a_report_of_a_rank_with_two_links_has_less_than_200_bytes() -> None:
    links = (LinkDelay(0, 1, 0.5, 8, 1 << 20), LinkDelay(2, 1, 0.5, 8, 1 << 20))
    assert len(replace(VALID, links=links, host="node-0123").to_bytes()) < 200


@given(data=st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    raw = bytearray(VALID.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    try:
        read = IterationReport.from_bytes(bytes(raw[:cut]))
    except ValueError as error:
        assert len(str(error)) < 400
    else:
        assert math.isfinite(read.iteration_ms) and read.microbatches >= 1 and read.to_bytes() == bytes(raw[:cut])


@given(raw=st.binary(max_size=100))
def test_garbage_instead_of_a_report_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="report"):
        IterationReport.from_bytes(raw)


LINK = VALID.links[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iteration": 1 << 60}, r"in iteration 1152921504606846976 of plan v1: .* below 2\*\*53"),
        ({"microbatches": 0}, "report: 0 microbatches"),
        ({"iteration_ms": float("nan")}, "report.iteration_ms, wait_ms, compute_ms: nan is not a number of ms"),
        ({"wait_ms": -1.0}, "report.iteration_ms, wait_ms, compute_ms: -1.0"),
        (
            {"chunks": (StageTimes(-2.0, 0.0, 0.0),)},
            r"report.chunks\[0\]: -2.0 is not a number of ms between 0 and 1e\+09",
        ),
        ({"chunks": ()}, "report: 0 chunks and 1 links"),
        ({"links": (replace(LINK, delay_ms=float("inf")),)}, r"report.links\[0\].delay_ms: inf"),
        (
            {"links": (replace(LINK, message_bytes=1e16),)},
            r"report.links\[0\].message_bytes: 1e\+16 is not a number of bytes",
        ),
        ({"links": (replace(LINK, dst=3),)}, "0 -> 3 is not a link into stage 1"),
        ({"links": (LINK,) * 65}, "and 65 links: .* at most 64"),
    ],
)
def test_refusals_name_the_field_and_the_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IterationReport.from_bytes(replace(VALID, **change).to_bytes())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "report: 0 bytes that start with nothing"),
        (b"\2" + VALID.to_bytes()[1:], "start with 02: no report"),
        (VALID.to_bytes()[:-1], "report: 113 bytes, 114 are announced"),
        (VALID.to_bytes()[:-1] + b"\xff", r"report.host: b'n\\xff' is not UTF-8"),
    ],
)
def test_bytes_that_are_no_report(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IterationReport.from_bytes(raw)


@pytest.mark.parametrize("change", [{"host": "x" * 300}, {"rank": -1}, {"replica": 1 << 40}, {"links": (LINK,) * 300}])
def test_what_has_no_form_on_the_wire_is_refused_where_it_is_made(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="report"):
        replace(VALID, **change).to_bytes()


def test_a_host_whose_name_is_not_utf8_is_sent_all_the_same() -> None:
    assert IterationReport.from_bytes(replace(VALID, host="n\udcff").to_bytes()).host == "n\\udcff"


def test_bubble_is_what_was_not_compute() -> None:
    assert VALID.bubble_ms == pytest.approx(40.0)
    assert replace(VALID, compute_ms=0.0).bubble_ms == 30.0
