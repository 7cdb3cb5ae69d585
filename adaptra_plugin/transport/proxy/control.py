"""What frames that are no segments say: JSON messages, once and in order whatever comes first, and lists; checksums. Pure."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Container, Iterator, Sequence
from typing import Any

import xxhash

from adaptra_plugin.transport.proxy.wire import POSITIONS, MalformedFrame
from adaptra_plugin.transport.types import Direction

MAX_HELD = 4096
"""Messages that may have come ahead of a missing one."""
MAX_DEPTH = 100
"""Objects and lists in each other."""
MAX_HELD_BYTES = 64 << 20
"""Bytes of them: as much as an endpoint lets wait for a peer."""


class Untaken:
    """Control messages on their way to the other endpoint: a peer whose endpoint reads none must not fill any memory."""

    def __init__(self) -> None:
        self.number = 0
        """Of the newest one."""
        self.waiting = 0
        """Bytes."""
        self._sizes: deque[int] = deque()
        self._taken = 0

    def add(self, nbytes: int) -> int:
        """The number of a new message."""
        self._sizes.append(nbytes)
        self.waiting += nbytes
        self.number += 1
        return self.number

    def taken(self, number: int) -> None:
        """The other endpoint has read all up to `number`. Raises MalformedFrame."""
        if number > self.number:
            raise MalformedFrame(f"control message {number} was taken, {self.number} were sent")
        while self._taken < number:
            self.waiting -= self._sizes.popleft()
            self._taken += 1


class Ordered:
    """Puts numbered messages in order; numbers start at 1."""

    def __init__(self) -> None:
        self._next = 1
        self._told = 0
        self._held: dict[int, bytes] = {}
        self._bytes = 0

    def news(self) -> int:
        """The number of the last message handed over; 0 if that was said before."""
        if self._told == self._next - 1:
            return 0
        self._told = self._next - 1
        return self._told

    def take(self, number: int, body: bytes) -> Iterator[dict[str, Any]]:
        """What can be handed over now. Raises MalformedFrame."""
        if number < self._next or number in self._held:
            return
        if number != self._next and (len(self._held) >= MAX_HELD or self._bytes + len(body) > MAX_HELD_BYTES):
            raise MalformedFrame(f"control message {number} came, {self._next} is missing")
        # unpacked as late as possible: an object takes up to thirty times the room of its text
        self._held[number] = body
        self._bytes += len(body)
        while (found := self._held.pop(self._next, None)) is not None:
            self._next += 1
            self._bytes -= len(found)
            yield parse_object(found)


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises MalformedFrame unless `body` is a JSON object."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedFrame(f"a control message of {len(body)} bytes is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise MalformedFrame(f"a control message is a {type(message).__name__} instead of an object")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _deeper(message, MAX_DEPTH):
        # what can just be unpacked here could not be packed again, a few calls deeper
        raise MalformedFrame(f"a control message of {len(body)} bytes is nested more than {MAX_DEPTH} times")
    return message


def _deeper(message: Any, limit: int) -> bool:
    level = [message]
    for _ in range(limit):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def positions(body: bytes, lanes: Container[tuple[Direction, int]]) -> Iterator[tuple[tuple[Direction, int], int]]:
    """Lane and position of the messages of a CONSUMED body. Raises MalformedFrame."""
    if len(body) % POSITIONS.size:
        raise MalformedFrame(f"a list of consumed messages has {len(body)} bytes")
    for code, lane, message in POSITIONS.iter_unpack(body):
        if code not in (0, 1) or (Direction(code), lane) not in lanes:
            raise MalformedFrame(f"a message of lane {lane}, direction {code} is consumed: there is no such lane")
        yield (Direction(code), lane), message


def checksum_of(body: Sequence[memoryview | bytes]) -> int:
    """xxh3 (64 bits) of the bytes in order."""
    if len(body) == 1:
        return int(xxhash.xxh3_64_intdigest(body[0]))
    state = xxhash.xxh3_64()
    for piece in body:
        state.update(piece)
    return int(state.intdigest())
