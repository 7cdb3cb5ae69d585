"""Robust statistics over the last few iterations."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation times this is the standard deviation of normally distributed samples."""


def median(values: Iterable[float]) -> float:
    """Median of at least one value; on the few values of a window this is ten times faster than numpy's.

    Raises:
        ValueError: without any value.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("the median of no values is not defined")
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def low_median(values: Iterable[float]) -> float:
    """Like `median`, but the lower of the two middle values: always a value that occurred."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def low_medians_of_others(values: Mapping[K, float]) -> dict[K, float]:
    """For each of at least two entries, the `low_median` of all the others; sorts only once."""
    order = sorted(values, key=values.__getitem__)
    middle = (len(order) - 2) // 2
    # Without an entry that sorts at or before the middle, the middle of the rest is one further on.
    return {key: values[order[middle + (position <= middle)]] for position, key in enumerate(order)}


class Window:
    """The last `size` values, with median and robust spread (computed once per change: a pipeline has many windows)."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._values: deque[float] = deque(values, maxlen=size)
        self._median: float | None = None
        self._spread: float | None = None

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[float]:
        return iter(self._values)

    def add(self, value: float) -> None:
        self._values.append(value)
        self._median = self._spread = None

    def scale(self, factor: float) -> None:
        """Multiplies the whole history."""
        self._values = deque((value * factor for value in self._values), maxlen=self._values.maxlen)
        self._median = self._spread = None

    @property
    def median(self) -> float:
        """Raises ValueError while the window is empty."""
        if self._median is None:
            self._median = median(self._values)
        return self._median

    @property
    def spread(self) -> float:
        """Robust standard deviation: 1.4826 times the median absolute deviation; 0 below three values."""
        if self._spread is None:
            centre = self.median
            deviations = [abs(value - centre) for value in self._values]
            self._spread = MAD_TO_SIGMA * median(deviations) if len(deviations) > 2 else 0.0
        return self._spread
