"""A schedule that is not Adaptra's: its transfers are delegated and its computations timed, in whatever order it has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptra_plugin.errors import TransportError
from adaptra_plugin.runtime.iteration import Iteration
from adaptra_plugin.schedule.actions import Action, Kind
from adaptra_plugin.transport import Direction, Key

STEP = {Direction.ACTIVATION: 1, Direction.GRADIENT: -1}
"""To the position that a message goes to."""


@dataclass
class Following(Iteration):
    """One executed schedule of somebody else's on one rank. `actions` is empty.

    Messages between two neighbours are numbered in each direction: the n-th that one sends is the n-th that the other receives, as between
    processes that send and receive by themselves. A send returns before its receive; it blocks while the ring is full. Hosts wait
    for a send, if not at once, then before the next one but one of the same direction, and a ring has room for several
    messages. So a schedule that does not deadlock with the host's transfers does not here.
    """

    _sent: Counter[Direction] = field(default_factory=Counter)
    _asked: Counter[Direction] = field(default_factory=Counter)
    _computed: Counter[Kind] = field(default_factory=Counter)
    _inside: Action | None = None
    """The computation that is running."""
    _began: int = 0
    """Mark at which it began, or went on after it had waited."""

    @property
    def flushed(self) -> bool:
        """Whether every forward has had its backward, so that nothing is in flight."""
        return not self.training or self._computed[Kind.FORWARD] == self._computed[Kind.FULL_BACKWARD]

    def timed(self, kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a computation of that kind of this rank's first stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.computing(kind):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def computing(self, kind: Kind, chunk: int = 0) -> Iterator[None]:
        """Brackets the next computation of that kind. Waiting for a neighbour inside does not count."""
        action = Action(self.topology.own_stages[chunk], kind, self._computed[kind])
        self._computed[kind] += 1
        self._inside = action
        try:
            with self.throttle.pace(kind):
                self._began = self.stopwatch.mark()
                yield
            self._marks.append((action, self._began, self.stopwatch.mark()))
        finally:
            self._inside = None

    def send_to(self, position: int, tensor: Tensor) -> None:
        """Sends the next message to a neighbour in the pipeline. The tensor may be overwritten at once."""
        self.send_along(self._direction(self.topology.position, position), tensor)

    def send_along(self, direction: Direction, tensor: Tensor) -> None:
        """... to the next rank (activations) or the one before (gradients); the last rank's next one is the first."""
        position = (self.topology.position + STEP[direction]) % self.topology.length
        key = self._key(direction, position, self._sent[direction])
        self._sent[direction] += 1
        given = tensor.detach()
        if given.is_cuda:
            # it is read later, and nobody knows what the schedule does with it until then
            given = given.clone()
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        with self._aside(), self.presence.waiting():  # it may wait for room
            self._channel(direction, receiving=False).send(key, [given], self.version << 1)

    def receive_from(self, position: int, tensor: Tensor) -> None:
        """Waits for the next message of a neighbour and fills the tensor with it."""
        self.fill([(self.expect(position), tensor)])

    def expect(self, position: int) -> Key:
        """Posts a receive of the next message of a neighbour; `fill` waits for it."""
        return self.expect_along(self._direction(position, self.topology.position))

    def expect_along(self, direction: Direction) -> Key:
        """... of the rank before (activations) or the next one (gradients)."""
        key = self._key(direction, self.topology.position, self._asked[direction])
        self._asked[direction] += 1
        self._posted[key] = self._channel(direction, receiving=True).recv(key, self.device)
        return key

    def fill(self, expected: Sequence[tuple[Key, Tensor]]) -> None:
        """Waits for messages, in this order, and fills the tensors with them.

        Raises:
            TransportError: a message has another number or type of elements than its tensor.
        """
        for key, tensor in expected:
            with self._aside():
                (received,) = self._take(key).tensors
            if (received.numel(), received.dtype) != (tensor.numel(), tensor.dtype):
                raise TransportError(
                    f"message {key.microbatch} ({key.direction.name.lower()}) is {received.dtype} of {tuple(received.shape)}, "
                    f"{tensor.dtype} of {tuple(tensor.shape)} is expected: the two stages do not agree on their transfers"
                )
            with torch.no_grad():
                tensor.detach().copy_(received.view(tensor.shape))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside, the clock of the computation that is running, if there is one, stands still."""
        if self._inside is None:
            yield
            return
        self._marks.append((self._inside, self._began, self.stopwatch.mark()))
        yield
        self._began = self.stopwatch.mark()

    def is_neighbour(self, position: int) -> bool:
        return abs(position - self.topology.position) == 1

    def _direction(self, source: int, target: int) -> Direction:
        return Direction.ACTIVATION if target > source else Direction.GRADIENT
