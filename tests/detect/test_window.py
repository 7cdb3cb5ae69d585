"""Robust statistics against their definitions."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptra_plugin.detect.window import Window, low_median, low_medians_of_others, median

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(values=NUMBERS)
def test_medians(values: list[float]) -> None:
    assert median(values) == pytest.approx(float(np.median(values)))
    assert low_median(values) == statistics.median_low(values)


@given(values=st.dictionaries(st.integers(), st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=2, max_size=12))
def test_low_medians_of_others(values: dict[int, float]) -> None:
    expected = {key: low_median(v for other, v in values.items() if other != key) for key in values}
    assert low_medians_of_others(values) == expected


def test_no_values_have_no_median() -> None:
    with pytest.raises(ValueError, match="not defined"):
        median([])


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=40), size=st.integers(3, 16))
def test_window(values: list[float], size: int) -> None:
    window = Window(size)
    for value in values:
        window.add(value)
    kept = np.array(values[-size:])
    assert list(window) == kept.tolist()
    assert window.spread == pytest.approx(1.4826 * float(np.median(np.abs(kept - np.median(kept)))))
    window.scale(2.0)
    assert window.median == pytest.approx(2 * float(np.median(kept)))


def test_spread_of_two_values_is_unknown() -> None:
    assert Window(8, [0.0, 100.0]).spread == 0.0
