"""What a caller holds while a transfer is under way, and how it learns that it failed."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch

from adaptra_plugin.errors import TransferTimeout
from adaptra_plugin.transport.frames import MessageHeader
from adaptra_plugin.transport.lane import Lane
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.memory import Memory
from adaptra_plugin.transport.message import Message
from adaptra_plugin.transport.pauses import Pauses
from adaptra_plugin.transport.shared import Loss
from adaptra_plugin.transport.staging import Event
from adaptra_plugin.transport.tensors import Assembly, Spec, flat, overlaps
from adaptra_plugin.transport.types import Key


@dataclass(slots=True)
class Arrived:
    """A message, or a part of one, in the receive ring, or in the peer's ring."""

    position: int
    total: int
    memory: Memory
    payload_at: int
    specs: tuple[Spec, ...]  # of all tensors of the message, in its first part
    header: MessageHeader
    delay_ms: float
    came_s: float = 0.0
    direct: bool = False  # its sender is told directly that it has been copied out
    work: RecvWork | None = None  # the receive that it belongs to, once that is posted

    @property
    def at(self) -> int:
        return self.header.at

    @property
    def nbytes(self) -> int:
        return self.header.payload_bytes

    @property
    def is_last(self) -> bool:
        return not self.header.rest

    @property
    def tag(self) -> int:
        return self.header.tag


class Source(Lane):
    """What a receive needs of its lane."""

    pauses: Pauses | None

    @abstractmethod
    def assembly(self, first: Arrived, device: torch.device | None) -> Assembly: ...

    @abstractmethod
    def release(self, arrived: Arrived) -> None: ...

    @abstractmethod
    def fetched(self, work: RecvWork) -> None: ...

    @abstractmethod
    def copied(self) -> None: ...


class _Pending:
    """Something to wait for."""

    __slots__ = ("_completed", "_lane", "_loss", "key")
    _lane: Lane

    def __init__(self, key: Key) -> None:
        self.key = key
        self._completed = False
        self._loss: Loss | None = None

    def complete(self, loss: Loss | None = None) -> bool:
        """Ends the wait, well or with `loss`; the lane calls it under its lock. False if it was complete before."""
        if self._completed:
            return False
        self._loss = loss
        self._completed = True
        return True

    def _over(self) -> bool:
        return self._completed or self._lane.fate.error is not None

    def _over_or_needed(self) -> bool:
        return self._over() or self._lane.drainer.possible()

    def ready(self) -> bool:
        """True when `wait` would not block."""
        if not self._over():
            self._lane.pump.drain()
        return self._over()

    def _await(self, deadline_s: float | None, verb: str, timeout_text: str) -> None:
        lane = self._lane
        lane.fate.check()
        limit = lane.deadline_s if deadline_s is None else deadline_s
        started = time.monotonic()
        while not self._over():
            if not lane.pump.wait(self._over_or_needed, started + max(0.0, limit)):
                raise TransferTimeout(
                    f"{self.key} {timeout_text} {lane.peer} within {limit:g} s. {lane.situation()} That rank is stuck "
                    "or its host is unreachable: look at the end of its log; if transfers may take this long, raise "
                    "adaptra.transport.deadline_s"
                )
            if not self._over():
                lane.drainer.drain_one()
        lane.fate.check()
        if self._loss is not None:
            raise self._loss.about(self.key, verb, lane.peer, time.monotonic() - started)


class SendWork(_Pending):
    """A send under way."""

    __slots__ = ("missing",)

    def __init__(self, key: Key, lane: Lane) -> None:
        super().__init__(key)
        self._lane = lane
        self.missing: set[int] = set()
        """Positions of the parts that have not arrived."""

    def arrived(self, position: int) -> None:
        """One of its parts has; the lane calls it under its lock."""
        self.missing.discard(position)
        if not self.missing:
            self.complete()

    def wait(self, deadline_s: float | None = None) -> None:
        """Returns when the message has arrived at the peer (seconds; None: `transport.deadline_s`).

        Raises:
            TransferTimeout: names the transfer, the peer and what to do.
            PeerLostError: the peer is gone; so it says why.
            TransportError: the connection or the endpoint has failed.
        """
        self._await(deadline_s, "be sent to", "was not taken by")


class RecvWork(_Pending):
    """A posted receive."""

    __slots__ = (
        "_arrived",
        "_assembly",
        "_copied",
        "_copying",
        "_device",
        "_message",
        "_on_device",
        "_sent_up",
        "_uploaded",
    )
    _lane: Source

    def __init__(self, key: Key, lane: Source, device: torch.device | None = None) -> None:
        super().__init__(key)
        self._lane = lane
        self._device = device  # where its tensors have still to go
        self._arrived: dict[int, Arrived] = {}  # parts by where they begin in the payload
        self._assembly: Assembly | None = None
        self._copied = 0  # bytes of the payload that are out of the ring
        self._on_device: tuple[torch.Tensor, ...] | None = None
        self._sent_up = 0  # bytes of the payload that are there or on their way
        self._uploaded: Event | None = None
        self._message: Message | None = None
        self._copying = threading.Lock()  # one thread copies

    def arrive(self, arrived: Arrived) -> bool:
        """A part, or the whole message, is there; the lane calls it under its lock. False if the wait has already failed."""
        if self._completed:
            return False
        arrived.work = self
        if arrived.at >= self._copied:
            self._arrived[arrived.at] = arrived
        return self.complete() if arrived.is_last else True

    @property
    def idle(self) -> bool:
        """Nobody copies the message right now."""
        return not self._copying.locked()

    def drain_early(self) -> bool:
        """Copies what has arrived out of the staging ring before anybody waits for it. False if another thread does so, or
        has."""
        if not self._copying.acquire(blocking=False):
            return False
        try:
            return self._take()
        finally:
            self._copying.release()
            self._lane.copied()

    def _take(self) -> bool:
        """Copies the next part out; False if it is not there."""
        arrived = self._arrived.get(self._copied)
        if arrived is not None and self._message is None:
            if self._assembly is None:
                self._assembly = self._lane.assembly(arrived, self._device)
            self._assembly.fill(arrived.memory, arrived.payload_at, arrived.at, arrived.nbytes)
            message = self._whole(arrived, self._assembly) if arrived.is_last else None
            # before its room is given back: should a signal handler raise, nothing is copied again that may be overwritten
            self._copied, self._message = arrived.at + arrived.nbytes, message
        # and, then, what it kept from being given back
        done = [part for part in list(self._arrived.values()) if part.at < self._copied or self._message is not None]
        for part in done:
            self._lane.release(part)
            self._arrived.pop(part.at, None)
        return bool(done)

    def _whole(self, last: Arrived, assembly: Assembly) -> Message:
        return Message(assembly.tensors, last.tag, last.delay_ms, last.came_s, self._lane.pauses)

    def fetch(self) -> None:
        """Takes what has arrived to the device before anybody waits for it; what fails is left to `wait`."""
        if self._copying.acquire(blocking=False):
            try:
                while self._take():
                    pass
                self._upload()
            except Exception as error:  # noqa: BLE001  the caller of `wait` tries again, and hears it
                log.debug("%s could not be fetched before it was waited for: %s", self.key, error)
            finally:
                self._copying.release()
                self._lane.copied()

    @property
    def for_device(self) -> bool:
        """Its tensors have still to go to a device that can be copied to beside the computation."""
        return self._device is not None and self._lane.copier.device.serves(self._device)

    def _upload(self) -> None:
        """Caller: what is new in host memory goes to the device. What raises, out of memory for one, may be tried again."""
        if self._device is None or self._assembly is None or (self._message is None and self._sent_up == self._copied):
            return
        accelerator = self._lane.copier.device
        if accelerator.serves(self._device):
            host = self._assembly.tensors
            if self._on_device is None:
                self._on_device = accelerator.like(host, self._device)
            pairs = [
                (flat(self._on_device[index])[first:last], flat(host[index])[first:last])
                for index, first, last in overlaps(self._assembly.specs, self._sent_up, self._copied)
            ]
            self._uploaded = accelerator.upload(pairs, self._device)
            self._sent_up = self._copied
            if self._message is not None:
                self._message = replace(self._message, tensors=self._on_device)
                self._device = self._assembly = None
        elif self._message is not None:
            self._message = self._message.to(self._device)
            self._device = self._assembly = None

    def wait(self, deadline_s: float | None = None) -> Message:
        """The message, copied out of the staging ring on this thread at the first call unless a blocked send has done
        it before, see `Channel.send` (seconds; None: `transport.deadline_s`). On a CUDA device the tensors are complete
        for what this thread's current stream does from now on; the host does not wait for the device.

        Raises:
            TransferTimeout: names the transfer, the peer and what to do.
            PeerLostError: the peer is gone and the message had not arrived.
            TransportError: the connection or the endpoint has failed.
        """
        self._await(deadline_s, "arrive from", "did not arrive from")
        try:
            with self._copying:
                while self._take():
                    pass
                self._upload()
                assert self._message is not None
                if self._uploaded is not None:
                    self._lane.copier.device.join(self._uploaded, self._message.tensors)
                    self._lane.fetched(self)
                return self._message
        finally:
            self._lane.copied()
