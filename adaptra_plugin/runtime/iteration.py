"""One executed schedule on one rank: what runs, what moves, and how long it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptra_plugin.detect import LinkDelay, StageTimes
from adaptra_plugin.errors import TransportError
from adaptra_plugin.runtime.dispatch import buffers_needed, in_order
from adaptra_plugin.runtime.pacing import Pacer
from adaptra_plugin.runtime.stopwatch import Stopwatch
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.actions import Action, Kind
from adaptra_plugin.transport import Channel, Direction, Key, Message, RecvTicket

TUPLE = 1  # lowest bit of a message's tag: the message was a tuple of tensors, not one tensor


@dataclass
class Links:
    """The channels of a rank to its neighbours (None at the ends of the pipeline)."""

    previous: Channel | None
    next: Channel | None


@dataclass
class Iteration:
    """Runs the actions of one rank in one iteration.

    A host adapter walks through `dispatch()`, and brackets the computation of every action with `compute`.

    Attributes:
        index: number of the training iteration, 0-based (an evaluation has that of the next training iteration).
        epoch: number of the executed schedule, training and evaluation alike; part of every transfer's key.
        version: version of the plan.
        actions: what this rank runs, in order.
        device: where received tensors are to be; None: in host memory.
    """

    index: int
    epoch: int
    version: int
    actions: tuple[Action, ...]
    microbatches: int
    topology: Topology
    links: Links
    stopwatch: Stopwatch
    pacer: Pacer
    training: bool = True
    device: torch.device | None = None
    wait_ms: float = 0.0
    _posted: dict[tuple[Direction, int], RecvTicket] = field(default_factory=dict)
    _marks: list[tuple[Action, int, int]] = field(default_factory=list)
    _delays: dict[Direction, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # all receives at once: what arrives early finds its place
        for microbatch in range(self.microbatches):
            if self.links.previous is not None:
                key = self._key(Direction.ACTIVATION, self.topology.stage, microbatch)
                self._posted[Direction.ACTIVATION, microbatch] = self.links.previous.recv(key, self.device)
            if self.links.next is not None and self.training:
                key = self._key(Direction.GRADIENT, self.topology.stage, microbatch)
                self._posted[Direction.GRADIENT, microbatch] = self.links.next.recv(key, self.device)
        self._started = time.perf_counter()
        self.started_unix_ms = time.time() * 1e3
        self.stopwatch.start()

    @property
    def buffers(self) -> int:
        """Slots for microbatches in flight."""
        return buffers_needed(self.actions)

    def dispatch(self) -> Iterator[Action]:
        return in_order(self.actions)

    def splits(self) -> bool:
        """True if this rank's plan runs the backward in two parts."""
        return any(action.kind is Kind.I for action in self.actions)

    @contextmanager
    def compute(self, kind: Kind, microbatch: int) -> Iterator[None]:
        """Brackets the computation of one action: times and paces it."""
        start = self.stopwatch.mark()
        with self.pacer.pace(kind):
            yield
        self._marks.append((Action(self.topology.stage, kind, microbatch), start, self.stopwatch.mark()))

    def send(self, direction: Direction, microbatch: int, tensors: Sequence[Tensor], *, is_tuple: bool) -> None:
        """Hands tensors to the proxy and returns at once; blocks only while the staging ring is full. Those on a device are
        read later, see `Channel.send`."""
        forwards = direction is Direction.ACTIVATION
        channel = self.links.next if forwards else self.links.previous
        assert channel is not None
        stage = self.topology.stage + (1 if forwards else -1)
        tag = self.version << 1 | (TUPLE if is_tuple else 0)
        channel.send(self._key(direction, stage, microbatch), [t.detach() for t in tensors], tag)

    def receive(self, direction: Direction, microbatch: int) -> tuple[tuple[Tensor, ...], bool]:
        """Waits for a transfer; its tensors on `device`, and whether they were sent as a tuple.

        Raises:
            TransferTimeout, PeerLostError: it did not come.
            TransportError: the sender runs another plan in this iteration.
        """
        started = time.perf_counter()
        message: Message = self._posted.pop((direction, microbatch)).wait()
        self.wait_ms += (time.perf_counter() - started) * 1e3
        self._delays.setdefault(direction, []).append(message.delay_ms)
        if message.tag >> 1 != self.version:
            raise TransportError(
                f"iteration {self.index}: this rank ({self.topology.rank}) runs plan v{self.version}, "
                f"its neighbour sent {direction.name.lower()} {microbatch} under plan v{message.tag >> 1}"
            )
        return message.tensors, bool(message.tag & TUPLE)

    def finish(self) -> None:
        """The schedule has been executed."""
        self.total_ms = (time.perf_counter() - self._started) * 1e3
        self.mark_times_ms = self.stopwatch.times_ms()

    def spans(self) -> list[tuple[str, float, float]]:
        """(action, start, end) in ms since the iteration began on this rank; after `finish`."""
        return [
            (str(action), round(self.mark_times_ms[start], 3), round(self.mark_times_ms[end], 3))
            for action, start, end in self._marks
        ]

    def stage_times(self) -> StageTimes:
        """Medians over the microbatches; an unsplit backward counts as backward-input."""

        def median(*kinds: Kind) -> float:
            values = [
                self.mark_times_ms[end] - self.mark_times_ms[start] for a, start, end in self._marks if a.kind in kinds
            ]
            return statistics.median(values) if values else 0.0

        return StageTimes(
            forward_ms=median(Kind.F), backward_input_ms=median(Kind.I, Kind.B), backward_weight_ms=median(Kind.W)
        )

    def link_delays(self) -> tuple[LinkDelay, ...]:
        """Median one-way delay of the transfers that this rank received, per directed link."""
        stage = self.topology.stage
        source = {Direction.ACTIVATION: stage - 1, Direction.GRADIENT: stage + 1}
        return tuple(
            LinkDelay(src=source[direction], dst=stage, delay_ms=statistics.median(values), messages=len(values))
            for direction, values in self._delays.items()
        )

    def compute_ms(self) -> float:
        return sum(self.mark_times_ms[end] - self.mark_times_ms[start] for _, start, end in self._marks)

    def _key(self, direction: Direction, stage: int, microbatch: int) -> Key:
        return Key(epoch=self.epoch, direction=direction, stage=stage, microbatch=microbatch)
