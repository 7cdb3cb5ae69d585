"""More work everywhere is no straggler, with however many stages; a straggler is found whatever the work does."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptra_plugin.config import DetectorConfig
from adaptra_plugin.detect import Detector
from adaptra_plugin.detect.work import Work
from tests.detect.pipeline import Pipeline, Watch, findings, short

SEEDS = st.integers(0, 2**31)
Lengths = Callable[[int], float]
FIRST, LAST = 64, 256


def ramp(first: int, last: int) -> Lengths:
    return lambda i: FIRST + (LAST - FIRST) * min(1.0, max(0.0, (i - first) / (last - first)))


def steps(every: int) -> Lengths:
    return lambda i: min(LAST, FIRST * (1 + max(0, i - 10) // every))


def at_random(seed: int) -> Lengths:
    drawn = random.Random(seed)
    lengths = [drawn.uniform(FIRST, LAST) for _ in range(400)]
    return lambda i: lengths[i]


GROWTH: dict[str, Lengths] = {
    "slowly": ramp(10, 90),
    "quickly": ramp(10, 30),
    "at once": ramp(20, 21),
    "in steps": steps(6),
    "in large steps": lambda i: FIRST * 2 ** min(2, i // 25),
    "at random": at_random(1),
    "from one of two to the other": lambda i: LAST if i % 2 else FIRST,
    "back and forth": lambda i: LAST if (i // 20) % 2 else FIRST,
}


def costs(length: float, stage: int, stages: int) -> float:
    """Attention grows with the square of the sequence; the last stage has logits besides, which do not: from 64 to 256
    tokens the first ones take 5.5 times as long, the last one 4.75 times."""
    ratio = length / FIRST
    attention = (ratio + ratio**2 / 7) / (1 + 1 / 7)
    return (attention + ratio) / 2 if stage == stages - 1 else attention


def growing(lengths: Lengths, stages: int, slow: Callable[[int, int], float] = lambda stage, i: 1.0):  # type: ignore[no-untyped-def]
    return {"stages": stages, "factor": lambda s, i: costs(lengths(i), s, stages) * slow(s, i)}


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", GROWTH)
def test_work_that_grows_is_nobodys_fault(name: str, stages: int) -> None:
    for seed in range(5):
        assert findings(150, seed=seed, **growing(GROWTH[name], stages)) == []


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, stages=st.integers(2, 9), data=st.data())
def test_any_growth_of_all_stages_alike(seed: int, stages: int, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.tuples(st.integers(1, 30), st.floats(0.2, 8.0)), min_size=1, max_size=12))
    work = [factor for length, factor in pieces for _ in range(length)]
    assert findings(len(work) + 20, stages=stages, seed=seed, factor=lambda s, i: work[min(i, len(work) - 1)]) == []


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("name", GROWTH)
@pytest.mark.parametrize("slow", [0, -1], ids=["first", "last"])
def test_a_straggler_is_found_whatever_the_work_does(name: str, stages: int, slow: int) -> None:
    """Twice as slow as it would be, from iteration 100 to 130: found at once, but for iterations that are so little work
    that it still takes no longer than usual."""
    sick = slow % stages
    for seed in range(3):
        settings = growing(GROWTH[name], stages, lambda s, i: 2.0 if s == sick and 100 <= i < 130 else 1.0)
        found = findings(160, seed=seed, **settings)
        assert [(finding.name, finding.state) for finding in found] == [(str(sick), "slow"), (str(sick), "healed")]
        late = 12 if name in ("at random", "from one of two to the other") else 1
        assert 100 <= found[0].since_iteration <= found[0].found_iteration <= 101 + late
        assert found[0].after_ms / found[0].before_ms == pytest.approx(2.0, rel=0.25)
        assert 130 <= found[1].since_iteration <= found[1].found_iteration <= 134 + late


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("at", [20, 25, 40])
def test_a_straggler_in_the_middle_of_growth(stages: int, at: int) -> None:
    found = findings(90, **growing(ramp(10, 60), stages, lambda s, i: 2.0 if s == 0 and i >= at else 1.0))
    assert [(finding.name, finding.state) for finding in found] == [("0", "slow")]
    assert found[0].since_iteration == at and found[0].found_iteration == at + 1


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_straggler_that_comes_with_the_growth_itself(stages: int) -> None:
    found = findings(60, **growing(ramp(29, 30), stages, lambda s, i: 2.0 if s == 0 and i >= 30 else 1.0))
    assert list(short(found)) == [("stage", "0", "slow", 30, 31)]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("growth", [ramp(20, 21), ramp(20, 30), steps(5)], ids=["at once", "in ten", "in steps"])
def test_one_stage_alone_that_takes_longer_is_slow(stages: int, growth: Lengths) -> None:
    found = findings(80, stages=stages, factor=lambda s, i: growth(i) / FIRST if s == 1 else 1.0)
    assert found and {finding.name for finding in found} == {"1"}
    assert found[-1].state == "slow" and found[-1].after_ms > 2.5 * 28.0, "the last step is less than half of the rest"


@pytest.mark.parametrize("stages", [2, 4])
def test_one_stage_after_the_other(stages: int) -> None:
    def slow(stage: int, i: int) -> float:
        return 2.0 if (stage == 0 and 20 <= i < 60) or (stage == 1 and 40 <= i < 80) else 1.0

    found = findings(100, stages=stages, factor=slow)
    assert list(short(found)) == [
        ("stage", "0", "slow", 20, 21),
        ("stage", "1", "slow", 40, 41),
        ("stage", "0", "healed", 60, 62),
        ("stage", "1", "healed", 80, 82),
    ]


def test_work_that_grows_while_a_stage_is_slow_neither_heals_it_nor_blames_the_other() -> None:
    found = findings(120, **growing(ramp(40, 60), 2, lambda s, i: 2.0 if s == 0 and 20 <= i < 90 else 1.0))
    assert list(short(found)) == [("stage", "0", "slow", 20, 21), ("stage", "0", "healed", 90, 92)]


def test_times_of_a_finding_are_those_of_the_work_of_its_iteration() -> None:
    config = DetectorConfig(confirm=4)
    factor = growing(ramp(10, 20), 2, lambda s, i: 1.8 if s == 1 and i >= 40 else 1.0)
    (found,) = findings(60, config, noise_compute=0.0, **factor)
    healthy = 28.0 * costs(LAST, 1, 2)
    assert found.before_ms == pytest.approx(healthy) and found.after_ms == pytest.approx(1.8 * healthy)
    assert found.before_ms < found.threshold_ms < found.after_ms


@pytest.mark.parametrize("stages", [2, 4])
def test_the_profile_follows(stages: int) -> None:
    pipeline = Pipeline(noise_compute=0.0, **growing(ramp(20, 40), stages))
    estimator = Watch(DetectorConfig(), stages)
    for i in range(60):
        estimator.observe(pipeline.reports(i))
    profile = estimator.profile(8, [None] * stages)
    assert profile is not None
    assert [stage.forward_ms for stage in profile.stages] == pytest.approx(
        [10.0 * costs(LAST, stage, stages) for stage in range(stages)]
    )


def carried(lengths: Lengths, ms: float, late: Callable[[int], float] = lambda i: 0.0):  # type: ignore[no-untyped-def]
    """Links that take `ms` for the shortest messages, and in proportion for longer ones."""
    return {
        "base_delay_ms": 0.0,
        "extra": lambda link, i: ms * lengths(i) / FIRST + (late(i) if link == 0 else 0.0),
        "message_bytes": lambda i: 4096.0 * lengths(i),
    }


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("name", GROWTH)
def test_longer_messages_take_longer_and_no_link_is_to_blame(name: str, stages: int) -> None:
    for ms in (1.0, 6.0, 40.0):
        assert findings(150, stages=stages, **carried(GROWTH[name], ms)) == []


@pytest.mark.parametrize("offset", [-60.0, 60.0])
def test_nor_where_clocks_differ(offset: float) -> None:
    """One direction seems to take 60 ms less than it does, the other one 60 ms more."""
    detector = Detector(DetectorConfig(), 2)
    pipeline = Pipeline(stages=2, **carried(ramp(20, 21), 6.0))
    found = []
    for i in range(60):
        reports = pipeline.reports(i)
        for report in reports:
            for link in report.links:
                object.__setattr__(link, "delay_ms", link.delay_ms + (offset if link.src == 0 else -offset))
        found += detector.observe(reports)
    assert found == []


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("at", [20, 50])
def test_a_link_that_is_slow_beyond_its_messages_is_found(stages: int, at: int) -> None:
    growth = ramp(20, 21)
    found = findings(80, stages=stages, **carried(growth, 6.0, lambda i: 30.0 if at <= i < 70 else 0.0))
    assert list(short(found)) == [("link", "0-1", "slow", at, at + 1), ("link", "0-1", "healed", 70, 72)]


def test_a_link_heals_though_its_messages_have_grown_meanwhile() -> None:
    found = findings(90, stages=2, **carried(ramp(40, 41), 6.0, lambda i: 60.0 if 20 <= i < 70 else 0.0))
    assert [(finding.state, finding.since_iteration) for finding in found] == [("slow", 20), ("healed", 70)]


def test_without_sizes_longer_delays_count() -> None:
    found = findings(40, stages=2, base_delay_ms=0.0, extra=lambda link, i: 6.0 * ramp(20, 21)(i) / FIRST)
    assert [(finding.name, finding.state) for finding in found] == [("0-1", "slow")]


def said(work: Work, *readings: list[float]) -> float:
    return work.of(dict(enumerate(readings)))[0]


@pytest.mark.parametrize(
    ("ratios", "work"),
    [
        ([], 1.0),
        ([3.0], 3.0),
        ([4.0, 4.0], 4.0),
        ([4.0, 4.84], 4.4),
        ([1.0, 4.0], 1.0),
        ([0.25, 1.0], 0.25),
        ([1.0, 2.0, 2.0], 2.0),
        ([1.0, 1.0, 2.0, 2.0], 1.0),
        ([1.0, 1.0, 5.0], 1.0),
    ],
)
def test_what_stages_say_of_the_work(ratios: list[float], work: float) -> None:
    assert said(Work(16, 1.25), *([ratio] for ratio in ratios)) == pytest.approx(work)


def test_a_slow_stage_has_two_readings_and_the_likelier_counts() -> None:
    steady, varying = Work(16, 1.25), Work(16, 1.25)
    for i in range(8):
        steady.add(1.0)
        varying.add(4.7 if i % 2 else 1.0)
    assert said(steady, [2.0, 1.0], [1.0]) == 1.0, "as slow as it was"
    assert said(steady, [1.0, 0.5], [1.0]) == 1.0, "healed"
    assert said(steady, [2.0, 1.0], [2.0]) == 1.0, "as slow as it was, and the other one too"
    assert said(steady, [8.0, 4.0], [4.0]) == 4.0, "more work"
    assert said(varying, [4.7, 2.35], [4.7]) == pytest.approx(4.7), "healed"
    assert said(varying, [9.4, 4.7], [4.7]) == pytest.approx(4.7), "as slow as it was"


def test_a_step_of_the_work_allows_for_stages_that_grow_unlike_until_it_is_usual() -> None:
    work = Work(4, 1.25)
    for _ in range(4):
        work.add(1.0)
    assert work.slowdown(1.0) == 1.25 and work.slowdown(0.2) == 1.25
    assert work.slowdown(256.0) == pytest.approx(2.5)
    for _ in range(3):
        work.add(256.0)
    assert work.slowdown(256.0) == 1.25
