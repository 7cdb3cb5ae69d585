"""The profile handed to the planner."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adaptra_plugin.config import DetectorConfig
from tests.detect.pipeline import Pipeline, Watch

NO_LIMIT = [None] * 4


def estimate(iterations: int, **settings) -> Watch:  # type: ignore[no-untyped-def]
    pipeline = Pipeline(**settings)
    estimator = Watch(DetectorConfig(), pipeline.stages)
    for i in range(iterations):
        estimator.observe(pipeline.reports(i))
    return estimator


def test_none_until_warm() -> None:
    assert estimate(5).profile(8, NO_LIMIT) is None  # 3 iterations of warm-up, 2 of history
    profile = estimate(6).profile(8, [4, 3, None, 1])
    assert profile is not None and profile.microbatches == 8
    assert [stage.max_activations for stage in profile.stages] == [4, 3, None, 1]
    assert estimate(6).profile(8, NO_LIMIT, replica=1) is None


def test_healthy_links_have_their_baseline_and_slow_ones_what_they_take_since() -> None:
    estimator = estimate(24, extra=lambda link, i: 30.0 if link == 2 and i >= 20 else 0.0, only=1)
    profile = estimator.profile(8, NO_LIMIT)
    delays = {(link.src, link.dst): link.latency_ms for link in profile.links}
    assert sorted(delays) == [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]
    assert delays.pop((2, 3)) == pytest.approx(30.5, abs=0.3)
    assert all(0.4 <= delay < 0.8 for delay in delays.values())


def test_a_healed_link_goes_back_to_its_baseline() -> None:
    profile = estimate(40, extra=lambda link, i: 30.0 if link == 2 and 20 <= i < 30 else 0.0).profile(8, NO_LIMIT)
    assert profile.link(2, 3).latency_ms < 0.8


def test_stage_times_change_at_once_when_a_stage_turns_slow_and_when_it_heals() -> None:
    def factor(stage: int, i: int) -> float:
        return 2.0 if stage == 1 and 20 <= i < 30 else 1.0

    slow = estimate(22, factor=factor, noise_compute=0.0).profile(8, NO_LIMIT)
    assert [stage.forward_ms for stage in slow.stages] == [10.0, 20.0, 10.0, 10.0]
    assert slow.stages[1].backward_weight_ms == pytest.approx(16.0)
    healed = estimate(33, factor=factor, noise_compute=0.0).profile(8, NO_LIMIT)
    assert [stage.forward_ms for stage in healed.stages] == [10.0] * 4


def test_an_outlier_does_not_show() -> None:
    def factor(stage: int, i: int) -> float:
        return 50.0 if i == 20 else 1.0

    profile = estimate(21, factor=factor, noise_compute=0.0).profile(8, NO_LIMIT)
    assert [stage.forward_ms for stage in profile.stages] == [10.0] * 4


def test_split_and_whole_backward_are_not_mixed() -> None:
    from dataclasses import replace

    from adaptra_plugin.detect import StageTimes

    pipeline = Pipeline(noise_compute=0.0)
    estimator = Watch(DetectorConfig(), 4)
    for i in range(30):
        reports = pipeline.reports(i)
        if i < 28:
            reports = [replace(report, chunks=(StageTimes(10.0, 18.0, 0.0),)) for report in reports]
        estimator.observe(reports)
    stage = estimator.profile(8, NO_LIMIT).stages[0]
    assert (stage.backward_input_ms, stage.backward_weight_ms) == (10.0, 8.0)


def test_clocks_apart_give_no_negative_delay() -> None:
    profile = estimate(10, base_delay_ms=-40.0).profile(8, NO_LIMIT)
    assert {link.latency_ms for link in profile.links} == {0.0}


def test_one_stage_has_no_links() -> None:
    profile = estimate(10, stages=1).profile(8, [None])
    assert profile.links == () and len(profile.stages) == 1


def test_limits_must_match_the_stages() -> None:
    with pytest.raises(ValueError, match="3 limits of activations for 4 stages"):
        estimate(10).profile(8, [1, 2, 3])


def test_the_package_is_pure() -> None:
    code = "import sys, adaptra_plugin.detect; print([m for m in ('torch', 'deepspeed', 'wandb') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
