"""Control messages of one rank: what it sends, and which part of it takes what arrives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from adaptra_plugin.errors import TransportError
from adaptra_plugin.runtime.messages import Message, Refused, read
from adaptra_plugin.runtime.topology import COORDINATOR

logger = logging.getLogger("adaptra")
Handlers = Mapping[type[Message] | None, Callable[[int, Any], None]]
"""For a type of message: who takes it, as `(sender, message)`. Types that are missing do nothing."""


class Router:
    """Thread-safe as far as the handlers are.

    Args:
        rank: of this process.
        transmit: `(rank, JSON object)`; never blocks.
        silent: whether nothing is to be sent any more.
        handlers: of messages that make sense.
        refused: of messages that do not, where somebody waits for what they should have said.
    """

    def __init__(
        self,
        rank: int,
        transmit: Callable[[int, dict[str, Any]], None],
        silent: Callable[[], bool],
        handlers: Handlers,
        refused: Handlers,
    ) -> None:
        self._rank = rank
        self._transmit = transmit
        self._silent = silent
        self._handlers = handlers
        self._refused = refused
        self._misunderstood: set[tuple[int, str]] = set()  # (sender, type) of messages that have been warned of

    def send(self, rank: int, message: Message) -> None:
        """To the coordinator, or from it to any rank. One to oneself is taken at once, on this thread."""
        if rank == self._rank:
            self._take(rank, message)
        elif not self._silent():
            self.send_last(rank, message)

    def send_last(self, rank: int, message: Message) -> None:
        """As `send`, although this rank ends. Never raises."""
        try:
            self._transmit(rank, message.to_json())
        except TransportError as error:  # the endpoint has ended meanwhile: whoever waits on it hears why
            logger.debug("control message %r to rank %d is dropped: %s", message.type, rank, error)

    def receive(self, sender: int, data: Any) -> None:
        """A message has arrived (on the control thread). One that makes no sense does nothing."""
        self._take(sender, read(data))

    def _take(self, sender: int, message: Message | Refused) -> None:
        try:
            self._hand_over(sender, message)
        except Exception as error:
            known = (sender, str(message.type)[:40])
            level = logging.DEBUG if known in self._misunderstood else logging.WARNING
            self._misunderstood.add(known)
            trace = None if isinstance(error, ValueError) else error
            logger.log(level, "control message %.40r of rank %d: %s", message.type, sender, error, exc_info=trace)

    def _hand_over(self, sender: int, message: Message | Refused) -> None:
        is_refused = isinstance(message, Refused)
        kind = message.kind if isinstance(message, Refused) else type(message)
        if kind is not None and kind.by_coordinator and sender != COORDINATOR:
            raise ValueError("ignored, only the coordinator may send it")
        handler = (self._refused if is_refused else self._handlers).get(kind)
        if handler is not None:
            handler(sender, message)
        elif isinstance(message, Refused):
            raise ValueError(message.why)
