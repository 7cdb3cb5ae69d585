"""Two links in one process over rails of memory, and endpoints that check everything.

`End` plays endpoint and peer of one link; `Pair` brings rails up again as `peer.py` does.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.events import Rings
from adaptra_plugin.transport.proxy.health import State
from adaptra_plugin.transport.proxy.inbox import Incoming
from adaptra_plugin.transport.proxy.link import Link
from adaptra_plugin.transport.proxy.rails.base import Rail, RailKind
from adaptra_plugin.transport.proxy.rails.faulty import Faults
from adaptra_plugin.transport.proxy.silence import TICK_S
from adaptra_plugin.transport.types import Direction
from tests.transport.proxy.memory import Cable, MemoryRail, World

REDIAL_S = 0.1
_NOISE = random.Random(1).randbytes(1_000_003)  # a prime: pieces of a message do not repeat


def content(number: int, nbytes: int) -> bytes:
    """What message `number` says: no two of them the same."""
    start = number * 7919 % len(_NOISE)
    text = number.to_bytes(8, "little") + _NOISE[start : start + nbytes]
    return (text + _NOISE * (nbytes // len(_NOISE) + 1))[:nbytes]


@dataclass
class Letter:
    """A message as the sending endpoint knows it."""

    number: int
    key: Any
    data: bytes
    acked: bool = False
    consumed: bool = False


class RingAllocator:
    """Positions in a ring, as the endpoint chooses them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.next = 0
        self.held: deque[tuple[int, int]] = deque()
        self.letters: dict[int, Letter] = {}

    def place(self, nbytes: int) -> int | None:
        position = self.next if self.held else -(-self.next // self.capacity) * self.capacity
        padded = -(-nbytes // 64) * 64
        first = self.held[0][0] if self.held else position
        if position + padded - first > self.capacity:
            return None
        self.next = position + padded
        self.held.append((position, padded))
        return position

    def consume(self, position: int) -> Letter:
        letter = self.letters.pop(position)
        while self.held and self.held[0][0] not in self.letters:
            self.held.popleft()
        return letter


class End:
    """One side: fills rings, copies out what comes, checks all of it.

    Args:
        hold_s: how long after a message was delivered it is copied out (s).
    """

    def __init__(self, world: World, name: str, keys: list[Any], capacity: int, segment: int, limit: int) -> None:
        self.world = world
        self.name = name
        self.hold_s: Callable[[], float] = lambda: 0.0
        self.rings = {key: Rings(Memfd.create(capacity), Memfd.create(capacity)) for key in keys}
        self.allocators = {key: RingAllocator(capacity) for key in keys}
        self.link = Link(
            self.rings,
            self,
            world,
            limit=limit,
            segment_bytes=segment,
            checksum=lambda rail: rail.kind is not RailKind.SHM,
        )
        self.peer: End
        self.pair: Pair
        self.waiting: deque[tuple[Any, int, Any, bytes]] = deque()  # no room yet
        self.numbers = itertools.count()
        self.delivered: list[int] = []  # numbers of the peer's messages, as they came
        self.times: dict[int, float] = {}
        self.by_key: dict[Any, list[int]] = {}
        self.references = 0
        self.controls: list[Any] = []
        self.stuck: list[tuple[Any, bool]] = []
        self.states: list[tuple[float, str, State, str]] = []
        self.notes: list[dict[str, Any]] = []
        self.lost: list[str] = []
        self.goodbyes = 0
        self.done = False
        self.pongs = 0

    # --- the endpoint

    def send(self, nbytes: int, key: Any = None, lane: Any = (Direction.ACTIVATION, 0)) -> int:
        """As soon as there is room; returns the message's number."""
        number = next(self.numbers)
        self.waiting.append((lane, number, number if key is None else key, content(number, nbytes)))
        self.fill()
        return number

    def fill(self) -> None:
        """What has room goes, lane by lane in order."""
        blocked = set()
        for _ in range(len(self.waiting)):
            lane, number, key, data = self.waiting.popleft()
            allocator = self.allocators[lane]
            position = None if lane in blocked else allocator.place(len(data))
            if position is None:
                blocked.add(lane)
                self.waiting.append((lane, number, key, data))
                continue
            before = [at for at, letter in allocator.letters.items() if letter.key == key and not letter.acked]
            allocator.letters[position] = Letter(number, key, data)
            self.rings[lane].ring.write(position, data)
            self.link.send(*lane, position, len(data), self.world.now, 1 + before[-1] if before else 0)
        self.link.pump()

    @property
    def settled(self) -> bool:
        """All that was sent has been copied out over there, which is known here."""
        return (
            not self.waiting
            and not any(allocator.letters for allocator in self.allocators.values())
            and not self.link.unsent
        )

    # --- what the link reports

    def message(self, direction: Direction, lane: int, found: Incoming) -> None:
        letter = self.peer.allocators[direction, lane].letters.get(found.message)
        assert letter is not None, "a message was delivered that is consumed already"
        assert len(letter.data) == found.total
        self.delivered.append(letter.number)
        self.times[letter.number] = self.world.now
        self.by_key.setdefault(letter.key, []).append(letter.number)
        self.references += found.by_reference
        self.world.call_later(self.hold_s(), functools.partial(self._copy_out, direction, lane, found, letter))

    def _copy_out(self, direction: Direction, lane: int, found: Incoming, letter: Letter) -> None:
        key = (direction, lane)
        memfd = self.peer.rings[key].ring if found.by_reference else self.rings[key].receive_ring
        # late, so that whatever was written here since is seen
        assert memfd.read(found.message, found.total) == letter.data, f"message {letter.number} is corrupted"
        self.link.release(direction, lane, found.message)
        self.link.pump()

    def acked(self, direction: Direction, lane: int, message: int) -> None:
        letter = self.allocators[direction, lane].letters[message]
        assert not letter.acked
        letter.acked = True

    def consumed(self, direction: Direction, lane: int, message: int) -> None:
        self.allocators[direction, lane].consume(message)
        self.world.post(self.fill)

    def peer_stuck(self, direction: Direction, lane: int, stuck: bool) -> None:
        self.stuck.append(((direction, lane), stuck))

    def control(self, message: dict[str, Any]) -> None:
        self.controls.append(message)
        self.world.post(self.link.control_taken)

    def rail_message(self, rail: Rail, message: dict[str, Any]) -> None:
        self.notes.append(message)
        if isinstance(name := message.get("closed"), str):
            self.world.post(lambda: self.link.drop_rail(name, "the other end has closed it"))

    def goodbye(self) -> None:
        self.goodbyes += 1

    def finished(self) -> None:
        self.done = True

    def pong(self, sent: float, remote_received: float, remote_sent: float, received: float) -> None:
        assert sent <= remote_received <= remote_sent <= received
        self.pongs += 1

    def rail_state(self, rail: Rail, state: State, why: str) -> None:
        self.states.append((self.world.now, rail.name, state, why))

    def rail_lost(self, rail: Rail, reason: str) -> None:
        self.lost.append(rail.name)
        self.pair.rail_lost(self, rail.name)

    # --- time

    def turn_ended(self) -> None:
        self.link.flush()

    def tick(self) -> None:
        self.link.tick()
        self.world.call_later(TICK_S, self.tick)


class Pair:
    """Two ends and the cables between them; `a` dials.

    Args:
        capacity: of each ring (bytes).
        simulate: faults, as in the configuration, between the stages 0 and 1.
    """

    def __init__(
        self,
        *cables: Cable,
        capacity: int = 1 << 20,
        segment: int = 64 << 10,
        lanes: int = 1,
        limit: int | None = None,
        simulate: Mapping[str, Any] | None = None,
    ) -> None:
        self.world = World()
        keys = [(direction, lane) for direction in Direction for lane in range(lanes)]
        self.a, self.b = (
            End(self.world, name, keys, capacity, segment, capacity if limit is None else limit) for name in "ab"
        )
        self.faults = [Faults(simulate or {}, stage, self.world) for stage in (0, 1)]
        self.cables = {cable.name: cable for cable in cables}
        self.a.peer, self.b.peer = self.b, self.a
        for end in (self.a, self.b):
            end.pair = self
            self.world.turn_ended.append(end.turn_ended)
            end.tick()
        for cable in cables:
            self.connect(cable.name)
        self.world.run(0.01)

    def connect(self, name: str) -> None:
        cable = self.cables[name]
        if cable.down or cable.cut:
            self.world.call_later(REDIAL_S, lambda: self.connect(name))
            return
        rails = [MemoryRail(self.world, cable, end.link) for end in (self.a, self.b)]
        rails[0].other, rails[1].other = rails[1], rails[0]
        for stage, (end, rail) in enumerate(zip((self.a, self.b), rails, strict=True)):
            end.link.drop_rail(name, "the other end has connected anew")
            end.link.add_rail(self.faults[stage].wrap(rail, 1 - stage))
            if name in end.link.connections:
                end.link.ping(name)

    def rail_lost(self, end: End, name: str) -> None:
        if end is self.a:
            pause = max(0.0, end.link.health[name].until - self.world.now)
            self.world.call_later(pause if end.link.connections else min(pause, REDIAL_S), lambda: self._again(name))

    def _again(self, name: str) -> None:
        if name not in self.a.link.connections:
            self.a.link.health[name].probing()
            self.connect(name)

    def settle(self, seconds: float = 60.0) -> float:
        """Runs until everything has arrived and is consumed, both ways. Returns the simulated time that took (s)."""
        before = self.world.now
        assert self.world.run(seconds, lambda: self.a.settled and self.b.settled), self.explain()
        return self.world.now - before

    def explain(self) -> str:
        lines = []
        for end in (self.a, self.b):
            unacked = sum(
                not letter.acked for allocator in end.allocators.values() for letter in allocator.letters.values()
            )
            held = sum(len(allocator.letters) for allocator in end.allocators.values())
            lines.append(
                f"{end.name}: {len(end.waiting)} wait, {held} held, {unacked} not acked, {end.link.unsent} unsent"
            )
            lines += [
                f"  {name}: {len(t.under_way)} under way, {t.inflight} bytes, window {t.window}, speed "
                f"{t.speed:.3g}, trip {t.round_trip:.2g}, best {t.best_trip:.2g}, patience {t.patience_s:.2g}, pinged "
                f"{t.pinged}, silent {t.silent_since}, came {t.came}, told {t.told}, placed {t.placed}, "
                f"backlog {t.rail.backlog}, {end.link.health[name].state}"
                for name, t in end.link.connections.items()
            ]
            lines += [f"  {entry}" for entry in end.states[-10:]]
        return "\n".join(lines)

    def check(self, end: End, count: int) -> None:
        """All `count` messages of `end` have arrived once each, those of one key in order."""
        receiver = end.peer
        assert sorted(receiver.delivered) == list(range(count))
        for numbers in receiver.by_key.values():
            assert numbers == sorted(numbers)

    def close(self) -> None:
        for end in (self.a, self.b):
            end.link.close()
            for rings in end.rings.values():
                rings.ring.close()
                rings.receive_ring.close()
        self.world.close()
