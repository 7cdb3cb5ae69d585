"""Two ranks of a pipeline as processes a (rank 0) and b (rank 1): endpoints with RDMA rails between "hosts" of the guest."""

from __future__ import annotations

import socket
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from adaptra_plugin.config import Fault, SimulateConfig, TransportConfig
from adaptra_plugin.transport import Direction, Endpoint, EndpointInfo, Key, PeerInfo
from tests.rdma import wires
from tests.rdma.hosts import Half
from tests.rdma.pairs import MIB, noise

SECRET = b"a secret of the tests, 32 bytes."
DEADLINE_S = 30.0
BIG = 4
"""Messages of a round: more than one rail has under way at once."""
_NOISE = torch.frombuffer(bytearray(noise(8 * MIB)), dtype=torch.uint8)


class Rank(Half):
    """One of the two processes."""

    endpoint: Endpoint

    def __init__(self, side: str, talk: socket.socket) -> None:
        super().__init__(side, talk)
        self.rank = 0 if side == "a" else 1
        self.step_id = 0

    def create(self, *, host: str = "127.0.0.1", faults: Sequence[Fault] = (), **changes: Any) -> dict[str, Any]:
        """An endpoint over all wires, proxy in a thread; returns its card. `host`: where TCP listens."""
        settings: dict[str, Any] = {
            "rail": "rdma",
            "rdma_devices": tuple(wires.device(self.side, wire) for wire in range(wires.COUNT)),
            "ring_mib": 8,
            "segment_kib": 256,
            "deadline_s": DEADLINE_S,
            "connect_deadline_s": DEADLINE_S,
            "proxy": "thread",
            "checksum": "on",  # as between hosts
        }
        config = TransportConfig(**{**settings, **changes})
        me = PeerInfo(self.rank, self.rank, f"n{self.rank}")
        simulate = SimulateConfig(faults=tuple(faults))
        self.endpoint = Endpoint(me, config, SECRET, bind_host=host, simulate=simulate)
        return {"host": me.host, "endpoint_info": self.endpoint.endpoint_info.to_text()}

    def connect(self, **options: Any) -> Rank:
        self.meet(self.create(**options))
        return self

    def meet(self, mine: dict[str, Any]) -> None:
        other = self.swap(mine)
        peer = PeerInfo(1 - self.rank, 1 - self.rank, other["host"])
        peers = {
            self.rank: (self.endpoint.me, self.endpoint.endpoint_info),
            peer.rank: (peer, EndpointInfo.parse(other["endpoint_info"])),
        }
        self.endpoint.connect(peers, neighbours=[peer.rank], coordinator=0)
        self.channel = self.endpoint.channel(peer.rank)

    def close(self) -> None:
        if hasattr(self, "endpoint"):
            self.endpoint.close(linger_s=2.0)

    # --- work

    @property
    def _ways(self) -> tuple[Direction, Direction]:
        """Which way this rank sends, and receives."""
        ways = (Direction.ACTIVATION, Direction.GRADIENT)
        return ways if self.rank == 0 else (ways[1], ways[0])

    def key(self, microbatch: int, *, sent: bool) -> Key:
        direction = self._ways[0 if sent else 1]
        return Key(self.step_id, direction, 1 if direction is Direction.ACTIVATION else 0, microbatch)

    def round(self, sizes: Sequence[int] = (MIB,) * BIG, during: Callable[[], Any] = lambda: None) -> float:
        """Both ranks send messages of these sizes (bytes) to each other, `during` happens, and every byte is checked.
        Returns how long the slowest message took from then on (s), once all that was sent has arrived too."""
        self.step_id += 1
        works = [self.channel.recv(self.key(index, sent=False)) for index in range(len(sizes))]
        sent = [
            self.channel.send(self.key(index, sent=True), [content(self.rank, self.step_id, index, nbytes)], tag=index)
            for index, nbytes in enumerate(sizes)
        ]
        during()
        began = time.monotonic()
        for index, (work, nbytes) in enumerate(zip(works, sizes, strict=True)):
            message = work.wait()
            assert message.tag == index
            wrong = torch.nonzero(message.tensors[0] != content(1 - self.rank, self.step_id, index, nbytes)).flatten()
            assert not len(wrong), f"{len(wrong)} bytes of {nbytes} are wrong, from {wrong[0]} to {wrong[-1]}"
        took = time.monotonic() - began
        for work in sent:
            work.wait()
        return took

    def peer_stats(self) -> dict[str, Any]:
        return self.endpoint.stats()["peers"][1 - self.rank]

    def delivered(self) -> dict[str, int]:
        """Bytes by rail since it was last connected."""
        return {name: rail["delivered_bytes"] for name, rail in self.peer_stats()["rails"].items()}

    def await_rails(self, patience_s: float = 15.0, **states: str) -> float:
        """Until the rails named have these states; how long that took (s)."""
        began = time.monotonic()
        while True:
            rails = self.peer_stats()["rails"]
            if all(rails.get(name, {}).get("state") == state for name, state in states.items()):
                return time.monotonic() - began
            assert time.monotonic() - began < patience_s, f"{self.side}: {rails} instead of {states}"
            time.sleep(0.05)


def content(rank: int, step_id: int, index: int, nbytes: int) -> torch.Tensor:
    """Bytes of which no two messages have the same: a window of the same noise, cheap to make anew."""
    start = zlib.crc32(f"{rank} {step_id} {index}".encode()) % (len(_NOISE) - nbytes)
    return _NOISE[start : start + nbytes]
