"""One executed schedule on one rank: what runs, what moves, and how long it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptra_plugin.detect import IterationReport, LinkDelay, StageTimes
from adaptra_plugin.errors import TransportError
from adaptra_plugin.runtime.compute_throttle import ComputeThrottle
from adaptra_plugin.runtime.departures import Presence
from adaptra_plugin.runtime.dispatch import IN_ORDER, DispatchPolicy, buffers_needed, dispatch
from adaptra_plugin.runtime.stopwatch import Stopwatch
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.actions import Action, Kind
from adaptra_plugin.transport import Channel, Direction, Key, Message, RecvWork
from adaptra_plugin.transport.pauses import Pauses

TUPLE = 1  # lowest bit of a message's tag: the message was a tuple of tensors, not one tensor


@dataclass
class Links:
    """The channels of a rank to its neighbours (None at the ends of the pipeline)."""

    previous: Channel | None
    next: Channel | None


@dataclass
class Iteration:
    """Runs the actions of one rank in one iteration.

    A host adapter walks through `dispatch()`; for each action it calls `receive`, brackets the computation with `compute`, and
    calls `send`. What is received and sent follows from the action: a forward takes the activation of the stage before and
    gives one to the stage after, a backward the other way round.

    Attributes:
        index: number of the training iteration, 0-based (an evaluation has that of the next training iteration).
        step_id: number of the executed schedule, training and evaluation alike; part of every transfer's key.
        version: version of the plan.
        actions: what this rank runs, in order.
        device: where received tensors are to be; None: in host memory.
        presence: is told when this rank waits for another one.
        policy: chooses what runs next.
    """

    index: int
    step_id: int
    version: int
    actions: tuple[Action, ...]
    microbatches: int
    topology: Topology
    links: Links
    stopwatch: Stopwatch
    throttle: ComputeThrottle
    training: bool = True
    device: torch.device | None = None
    presence: Presence = field(default_factory=Presence)
    policy: DispatchPolicy = IN_ORDER
    wait_ms: float = 0.0
    _posted: dict[Key, RecvWork] = field(default_factory=dict)
    _marks: list[tuple[Action, int, int]] = field(default_factory=list)
    _delays: dict[tuple[int, int], list[tuple[float, float]]] = field(default_factory=dict)  # (delay, when it came)
    _pauses: dict[tuple[int, int], Pauses | None] = field(default_factory=dict)
    _sizes: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # bytes
    _around: dict[Action, float] = field(default_factory=dict)
    """Ms between the computation before and this one, without waiting."""
    _left: tuple[float, float] | None = None
    """When the newest computation ended (s), and how long this rank had waited by then (ms)."""

    def __post_init__(self) -> None:
        # of two ranks with several chunks, both neighbours are one
        self._neighbours = {channel for channel in (self.links.previous, self.links.next) if channel is not None}
        # all receives at once: what arrives early finds its place
        for action in self.actions:
            key = self._incoming(action)
            if key is not None:
                self._posted[key] = self._channel(key.direction, receiving=True).recv(key, self.device)
        self._started = time.perf_counter()
        self.started_unix_ms = time.time() * 1e3
        self.stopwatch.start()

    @property
    def buffers(self) -> int:
        """Slots for microbatches in flight."""
        return buffers_needed(self.actions)

    def dispatch(self) -> Iterator[Action]:
        """What to run, one action after the other."""
        return dispatch(self.actions, self._arrived, self.policy)

    def _arrived(self, action: Action) -> bool:
        key = self._incoming(action)
        return key is None or self._posted[key].ready()

    def splits(self) -> bool:
        """True if this rank's plan runs the backward in two parts."""
        return any(action.kind is Kind.BACKWARD_INPUT for action in self.actions)

    @contextmanager
    def compute(self, action: Action) -> Iterator[None]:
        """Brackets the computation of one action: times and paces it."""
        if self._left is not None:
            left, waited_ms = self._left
            self._around[action] = (time.perf_counter() - left) * 1e3 - (self._waited_ms() - waited_ms)
        start = self.stopwatch.mark()
        with self.throttle.pace(action.kind):
            yield
        self._marks.append((action, start, self.stopwatch.mark()))
        if not self.stopwatch.beside_host:
            self._left = time.perf_counter(), self._waited_ms()

    def _waited_ms(self) -> float:
        """For messages, and for room to send them."""
        return self.wait_ms + sum(channel.blocked_ms for channel in self._neighbours)

    def send(self, action: Action, tensors: Sequence[Tensor], *, is_tuple: bool = False) -> None:
        """Hands what an action has made for a neighbour to the proxy and returns at once; blocks only while the staging ring
        is full. Tensors on a device are read later, see `Channel.send`."""
        forwards = action.kind is Kind.FORWARD
        direction = Direction.ACTIVATION if forwards else Direction.GRADIENT
        key = self._key(direction, action.stage + (1 if forwards else -1), action.microbatch)
        tag = self.version << 1 | (TUPLE if is_tuple else 0)
        with self.presence.waiting():
            self._channel(direction, receiving=False).send(key, [t.detach() for t in tensors], tag)

    def receive(self, action: Action) -> tuple[tuple[Tensor, ...], bool]:
        """Waits for what an action takes from a neighbour; its tensors on `device`, and whether they were sent as a tuple.

        Raises:
            TransferTimeout, PeerLostError: it did not come.
            TransportError: the sender runs another plan in this iteration.
        """
        key = self._incoming(action)
        assert key is not None
        message = self._take(key)
        return message.tensors, bool(message.tag & TUPLE)

    def _take(self, key: Key) -> Message:
        """Waits for a message, and notes how long it has been on its way."""
        started = time.perf_counter()
        with self.presence.waiting():
            message: Message = self._posted.pop(key).wait()
        self.wait_ms += (time.perf_counter() - started) * 1e3
        source = key.stage + (-1 if key.direction is Direction.ACTIVATION else 1)
        ends = (source % self.topology.length, key.stage % self.topology.length)
        self._delays.setdefault(ends, []).append((message.delay_ms, message.came_s))
        self._pauses[ends] = message.pauses
        self._sizes.setdefault(ends, []).append(sum(tensor.nbytes for tensor in message.tensors))
        if message.tag >> 1 != self.version:
            raise TransportError(
                f"iteration {self.index}: this rank ({self.topology.rank}) runs plan v{self.version}, "
                f"its neighbour sent {key.direction.name.lower()} {key.microbatch} under plan v{message.tag >> 1}"
            )
        return message

    def receives(self, action: Action) -> bool:
        """Whether an action takes something from a neighbour."""
        return self._incoming(action) is not None

    def sends(self, action: Action) -> bool:
        """Whether an action makes something for a neighbour."""
        if action.kind is Kind.FORWARD:
            return not self.topology.is_last(action.stage)
        return action.kind is not Kind.BACKWARD_WEIGHT and action.stage > 0

    def finish(self) -> None:
        """The schedule has been executed."""
        for channel in self._neighbours:
            channel.flush()  # whatever this rank waits for from now on is not here
        self.total_ms = (time.perf_counter() - self._started) * 1e3
        self.mark_times_ms = self.stopwatch.times_ms()

    def spans(self) -> list[tuple[str, float, float]]:
        """(action, start, end) in ms since the iteration began on this rank; after `finish`."""
        return [
            (str(action), round(self.mark_times_ms[start], 3), round(self.mark_times_ms[end], 3))
            for action, start, end in self._marks
        ]

    def report(self, host: str) -> IterationReport:
        """What was measured; after `finish`. `host`: name of this rank's host."""
        topology = self.topology
        return IterationReport(
            replica=topology.replica,
            pp_rank=topology.position,
            rank=topology.rank,
            host=host,
            iteration=self.index,
            microbatches=self.microbatches,
            iteration_ms=self.total_ms,
            plan_version=self.version,
            chunks=self.stage_times(),
            links=self.link_delays(),
            wait_ms=self.wait_ms,
            compute_ms=sum(self.mark_times_ms[end] - self.mark_times_ms[start] for _, start, end in self._marks),
        )

    def stage_times(self) -> tuple[StageTimes, ...]:
        """Medians over the microbatches, for each stage of this rank; an unsplit backward counts as backward-input. Where the device
        computes on this thread, with what the thread has to do around each of them: a plan has to leave time for that, too."""
        parts: dict[Action, float] = {}  # a computation may have waited in the middle
        parts.update({action: max(0.0, around) for action, around in self._around.items()})
        for action, start, end in self._marks:
            parts[action] = parts.get(action, 0.0) + self.mark_times_ms[end] - self.mark_times_ms[start]
        durations: dict[tuple[int, Kind], list[float]] = {}
        for action, duration in parts.items():
            kind = Kind.BACKWARD_INPUT if action.kind is Kind.FULL_BACKWARD else action.kind
            durations.setdefault((action.stage, kind), []).append(duration)

        def median(stage: int, kind: Kind) -> float:
            values = durations.get((stage, kind))
            return statistics.median(values) if values else 0.0

        return tuple(
            StageTimes(
                median(stage, Kind.FORWARD), median(stage, Kind.BACKWARD_INPUT), median(stage, Kind.BACKWARD_WEIGHT)
            )
            for stage in self.topology.own_stages
        )

    def link_delays(self) -> tuple[LinkDelay, ...]:
        """Median one-way delay and size of the transfers that this rank received, per directed link. Those during which a
        proxy stood still do not count, and a link without any other is left out."""
        found = []
        for (src, dst), samples in self._delays.items():
            pauses = self._pauses[src, dst]
            values = [delay for delay, _ in samples] if pauses is None else pauses.undisturbed(samples)
            if values:
                delay, size = statistics.median(values), statistics.median(self._sizes[src, dst])
                found.append(LinkDelay(src, dst, delay, messages=len(values), message_bytes=size))
        return tuple(found)

    def _key(self, direction: Direction, stage: int, microbatch: int) -> Key:
        return Key(step_id=self.step_id, direction=direction, stage=stage, microbatch=microbatch)

    def _incoming(self, action: Action) -> Key | None:
        """Name of what an action takes from a neighbour, if it does."""
        if action.kind is Kind.FORWARD:
            return self._key(Direction.ACTIVATION, action.stage, action.microbatch) if action.stage > 0 else None
        if action.kind is Kind.BACKWARD_WEIGHT or self.topology.is_last(action.stage):
            return None
        return self._key(Direction.GRADIENT, action.stage, action.microbatch)

    def _channel(self, direction: Direction, *, receiving: bool) -> Channel:
        forwards = direction is Direction.ACTIVATION
        channel = self.links.previous if forwards is receiving else self.links.next
        assert channel is not None
        return channel
