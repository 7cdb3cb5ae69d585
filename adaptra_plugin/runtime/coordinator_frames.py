"""What rank 0 and the process of its coordinator say to each other: frames over a pair of connected sockets.

    kind (1 byte) | number (8 bytes, signed) | bytes of the payload (4 bytes) | payload

Both ends belong to one job and one user: nothing is authenticated, and nothing is pickled.
"""

from __future__ import annotations

import enum
import json
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

_HEADER = struct.Struct("<BqI")
_READ_BYTES = 1 << 18


class Frame(enum.IntEnum):
    """Those below 16 go to the coordinator, the others come from it."""

    HELLO = 0
    """Payload: `pipelines`, `chunks`, `config`, `hosts` (by rank), `microbatches`, `schedule` (null: as configured)."""
    BEGUN = 1
    """Number: the newest iteration that has begun on rank 0."""
    MESSAGES = 2
    """Payload: a list of [rank, its message as it came]."""
    REPORTS = 3
    """Payload: a JSON list of ranks, and a line for each: its packed report as it came."""
    KEEP = 4
    """Payload: the schedule that is run instead of the configured one."""
    CLOSE = 5
    COMPLETE = 16
    """Number: the newest iteration that all ranks have reported."""
    SEND = 17
    """Payload: `ranks`, `message`."""
    EVENT = 18
    """Payload: a `StragglerEvent`."""
    OVERVIEW = 19
    """Payload: metrics of an iteration of the whole pipeline."""
    PLAN = 20
    """A prepared plan is committed. Number: its version. Payload: `first_iteration`, `reason`."""


def frame(kind: Frame, number: int = 0, payload: bytes = b"") -> bytes:
    return _HEADER.pack(kind, number, len(payload)) + payload


def json_frame(kind: Frame, value: Any, number: int = 0) -> bytes:
    return frame(kind, number, json.dumps(value, separators=(",", ":"), check_circular=False).encode())


def message_frames(messages: Sequence[tuple[int, dict[str, Any]]]) -> list[bytes]:
    """Of ranks' messages as they came. Nearly all are packed reports, which need no JSON."""
    ranks, lines, others = [], [], []
    for rank, data in messages:
        packed = data.get("packed")
        if type(packed) is str and data["type"] == "report" and len(data) == 2:
            ranks.append(rank)
            lines.append(packed)
        else:
            others.append((rank, data))
    text = "\n".join(lines)
    if text.count("\n") >= max(len(lines), 1):  # one of them is none
        return [json_frame(Frame.MESSAGES, messages)]
    frames = [frame(Frame.REPORTS, 0, f"{json.dumps(ranks)}\n{text}".encode("ascii", "replace"))] if ranks else []
    return [*frames, json_frame(Frame.MESSAGES, others)] if others else frames


def reports_of(payload: bytes) -> Iterator[tuple[int, str]]:
    """Ranks and packed reports of a `REPORTS` frame."""
    ranks, *lines = payload.decode("ascii").split("\n")
    return zip(json.loads(ranks), lines, strict=True)


class FrameReader:
    """Takes frames out of a blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def receive(self) -> Iterator[tuple[Frame, int, bytes]]:
        """Reads once; the frames that are complete.

        Raises:
            EOFError: the other end is closed.
            TimeoutError: nothing has come within the socket's timeout.
            ValueError: what came is no frame.
        """
        try:
            data = self._sock.recv(_READ_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        self._buffer += data
        return self._complete()

    def _complete(self) -> Iterator[tuple[Frame, int, bytes]]:
        at = 0
        while len(self._buffer) >= at + _HEADER.size:
            kind, number, length = _HEADER.unpack_from(self._buffer, at)
            end = at + _HEADER.size + length
            if len(self._buffer) < end:
                break
            yield Frame(kind), number, bytes(self._buffer[at + _HEADER.size : end])
            at = end
        del self._buffer[:at]
