"""The proxy's end of the bridge: commands and records of the endpoint come in, reports and records go out."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.bridge import MAX_PACKET, MOST_TOGETHER, RECORD, Op, Reader, Writer
from adaptra_plugin.transport.proxy.loop import READ, WRITE, Loop

_LAST_WORDS_S = 1.0
_PACKETS = 16
"""Packets of the endpoint before others get their turn."""
_PER_PACKET = MAX_PACKET // RECORD.size


class EndpointBridge:
    """Takes over both sockets; does nothing more once the endpoint is `gone`.

    Args:
        on_command: a control message has come, with descriptors.
        on_records: records have come, in order.
        on_told: all control messages have gone to the endpoint.
        on_gone: the endpoint's end is closed.
    """

    def __init__(
        self,
        loop: Loop,
        data: socket.socket,
        control: socket.socket,
        *,
        on_command: Callable[[dict[str, Any], list[int]], None],
        on_records: Callable[[Iterable[tuple[Any, ...]]], None],
        on_told: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        self.gone = False
        self._loop = loop
        self._data, self._control = data, control
        self._on_command, self._on_records, self._on_told, self._on_gone = on_command, on_records, on_told, on_gone
        data.setblocking(False)
        control.setblocking(False)
        self._reader, self._writer = Reader(control), Writer(control)
        self._records: deque[bytes] = deque()
        self._full = False  # the endpoint has taken no more records
        self._spoken = False  # something waits on the control stream
        self._controls: list[tuple[int, dict[str, Any]]] = []  # of peers, for the endpoint
        self._passing: deque[Sequence[int]] = deque()  # descriptors that are on their way to the endpoint
        loop.watch(data, READ, self._data_ready)
        loop.watch(control, READ, self._control_ready)

    # --- out

    def tell(self, event: str, descriptors: Sequence[int] = (), **fields: Any) -> None:
        """A control message; the descriptors are closed here once they have gone."""
        self._put_controls()
        self._writer.put({"event": event, **fields}, descriptors)
        self._spoken = True
        if descriptors:
            self._passing.append(descriptors)
            self.flush_control()

    def pass_on(self, rank: int, message: dict[str, Any]) -> None:
        """What a peer says; those of one turn of the loop go together."""
        self._controls.append((rank, message))
        self._spoken = True
        if len(self._controls) >= MOST_TOGETHER:
            self._put_controls()

    def _put_controls(self) -> None:
        """What peers have said comes before whatever becomes of them."""
        messages, self._controls = self._controls, []
        if not messages:
            return
        try:
            self._writer.put({"event": "control", "messages": messages})
        except TransportError:  # numbers that are longer here than the peer has written them: too long together
            for message in messages:
                self._writer.put({"event": "control", "messages": [message]})

    def record(
        self,
        op: Op,
        rank: int,
        direction: int = 0,
        lane: int = 0,
        flags: int = 0,
        message: int = 0,
        total: int = 0,
        value: float = 0.0,
        after: int = 0,
    ) -> None:
        self._records.append(RECORD.pack(op, direction, lane, flags, rank, message, total, value, after))

    def flush(self) -> None:
        """What this turn of the loop has to say leaves together."""
        if self.gone:
            return
        if self._spoken:
            self.flush_control()
        if self._records and not self._full:
            self._flush_records()

    def flush_control(self) -> None:
        self._put_controls()
        try:
            done = self._writer.flush()
        except OSError:
            self._end()
            return
        self._spoken = not done
        self._loop.watch(self._control, READ | WRITE * (not done), self._control_ready)
        if done:
            self._on_told()
            self._close_passing()

    def _flush_records(self) -> None:
        """Several records a packet; what the endpoint does not take now waits."""
        while self._records:
            batch = [self._records[index] for index in range(min(_PER_PACKET, len(self._records)))]
            try:
                self._data.send(b"".join(batch))
            except BlockingIOError:
                break
            except OSError:
                self._end()
                return
            for _ in batch:
                self._records.popleft()
        if bool(self._records) != self._full:
            self._full = not self._full
            self._loop.watch(self._data, READ | WRITE * self._full, self._data_ready)

    def last_words(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._control.settimeout(_LAST_WORDS_S)
            self._writer.put({"event": "failed", "text": text})
            self._writer.flush()

    # --- in

    def _control_ready(self, mask: int) -> None:
        if mask & WRITE:
            self.flush_control()
        if mask & READ:
            try:
                found = self._reader.receive()
            except BlockingIOError:
                return
            except OSError:
                found = None
            if found is None:
                return self._end()
            for message, descriptors in found:
                self._on_command(message, descriptors)

    def _data_ready(self, mask: int) -> None:
        if mask & WRITE:
            self._flush_records()
        if mask & READ:
            packets: list[bytes] = []
            try:
                while len(packets) < _PACKETS:
                    packets.append(self._data.recv(MAX_PACKET))
                    if not packets[-1]:
                        return self._end()
            except BlockingIOError:
                pass
            except OSError:
                return self._end()
            self._on_records(RECORD.iter_unpack(b"".join(packets)))

    # --- the end

    def _end(self) -> None:
        self.gone = True
        self._on_gone()

    def _close_passing(self) -> None:
        while self._passing:
            for fd in self._passing.popleft():
                os.close(fd)

    def close(self) -> None:
        self._close_passing()
        self._data.close()
        self._control.close()
