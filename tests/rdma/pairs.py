"""Both ends of a queue pair in one process: enough to look at every step without a second one."""

from __future__ import annotations

import contextlib
import mmap
import random
import select
import time
from collections.abc import Iterator

from adaptra_plugin.transport.proxy.rails.rdma.verbs import Completion, Completions, Device, Gid, QueuePair, Region
from tests.rdma import wires

MIB = 1 << 20
PATIENCE_S = 20.0


def noise(nbytes: int, seed: int = 0) -> bytes:
    """Bytes of which no two pieces are alike."""
    return random.Random(seed).randbytes(nbytes)


class End:
    """One side of a wire: an open device, `nbytes` of registered memory, a queue pair."""

    def __init__(self, side: str, wire: int = 0, nbytes: int = MIB, depth: int = 64) -> None:
        self.address = wires.address(side, wire)
        self.device = Device(wires.device(side, wire))
        self.port = self.device.port()
        self.gid: Gid = self.port.gid(self.address)
        self.memory = memoryview(mmap.mmap(-1, nbytes))
        self.region: Region = self.device.register(self.memory, remote_write=True)
        self.completions: Completions = self.device.completions(2 * depth)
        self.pair: QueuePair = self.new_pair(depth)

    def new_pair(self, depth: int = 64) -> QueuePair:
        self.pair = self.device.queue_pair(self.completions, depth, depth)
        return self.pair

    def join(self, other: End, timeout_exponent: int = 14, retries: int = 3) -> None:
        self.pair.connect(
            self.gid, other.pair.number, other.pair.psn, other.gid.raw, other.port.lid,
            min(self.port.mtu, other.port.mtu), timeout_exponent=timeout_exponent, retries=retries,
        )  # fmt: skip

    def wait(self, count: int = 1) -> list[Completion]:
        """The next completions, in order; sleeps on the descriptor meanwhile."""
        found: list[Completion] = []
        until = time.monotonic() + PATIENCE_S
        while len(found) < count:
            assert select.select([self.completions.fd], [], [], until - time.monotonic())[0], f"only {found} came"
            found += self.completions.drain()
        return found


@contextlib.contextmanager
def ends(wire: int = 0, nbytes: int = MIB) -> Iterator[tuple[End, End]]:
    """Sides a and b of a wire, connected; everything is given back at the end."""
    a, b = End("a", wire, nbytes), End("b", wire, nbytes)
    try:
        a.join(b)
        b.join(a)
        yield a, b
    finally:
        a.device.close()
        b.device.close()
