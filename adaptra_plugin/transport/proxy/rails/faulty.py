"""Faults injected on purpose into a rail, by configuration: a decorator that stands between a link and any rail.

Nothing else knows that faults exist. Each end spoils what it sends, so a fault acts in both directions. What is drawn by
chance is drawn from seeds, anew for every connection: the same frames meet the same fate.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from adaptra_plugin.transport.proxy.loop import Clockwork, Timer
from adaptra_plugin.transport.proxy.rails.base import Frame, Rail
from adaptra_plugin.transport.proxy.wire import HEADER_BYTES, FrameHeader, FrameKind

SLOW_LINK = "slow link"
"""Kind of the faults that `simulate.links` describes."""
STALL_STEP_S = 0.01
"""How often to look whether a rail that is stalled goes on."""


@dataclass(frozen=True, slots=True)
class RailFault:
    """See `adaptra_plugin.config.Fault`, which has checked it."""

    kind: str
    src: int
    dst: int
    rail: str = "any"
    ms: float = 0.0
    mb_per_s: float = 0.0
    rate: float | None = None
    part: str = "body"
    seed: int = 0
    from_iteration: int = 0
    to_iteration: int | None = None
    from_s: float = 0.0
    to_s: float | None = None

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> RailFault:
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in block.items() if name in known and value is not None})

    @classmethod
    def of_slow_link(cls, block: Mapping[str, Any]) -> RailFault:
        return cls.of({**block, "kind": SLOW_LINK, "ms": block["latency_ms"]})

    def concerns(self, ends: set[int], rail: Rail) -> bool:
        return {self.src, self.dst} == ends and self.rail in ("any", rail.name, rail.kind.word)

    def active(self, iteration: int, elapsed_s: float) -> bool:
        return (
            self.from_iteration <= iteration
            and (self.to_iteration is None or iteration < self.to_iteration)
            and self.from_s <= elapsed_s
            and (self.to_s is None or elapsed_s < self.to_s)
        )


class Faults:
    """All faults of this rank's links; `iteration` (0-based) is kept up by the owner. Times count from now on.

    Args:
        simulate: the `simulate` block of the configuration: `links`, `faults`.
        pp_rank: position of this rank.
    """

    def __init__(self, simulate: Mapping[str, Any], pp_rank: int, loop: Clockwork) -> None:
        self.iteration = 0
        self._loop = loop
        self._pp_rank = pp_rank
        self._began = loop.clock()
        self._faults = [RailFault.of_slow_link(block) for block in simulate.get("links") or ()]
        self._faults += [RailFault.of(block) for block in simulate.get("faults") or ()]
        self._connections: Counter[tuple[int, str]] = Counter()

    def between(self, peer: int) -> bool:
        """Whether anything is configured for the link to a peer."""
        return any({fault.src, fault.dst} == {self._pp_rank, peer} for fault in self._faults)

    def wrap(self, rail: Rail, peer: int) -> Rail:
        """A new connection to a peer, with what is configured for it; the rail itself if that is nothing."""
        found = [
            (index, fault) for index, fault in enumerate(self._faults) if fault.concerns({self._pp_rank, peer}, rail)
        ]
        if not found:
            return rail
        self._connections[peer, rail.name] += 1
        which = f"{self._pp_rank} {peer} {rail.name} {self._connections[peer, rail.name]}"
        return FaultyRail(
            rail, [(fault, random.Random(f"{fault.seed} {index} {which}")) for index, fault in found], self, self._loop
        )

    def active(self, fault: RailFault) -> bool:
        return fault.active(self.iteration, self._loop.clock() - self._began)


class FaultyRail(Rail):
    """`inner`, as bad as `faults` make it: each with its source of chance. It is its inner rail's sink."""

    def __init__(
        self, inner: Rail, faults: Sequence[tuple[RailFault, random.Random]], plan: Faults, loop: Clockwork
    ) -> None:
        super().__init__(inner.kind, inner.name, inner.sink)
        self.by_reference = inner.by_reference
        self.damages = any(fault.kind == "corruption" for fault, _ in faults)
        self.limit, self.lanes = inner.sink.limit, inner.sink.lanes
        self.inner = inner
        inner.sink = self
        self._faults = faults
        self._plan = plan
        self._loop = loop
        self._held: list[tuple[float, int, Frame]] = []
        self._held_bytes = 0
        self._count = itertools.count()
        self._timer: Timer | None = None
        self._free_at = self._in_order = 0.0
        self._numbered_due = 0.0  # when the last frame with a number was due
        self._acked = 0
        self._dying = False
        loop.post(self._perhaps_die)

    def describe(self) -> str:
        return self.inner.describe()

    @property
    def backlog(self) -> int:
        return self.inner.backlog + self._held_bytes

    def flush(self) -> None:
        self.inner.flush()

    def discard(self) -> None:
        self.inner.discard()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.inner.close()
            self._held.clear()
            self._held_bytes = 0
            if self._timer is not None:
                self._timer.cancel()

    # --- out

    def submit(self, frame: Frame) -> None:
        self._perhaps_die()
        if self.closed or self._dying:
            return
        for fault, chance in self._of("corruption"):
            if chance.random() < (fault.rate or 0.0):
                frame = self._damaged(frame, fault, chance)
        self._hold(frame, self._due(frame))

    def _of(self, *kinds: str) -> list[tuple[RailFault, random.Random]]:
        return [found for found in self._faults if found[0].kind in kinds and self._plan.active(found[0])]

    def _due(self, frame: Frame) -> float:
        """When a frame goes on its way."""
        header, now = frame.header, self._loop.clock()
        due = now
        for fault, _ in self._of("bandwidth"):
            start = max(now, self._free_at)
            due = self._free_at = start + (HEADER_BYTES + header.body_bytes) / (fault.mb_per_s * 1e6)
        for fault, _ in self._of("latency"):
            due += fault.ms / 1e3
        for fault, chance in self._of("jitter"):
            due += chance.random() * fault.ms / 1e3
        due = self._in_order = max(self._in_order, due)
        return self._behind_transfers(header, due) if header.sequence else due

    def _behind_transfers(self, header: FrameHeader, due: float) -> float:
        """A slow link delays transfers, and what comes behind them, but neither acknowledgements nor what measures the rail."""
        if header.kind == FrameKind.SEGMENT:
            # counted from when the message was ready: transfers overlap, only their latency grows
            due = max(due, header.sent + sum(fault.ms for fault, _ in self._of(SLOW_LINK)) / 1e3)
        due = self._numbered_due = max(self._numbered_due, due)
        if due > self._loop.clock() and header.ack > self._acked:
            self._acked = header.ack
            self._hold(Frame(FrameHeader(FrameKind.ACK, ack=header.ack)), self._in_order)
        return due

    def _hold(self, frame: Frame, due: float) -> None:
        now = self._loop.clock()
        if due <= now and not self._stalled and not (self._held and self._held[0][0] <= now):
            self.inner.submit(frame)
            return
        heapq.heappush(self._held, (due, next(self._count), frame))
        self._held_bytes += HEADER_BYTES + frame.header.body_bytes
        self._arm()

    @property
    def _stalled(self) -> bool:
        return bool(self._of("stall"))

    def _arm(self) -> None:
        if not self._held:
            return
        due = self._held[0][0]
        if self._stalled:
            due = max(due, self._loop.clock() + STALL_STEP_S)
        if self._timer is not None:
            if self._timer.when <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._let_go)

    def _let_go(self) -> None:
        self._timer = None
        while self._held and self._held[0][0] <= self._loop.clock() and not self._stalled:
            _, _, frame = heapq.heappop(self._held)
            self._held_bytes -= HEADER_BYTES + frame.header.body_bytes
            self.inner.submit(frame)
        self._arm()

    def _damaged(self, frame: Frame, fault: RailFault, chance: random.Random) -> Frame:
        if fault.part == "header":
            values = {field.name: getattr(frame.header, field.name) for field in fields(FrameHeader)}
            return Frame(_DamagedHeader(chance.randrange(HEADER_BYTES), **values), frame.body)
        if not frame.header.body_bytes:
            return frame
        body = bytearray(b"".join(frame.body))
        body[chance.randrange(len(body))] ^= chance.randrange(1, 256)
        return Frame(frame.header, [memoryview(body)])

    # --- the end

    def _perhaps_die(self) -> None:
        for fault, chance in self._of("death"):
            if not self.closed and not self._dying and (fault.rate is None or chance.random() < fault.rate):
                self._dying = True
                self._loop.post(self._die)  # the link may be in the middle of using this rail

    def _die(self) -> None:
        self.failed(self.inner, "a fault of adaptra.simulate has ended it")

    # --- in: the inner rail's sink

    def place(self, rail: Rail, header: FrameHeader) -> list[memoryview] | None:
        return self.sink.place(self, header)

    def arrived(self, rail: Rail, header: FrameHeader, body: bytes = b"") -> None:
        self.sink.arrived(self, header, body)

    def failed(self, rail: Rail, reason: str) -> None:
        if not self.closed:
            self.garbled = self.inner.garbled
            self.close()
            self.sink.failed(self, reason)


class _DamagedHeader(FrameHeader):
    """A header that loses a byte on its way."""

    __slots__ = ("_spoilt",)

    def __init__(self, spoilt: int, **values: Any) -> None:
        super().__init__(**values)
        self._spoilt = spoilt

    def pack(self) -> bytes:
        raw = bytearray(super().pack())
        raw[self._spoilt] ^= 0xFF
        return bytes(raw)
