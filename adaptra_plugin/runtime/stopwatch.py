"""How long the device computes, without waiting for it in the middle of an iteration."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Stopwatch(Protocol):
    """Marks points of an iteration and tells their times afterwards, in ms since `start`."""

    beside_host: bool
    """The device computes while the calling thread goes on."""

    def start(self) -> None: ...

    def mark(self) -> int: ...

    def times_ms(self) -> list[float]: ...


class HostStopwatch:
    """For devices that compute on the calling thread."""

    beside_host = False

    def __init__(self) -> None:
        self._origin = 0.0
        self._marks: list[float] = []

    def start(self) -> None:
        self._origin = time.perf_counter()
        self._marks = []

    def mark(self) -> int:
        self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def times_ms(self) -> list[float]:
        return [(mark - self._origin) * 1e3 for mark in self._marks]


class CudaStopwatch:
    """For CUDA: events on the current stream. `times_ms` waits for the last of them, at the end of the iteration."""

    beside_host = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[Any] = []

    def start(self) -> None:
        self._events = [self._record()]

    def mark(self) -> int:
        self._events.append(self._record())
        return len(self._events) - 2

    def times_ms(self) -> list[float]:
        first, *marks = self._events
        if marks:
            marks[-1].synchronize()
        return [first.elapsed_time(mark) for mark in marks]

    def _record(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def stopwatch_for(device: torch.device) -> Stopwatch:
    return CudaStopwatch(device) if device.type == "cuda" else HostStopwatch()
