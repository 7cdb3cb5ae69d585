"""Behaviour of the detector on whole pipelines."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptra_plugin.config import DetectorConfig
from adaptra_plugin.detect import Detector, Finding
from tests.detect.pipeline import Pipeline, Watch, findings, short

SEEDS = st.integers(0, 2**31)


def test_a_link_that_turns_slow_and_heals() -> None:
    found = findings(60, extra=lambda link, i: 30.0 if link == 2 and 20 <= i < 40 else 0.0)
    assert list(short(found)) == [("link", "2-3", "slow", 20, 21), ("link", "2-3", "healed", 40, 42)]
    slow, healed = found
    assert slow.before_ms == pytest.approx(0.5, abs=0.2) and slow.after_ms == pytest.approx(30.5, abs=0.3)
    assert slow.before_ms < slow.threshold_ms < slow.after_ms
    assert [direction[:2] for direction in slow.directions] == [(2, 3), (3, 2)]
    assert healed.before_ms == pytest.approx(30.5, abs=0.3) and healed.after_ms < healed.threshold_ms < 30


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, stages=st.integers(2, 9), data=st.data())
def test_names_the_right_links_in_time_and_no_others(seed: int, stages: int, data: st.DataObject) -> None:
    sick = data.draw(st.sets(st.integers(0, stages - 2), min_size=1))
    onset = data.draw(st.integers(6, 40))
    end = onset + data.draw(st.integers(4, 30))
    delay = data.draw(st.floats(8.0, 200.0))
    only = data.draw(st.sampled_from([-1, 0, 1]))
    found = findings(
        end + 6,
        stages=stages,
        seed=seed,
        only=only,
        extra=lambda link, i: delay if link in sick and onset <= i < end else 0.0,
    )
    names = sorted(f"{link}-{link + 1}" for link in sick)
    slow = [finding for finding in found if finding.state == "slow"]
    healed = [finding for finding in found if finding.state == "healed"]
    assert sorted(finding.name for finding in slow) == names
    assert {(finding.since_iteration, finding.found_iteration) for finding in slow} == {(onset, onset + 1)}
    assert sorted(finding.name for finding in healed) == names
    assert {(finding.since_iteration, finding.found_iteration) for finding in healed} == {(end, end + 2)}


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, stages=st.integers(2, 9), outlier=st.floats(0.0, 1e4), where=st.integers(0, 79), data=st.data())
def test_noise_and_a_single_outlier_are_not_blamed(
    seed: int, stages: int, outlier: float, where: int, data: st.DataObject
) -> None:
    hit = data.draw(st.sets(st.integers(0, stages - 2)))
    microbatches = data.draw(st.lists(st.integers(1, 64), min_size=80, max_size=80))
    found = findings(
        80,
        stages=stages,
        seed=seed,
        noise_ms=0.3,
        noise_compute=0.05,
        extra=lambda link, i: outlier if i == where and link in hit else 0.0,
        factor=lambda stage, i: 1 + outlier if i == where and stage == 0 else 1.0,
        microbatches=lambda i: microbatches[i],
    )
    assert found == []


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, stages=st.integers(2, 9), data=st.data())
def test_names_the_right_stage_and_no_other(seed: int, stages: int, data: st.DataObject) -> None:
    sick = data.draw(st.integers(0, stages - 1))
    onset, ratio = data.draw(st.integers(8, 40)), data.draw(st.floats(1.6, 10.0))
    found = findings(
        onset + 40, stages=stages, seed=seed, factor=lambda s, i: ratio if s == sick and onset <= i < onset + 20 else 1
    )
    assert list(short(found)) == [
        ("stage", str(sick), "slow", onset, onset + 1),
        ("stage", str(sick), "healed", onset + 20, onset + 22),
    ]


def test_one_slow_direction_is_enough_and_is_told_apart() -> None:
    (found,) = findings(40, only=-1, extra=lambda link, i: 30.0 if link == 1 and i >= 20 else 0.0)
    delays = {(src, dst): delay for src, dst, delay in found.directions}
    assert found.name == "1-2" and delays[2, 1] > 30 and delays[1, 2] < 1 and found.after_ms == delays[2, 1]


def test_a_link_slow_from_the_start_is_compared_with_the_others() -> None:
    found = findings(60, extra=lambda link, i: 30.0 if link == 0 and i < 30 else 0.0)
    assert list(short(found)) == [("link", "0-1", "slow", 3, 5), ("link", "0-1", "healed", 30, 32)]
    assert found[0].before_ms == pytest.approx(0.5, abs=0.3)  # what the other links take


def test_two_of_three_links_slow_from_the_start() -> None:
    found = findings(20, extra=lambda link, i: 30.0 if link != 1 else 0.0)
    assert [(finding.name, finding.state) for finding in found] == [("0-1", "slow"), ("2-3", "slow")]


def test_a_link_slow_before_its_history_was_complete() -> None:
    found = findings(20, extra=lambda link, i: 30.0 if link == 2 and i >= 4 else 0.0)
    assert list(short(found)) == [("link", "2-3", "slow", 4, 5)]


def test_a_link_healed_from_the_start_can_turn_slow_again() -> None:
    config = DetectorConfig(window=8)
    found = findings(80, config, extra=lambda link, i: 0.0 if link or 20 <= i < 60 else 30.0)
    assert [(finding.state, finding.since_iteration) for finding in found] == [
        ("slow", 3),
        ("healed", 20),
        ("slow", 60),
    ]


def test_with_two_links_a_constant_difference_is_not_judged() -> None:
    assert findings(40, stages=3, extra=lambda link, i: 30.0 * link) == []


def test_a_much_larger_or_smaller_delay_is_reported_again() -> None:
    levels = {0: 0.0, 20: 30.0, 40: 60.0, 60: 65.0, 80: 20.0, 100: 0.0}
    found = findings(
        120, noise_ms=0.0, extra=lambda link, i: levels[max(k for k in levels if k <= i)] if link == 1 else 0.0
    )
    assert [(finding.state, finding.since_iteration, round(finding.after_ms)) for finding in found] == [
        ("slow", 20, 30),
        ("slow", 40, 60),  # 65 ms at iteration 60 is no news
        ("slow", 80, 20),
        ("healed", 100, 0),
    ]
    assert round(found[1].before_ms) == 30


def test_the_level_is_taken_after_a_first_iteration_that_was_half_slow() -> None:
    (found,) = findings(40, noise_ms=0.0, extra=lambda link, i: (0.0, 10.0, 30.0)[(i >= 20) + (i > 20)] * (link == 1))
    assert (found.since_iteration, round(found.after_ms, 1)) == (20, 30.4)


@pytest.mark.parametrize("seed", range(12))
def test_very_noisy_slowness_settles(seed: int) -> None:
    """N(30, 10) ms from one iteration to the next, as in the published experiments: the level is a guess from the
    first samples, which may be corrected, but not again and again."""
    noise = Pipeline(seed=seed).random
    found = findings(400, seed=seed, extra=lambda link, i: max(8, noise.gauss(30, 10)) if link == 2 and i >= 20 else 0)
    assert {(finding.name, finding.state) for finding in found} == {("2-3", "slow")}
    assert len(found) <= 4 and 20 < found[-1].after_ms < 42


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_noisy_slowness_is_one_event(seed: int) -> None:
    """N(30, 4) ms around its level, as after the median over many messages, cut where the level would change."""
    noise = Pipeline(seed=seed).random

    def extra(link: int, i: int) -> float:
        return min(36.0, max(25.0, noise.gauss(30, 4))) if link == 2 and i >= 20 else 0.0

    found = findings(200, seed=seed, extra=extra)
    assert [(finding.name, finding.state) for finding in found] == [("2-3", "slow")]


def test_a_slow_link_whose_delay_creeps_is_reported_again() -> None:
    found = findings(140, extra=lambda link, i: 30.0 + 0.5 * (i - 20) if link == 2 and i >= 20 else 0.0)
    assert [finding.state for finding in found] == ["slow"] * 3
    assert [round(finding.after_ms / finding.before_ms, 1) for finding in found[1:]] == [1.5, 1.5]


def test_flapping_ends_in_a_steady_state() -> None:
    found = findings(600, extra=lambda link, i: 30.0 if link == 2 and i >= 10 and (i // 6) % 2 else 0.0)
    assert len(found) <= 7  # 50 phases would otherwise be 100 findings
    assert found[-1].state == "slow" and found[-1].found_iteration < 120


def test_flapping_is_forgiven_after_a_long_healthy_time() -> None:
    def extra(link: int, i: int) -> float:
        flapping = 20 <= i < 60 and i % 10 < 5
        return 30.0 if link == 2 and (flapping or 300 <= i < 320) else 0.0

    last = findings(340, extra=extra)[-2:]
    assert [(finding.state, finding.found_iteration) for finding in last] == [("slow", 301), ("healed", 322)]


def test_a_slow_drift_is_followed_and_a_jump_after_it_is_found() -> None:
    found = findings(
        420,
        noise_ms=0.05,
        extra=lambda link, i: 0.02 * i + (20.0 if link == 1 and i >= 400 else 0.0),
        factor=lambda stage, i: 1 + 0.002 * i if stage == 2 else 1.0,
    )
    assert list(short(found)) == [("link", "1-2", "slow", 400, 401)]
    assert found[0].before_ms == pytest.approx(8.3, abs=0.6)


@pytest.mark.parametrize("seed", range(8))
def test_a_link_that_often_spikes_is_noisy_not_slow(seed: int) -> None:
    """One iteration in eight is 6 ms late; two in a row come by chance, and are not worth a plan each time."""
    noise = Pipeline(seed=seed).random
    regular = set(range(0, 398, 10))  # makes the habit known before chance does

    def extra(link: int, i: int) -> float:
        late = i in regular or (60 < i < 398 and noise.random() < 0.125)
        return (6.0 if link == 1 and late else 0.0) + (30.0 if link == 1 and i >= 400 else 0.0)

    found = findings(440, seed=seed, extra=extra)
    assert list(short(found)) == [("link", "1-2", "slow", 400, 401)]


def test_a_noisy_link_that_stays_at_its_spikes_is_found_later() -> None:
    found = findings(120, extra=lambda link, i: 6.0 if link == 1 and (i % 10 == 0 or i >= 81) else 0.0)
    assert [(finding.name, finding.since_iteration) for finding in found] == [("1-2", 80)]
    assert 83 < found[0].found_iteration < 90


def test_slow_iterations_never_enter_the_baseline() -> None:
    pipeline = Pipeline(extra=lambda link, i: 30.0 if link == 1 and i >= 20 and i % 5 < 4 else 0.0, noise_ms=0.0)
    detector = Detector(DetectorConfig(), 4)
    for finding in pipeline.run(detector, 300):
        before = finding.before_ms if finding.state == "slow" else finding.after_ms
        assert before == pytest.approx(0.4)


@pytest.mark.parametrize("ratio", [2.0, 0.4])
def test_a_changed_workload_is_nobodys_fault(ratio: float) -> None:
    assert findings(80, factor=lambda stage, i: ratio if i >= 30 else 1.0) == []


def test_a_stage_just_above_the_others_in_a_busy_time_is_not_slow() -> None:
    assert findings(80, factor=lambda stage, i: (1.3 if stage == 1 else 1.2) if i >= 30 else 1.0) == []


def test_the_history_is_right_at_once_after_a_changed_workload() -> None:
    config = DetectorConfig(confirm=4)
    (found,) = findings(
        20,
        config,
        noise_compute=0.0,
        factor=lambda stage, i: (2.0 if i >= 6 else 1.0) * (1.5 if stage == 1 and i >= 10 else 1.0),
    )
    assert found.before_ms == pytest.approx(56.0) and found.since_iteration == 10


def test_a_slow_stage_is_found_within_a_changed_workload() -> None:
    found = findings(80, factor=lambda stage, i: (2.0 if i >= 30 else 1.0) * (1.6 if stage == 1 and i >= 34 else 1.0))
    assert list(short(found)) == [("stage", "1", "slow", 34, 35)]


def test_a_stage_that_did_not_get_faster_is_not_slow() -> None:
    assert findings(40, factor=lambda stage, i: 0.5 if i >= 35 and stage else 1.0) == []


def test_clocks_apart_do_not_matter() -> None:
    found = findings(60, base_delay_ms=-40.0, extra=lambda link, i: 30.0 if link == 1 and i >= 20 else 0.0)
    assert list(short(found)) == [("link", "1-2", "slow", 20, 21)]


def test_replicas_are_judged_apart() -> None:
    detector = Detector(DetectorConfig(), 4)
    sick = Pipeline(replica=1, extra=lambda link, i: 30.0 if link == 0 and i >= 20 else 0.0)
    well = Pipeline(replica=0, seed=1)
    found = []
    for i in range(30):
        found += detector.observe(well.reports(i)) + detector.observe(sick.reports(i))
    assert [(finding.replica, finding.name) for finding in found] == [(1, "0-1")]
    assert detector.slow() == found


def test_slow_lists_what_is_slow_now() -> None:
    detector = Detector(DetectorConfig(), 4)
    pipeline = Pipeline(
        extra=lambda link, i: 30.0 if link == 0 and 20 <= i < 30 else 0.0,
        factor=lambda stage, i: 2.0 if stage == 3 and i >= 20 else 1.0,
    )
    pipeline.run(detector, 25)
    assert [finding.name for finding in detector.slow()] == ["0-1", "3"]
    for i in range(25, 40):
        detector.observe(pipeline.reports(i))
    assert [finding.name for finding in detector.slow()] == ["3"]


def test_a_missing_report_is_no_evidence() -> None:
    detector = Detector(DetectorConfig(), 4)
    pipeline = Pipeline(extra=lambda link, i: 30.0 if link == 2 and i >= 20 else 0.0)
    found = []
    for i in range(40):
        reports = pipeline.reports(i)
        found += detector.observe([r for r in reports if not (r.pp_rank >= 2 and 20 <= i < 25)])
    assert list(short(found)) == [("link", "2-3", "slow", 25, 26)]
    assert detector.observe([]) == []


def test_a_stage_that_turns_slow_does_not_heal_a_link() -> None:
    found = findings(
        80,
        extra=lambda link, i: 3.5 if link == 1 and i >= 20 else 0.0,
        factor=lambda stage, i: 30.0 if stage == 0 and i >= 30 else 1.0,
    )
    assert [(finding.name, finding.state) for finding in found] == [("1-2", "slow"), ("0", "slow")]


def test_the_healthy_direction_alone_heals_nothing() -> None:
    detector = Detector(DetectorConfig(), 4)
    pipeline = Pipeline(only=1, extra=lambda link, i: 30.0 if link == 2 and i >= 20 else 0.0)
    for i in range(40):
        detector.observe([report for report in pipeline.reports(i) if report.pp_rank < 3 or i < 30])
    assert [finding.name for finding in detector.slow()] == ["2-3"]


def test_a_silent_link_is_not_judged() -> None:
    detector = Detector(DetectorConfig(), 2)
    pipeline = Pipeline(stages=2, microbatches=lambda i: 0 if i >= 20 else 8, extra=lambda link, i: 99.0 * (i >= 20))
    assert pipeline.run(detector, 40) == []


@settings(max_examples=150, deadline=None)
@given(data=st.data(), stages=st.integers(1, 4), seed=SEEDS)
def test_whatever_is_measured_the_story_is_consistent(data: st.DataObject, stages: int, seed: int) -> None:
    """Levels that come and go, missing reports, silent links: slow comes before healed, and `slow()` agrees."""
    config = DetectorConfig(
        window=data.draw(st.integers(4, 8)), confirm=data.draw(st.integers(1, 3)), heal=data.draw(st.integers(1, 3))
    )
    pieces = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.0, 3.0, 30.0, 90.0, 1e6])), max_size=8)
    delays = [[value for length, value in data.draw(pieces) for _ in range(length)] for _ in range(stages)]
    factors = [[value for length, value in data.draw(pieces) for _ in range(length)] for _ in range(stages)]
    pipeline = Pipeline(
        stages=stages,
        seed=seed,
        only=data.draw(st.sampled_from([-1, 0, 1])),
        extra=lambda link, i: delays[link][i] if i < len(delays[link]) else 0.0,
        factor=lambda stage, i: 1 + factors[stage][i] if i < len(factors[stage]) else 1.0,
        microbatches=lambda i: int(not 11 <= i <= 13),
    )
    watch = Watch(config, stages)
    slow: dict[str, Finding] = {}
    for i in range(60):
        reports = [report for report in pipeline.reports(i) if pipeline.random.random() < 0.95]
        for finding in watch.observe(reports):
            assert finding.since_iteration <= finding.found_iteration <= i  # its latest sample may be older
            if finding.state == "slow":
                known = finding.kind + finding.name in slow
                assert known or finding.after_ms > finding.before_ms
                slow[finding.kind + finding.name] = finding
            else:
                assert finding.after_ms < finding.before_ms or finding.kind == "stage"  # relative to the others
                del slow[finding.kind + finding.name]
        assert {finding.kind + finding.name: finding for finding in watch.detector.slow()} == slow
    profile = watch.profile(8, [None] * stages)
    assert profile is None or len(profile.links) == 2 * (stages - 1)


@pytest.mark.parametrize("change", ["iteration", "replica", "stage", "beyond"])
def test_reports_that_do_not_belong_together_are_refused(change: str) -> None:
    reports = Pipeline().reports(3)
    reports[1] = {
        "iteration": lambda: Pipeline().reports(4)[1],
        "replica": lambda: Pipeline(replica=1).reports(3)[1],
        "stage": lambda: reports[2],
        "beyond": lambda: Pipeline(stages=9).reports(3)[8],
    }[change]()
    with pytest.raises(ValueError, match="reports of"):
        Detector(DetectorConfig(), 4).observe(reports)


def test_a_detector_needs_a_stage() -> None:
    with pytest.raises(ValueError, match="0 stages"):
        Detector(DetectorConfig(), 0)


@pytest.mark.parametrize("seed", range(3))
def test_replay_of_a_published_injection_trace(seed: int) -> None:
    """1,030 iterations, 8 stages, up to three slow links at a time (a trace published with arXiv 2504.19232)."""
    with (Path(__file__).parent / "delay_trace.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if math.isfinite(float(row["delay_ms"]))]
    delays: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        for link in row["slow_links"].split("+"):
            delays.setdefault(int(link.split("_")[0]), []).append((int(row["iteration"]), float(row["delay_ms"])))

    def extra(link: int, i: int) -> float:
        return next((delay for start, delay in reversed(delays.get(link, [])) if start <= i), 0.0)

    expected = sorted(
        (start, f"{link}-{link + 1}", "slow" if delay else "healed")
        for link, changes in delays.items()
        for start, delay in changes
    )
    found = findings(1030, stages=8, forward_ms=9.0, seed=seed, noise_ms=0.3, extra=extra)
    assert sorted((finding.since_iteration, finding.name, finding.state) for finding in found) == expected
    assert max(finding.found_iteration - finding.since_iteration for finding in found) <= 2


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("where", range(3, 9))
@pytest.mark.parametrize("outlier", [0.3, 0.5, 1.8, 2.0, 4.0])
def test_one_odd_iteration_while_history_is_short_is_nobodys_fault(stages: int, where: int, outlier: float) -> None:
    for seed in range(3):
        found = findings(
            40,
            stages=stages,
            seed=seed,
            noise_compute=0.05,
            factor=lambda s, i: outlier if i == where and s == 0 else 1.0,
        )
        assert found == []
