"""Every field of DetectorConfig, at its boundary. Measurements here have no noise but what a test adds."""

from __future__ import annotations

import pytest

from adaptra_plugin.config import DetectorConfig
from adaptra_plugin.detect import Finding
from tests.detect.pipeline import findings, short


def link_one(extra: float, config: DetectorConfig, *, onset: int = 20, jitter: float = 0.0, iterations: int = 40, **kw):  # type: ignore[no-untyped-def]
    """Findings for link 1-2 slower by `extra` ms from `onset` on; healthy samples alternate by +- `jitter`."""

    def delay(link: int, i: int) -> float:
        if link == 1 and i >= onset:
            return extra + 1.0
        return 1.0 + jitter * (-1) ** i

    return findings(iterations, config, noise_ms=0.0, noise_compute=0.0, base_delay_ms=0.0, extra=delay, **kw)


@pytest.mark.parametrize(("extra", "found"), [(2.9, False), (3.1, True)])
def test_min_delay_ms(extra: float, found: bool) -> None:
    assert bool(link_one(extra, DetectorConfig(min_delay_ms=3.0, min_delay_fraction=0.0))) is found


@pytest.mark.parametrize(("extra", "found"), [(4.9, False), (5.1, True)])
def test_min_delay_fraction_of_the_mean_forward_time(extra: float, found: bool) -> None:
    config = DetectorConfig(min_delay_ms=0.0, min_delay_fraction=0.5)
    # stages of 5, 5, 15 and 15 ms: 10 ms in the mean
    assert bool(link_one(extra, config, factor=lambda stage, i: 0.5 if stage < 2 else 1.5)) is found


@pytest.mark.parametrize(("extra", "found"), [(8.8, False), (9.0, True)])
def test_spread_factor(extra: float, found: bool) -> None:
    # 1 ms of jitter either way: MAD 1 ms, robust standard deviation 1.4826 ms, six of them 8.9 ms
    config = DetectorConfig(min_delay_ms=0.0, min_delay_fraction=0.0)
    assert bool(link_one(extra, config, jitter=1.0)) is found


@pytest.mark.parametrize(("ratio", "found"), [(1.24, False), (1.26, True)])
def test_min_slowdown(ratio: float, found: bool) -> None:
    got = findings(
        40, noise_ms=0.0, noise_compute=0.0, factor=lambda stage, i: ratio if stage == 1 and i >= 20 else 1.0
    )
    assert bool(got) is found


@pytest.mark.parametrize("confirm", [1, 2, 5])
def test_confirm(confirm: int) -> None:
    config = DetectorConfig(confirm=confirm)
    assert list(short(link_one(30.0, config))) == [("link", "1-2", "slow", 20, 20 + confirm - 1)]
    almost = findings(60, config, extra=lambda link, i: 30.0 if link == 1 and 20 <= i < 20 + confirm - 1 else 0.0)
    assert almost == []


def _heal(config: DetectorConfig, rest: float, good: int) -> list[Finding]:
    """30 ms from iteration 20 on; `rest` ms for `good` iterations from 30 on, then 30 ms again."""

    def extra(link: int, i: int) -> float:
        if link != 1 or i < 20:
            return 0.0
        return rest if 30 <= i < 30 + good else 30.0

    return findings(60, config, noise_ms=0.0, noise_compute=0.0, extra=extra)


@pytest.mark.parametrize("heal", [1, 3, 6])
def test_heal(heal: int) -> None:
    config = DetectorConfig(heal=heal)
    assert list(short(_heal(config, 0.0, heal)))[1] == ("link", "1-2", "healed", 30, 30 + heal - 1)
    assert [finding.state for finding in _heal(config, 0.0, heal - 1)] == ["slow"]


@pytest.mark.parametrize(("rest", "healed"), [(1.9, True), (2.1, False)])
def test_release(rest: float, healed: bool) -> None:
    config = DetectorConfig(min_delay_ms=4.0, release=0.5)
    assert ("healed" in [finding.state for finding in _heal(config, rest, 10)]) is healed


def test_warmup_and_min_history() -> None:
    config = DetectorConfig(warmup_iterations=5, min_history=4)
    # a wild warm-up is not seen; with 4 samples of history, iteration 9 is the first that may be judged
    found = findings(
        30, config, stages=3, extra=lambda link, i: 500.0 if i < 5 or (link == 1 and i >= 9) else 0.0, noise_ms=0.0
    )
    assert list(short(found)) == [("link", "1-2", "slow", 9, 10)]
    assert found[0].before_ms == pytest.approx(0.4)


def test_window_sets_how_fast_the_baseline_follows() -> None:
    def step(i: int) -> float:  # a harmless step, then a jump
        return (1.5 if i >= 40 else 0.0) + (30.0 if i >= 48 else 0.0)

    for window, before in ((4, 1.9), (64, 0.4)):
        config = DetectorConfig(window=window, min_delay_ms=2.0, min_delay_fraction=0.0)
        (found,) = findings(60, config, noise_ms=0.0, extra=lambda link, i: step(i) if link == 1 else 0.0)
        assert found.before_ms == pytest.approx(before)
