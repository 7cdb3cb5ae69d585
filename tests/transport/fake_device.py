"""A device that is made up of threads: its copies wait for what computes them, and nobody waits for the copies."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from adaptra_plugin.transport import Channel, Endpoint
from tests.transport.support import config, connect_line, endpoint, everywhere

SLOW_S = 0.3
THERE = torch.device("cpu", 1)
"""What the made-up device is called; its tensors are in host memory all the same."""


class Stream:
    """Runs what it is given, one after the other, on a thread of its own."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def run(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def mark(self) -> Mark:
        mark = Mark()
        self.run(mark.set)
        return mark

    def end(self) -> None:
        self._work.put(None)
        self._thread.join(20)
        assert not self._thread.is_alive()


class Mark(threading.Event):
    """An event that fails instead of hanging."""

    def synchronize(self) -> None:
        assert self.wait(20)


class FakeDevice:
    def __init__(self, pins: bool = True) -> None:
        self.compute, self.side, self.up = Stream(), Stream(), Stream()
        self.pins = pins
        self.pinned_rings: list[int] = []
        self.owned: set[int] = set()
        self.copies = 0
        self.broken = ""
        self.uploads = self.uploads_fail = 0
        self.upload_s = SLOW_S
        self.before_copy: Callable[[int], object] = lambda number: None
        """Runs on the device before each copy from it (1, 2, ...)."""

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Puts a tensor on the device."""
        self.owned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.owned

    def serves(self, device: torch.device) -> bool:
        return device == THERE

    def mark(self, tensor: torch.Tensor) -> Mark:
        return self.compute.mark()

    def follow(self, event: Mark, tensors: list[torch.Tensor]) -> None:
        self.side.run(event.synchronize)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Mark:
        if self.broken:
            raise RuntimeError(self.broken)
        self.copies += 1
        number = self.copies
        self.side.run(lambda: self.before_copy(number))
        self.side.run(lambda: target.copy_(source))
        return self.side.mark()

    def pin(self, memory: torch.Tensor) -> bool:
        if self.pins:
            self.pinned_rings.append(memory.data_ptr())
        return self.pins

    def unpin(self, memory: torch.Tensor) -> None:
        self.pinned_rings.remove(memory.data_ptr())

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def here(self, device: torch.device) -> torch.device:
        return device

    def like(self, tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in tensors)

    def upload(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> Mark:
        if self.uploads_fail:
            self.uploads_fail -= 1
            raise RuntimeError("out of memory")

        def work() -> None:
            time.sleep(self.upload_s)
            for target, source in pairs:
                target.copy_(source)

        self.uploads += 1
        self.up.run(work)
        return self.up.mark()

    def join(self, event: Mark, tensors: tuple[torch.Tensor, ...]) -> None:
        self.compute.run(event.synchronize)

    def end(self) -> None:
        self.compute.end()
        self.side.end()
        self.up.end()


@contextlib.contextmanager
def pair(device: FakeDevice, **changes) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Both ends of one link; rank 0 computes on the device, and so does rank 1."""
    settings = config(**{"segment_kib": 64, **changes})
    ends = [endpoint(rank, settings, device=device) for rank in range(2)]
    try:
        for error in connect_line(ends):
            if error is not None:
                raise error
        yield ends[0], ends[1]
    finally:
        everywhere(*(end.close for end in ends))
    assert device.pinned_rings == []


def channels(ends: tuple[Endpoint, Endpoint]) -> tuple[Channel, Channel]:
    return ends[0].channel(1), ends[1].channel(0)


def late(tensor: torch.Tensor, value: float, seconds: float = SLOW_S) -> Callable[[], None]:
    """A kernel: takes its time, then writes. Not a change in place as far as the version of the tensor goes."""

    def kernel() -> None:
        time.sleep(seconds)
        tensor.data.fill_(value)

    return kernel


def tensors_of_all_kinds() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(37, 41, generator=generator)
    return [
        rows,
        rows.t()[3:, ::2],
        rows.bfloat16(),
        torch.randint(0, 2, (13,), generator=generator).bool(),
        torch.zeros(0, 4),
        torch.tensor(3.5, dtype=torch.float64),
        torch.randint(0, 255, (200_003,), generator=generator, dtype=torch.uint8),
        torch.complex(rows, -rows).conj(),
    ]
