"""Control messages of one rank: what it sends, and which part of it takes what arrives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from adaptra_plugin.errors import TransportError
from adaptra_plugin.runtime.messages import Message, Refused, read
from adaptra_plugin.runtime.topology import COORDINATOR

logger = logging.getLogger("adaptra")
Taker = Callable[[int, Any], None]
"""`(sender, message)`; on the control thread, or on the sender's own for messages to oneself."""
Relay = Callable[[int, dict[str, Any]], None]
"""`(sender, JSON object)`, likewise."""


class Router:
    """Thread-safe as far as the takers are.

    Args:
        rank: of this process.
        transmit: `(rank, JSON object)`; never blocks.
        silent: whether nothing is to be sent any more.
    """

    def __init__(self, rank: int, transmit: Callable[[int, dict[str, Any]], None], silent: Callable[[], bool]) -> None:
        self._rank, self._transmit, self._silent = rank, transmit, silent
        self._takers: dict[type[Message], Taker] = {}
        self._takes_refused: set[type[Message]] = set()
        self._relays: dict[str, Relay] = {}
        self._misunderstood: set[tuple[int, str]] = set()  # (sender, type) of messages that have been warned of

    def route(self, taker: Taker, *kinds: type[Message], refused: bool = False) -> None:
        """Who takes messages of these types; `refused`: also those that make no sense, as somebody waits for what they should
        have said. Messages that nobody takes do nothing."""
        for kind in kinds:
            self._takers[kind] = taker
            if refused:
                self._takes_refused.add(kind)

    def relay(self, relay: Relay, *kinds: type[Message]) -> None:
        """Who takes messages that say they are of these types, as they have come: unread and unchecked."""
        for kind in kinds:
            self._relays[kind.model_fields["type"].default] = relay

    def send(self, rank: int, message: Message) -> None:
        """To the coordinator, or from it to any rank. One to oneself is taken at once, on this thread."""
        if rank == self._rank:
            if message.type in self._relays:
                self._relays[message.type](rank, message.to_json())
            else:
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
        kind = data.get("type") if isinstance(data, dict) else None
        relay = self._relays.get(kind) if isinstance(kind, str) else None
        if relay is not None:
            relay(sender, data)
        else:
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
        kind = message.kind if isinstance(message, Refused) else type(message)
        if kind is not None and kind.by_coordinator and sender != COORDINATOR:
            raise ValueError("ignored, only the coordinator may send it")
        if isinstance(message, Refused) and kind not in self._takes_refused:
            raise ValueError(message.why)
        if kind in self._takers:
            self._takers[kind](sender, message)
