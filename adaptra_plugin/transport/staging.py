"""Tensors on a device: copies to and from the staging rings beside the computation, never with the host waiting in it.

Sending: the caller reserves room in the ring, marks its current stream with an event and goes on. The endpoint's *copier*, one
small thread, lets a stream of its own wait for that event, copies into the ring, sleeps until the copy is complete, and
only then tells the proxy of the message, in the order of the positions. So the copies of messages overlap the computation
and the wire of the messages before them; and long messages go in parts (`PART_SEGMENTS`), so that the wire carries one while
the next is copied. A tensor must not be changed in place until it has been copied: one that was fails the endpoint instead
of sending bytes that nobody meant.

Receiving: a message is copied out of the receive ring into pinned memory (which a blocked send may have done before) and from
there, on a stream of its own, to the device; the consumer's current stream waits for that, the host does not. The oldest
message of a lane that is asked for is fetched when it has come, and part by part while it comes, by another small thread; no
more than one a lane lies on the device ahead of its turn.

Rings are registered as pinned memory (`cudaHostRegister`); where that does not work, copies go through two pinned buffers.
Tensors in host memory do not come here at all.

What is above `Cuda` is tested with a device that tests make up; `Cuda` itself has not been run on a GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from adaptra_plugin.errors import TransportError
from adaptra_plugin.shortage import told
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.memory import Memory
from adaptra_plugin.transport.tensors import aligned, as_bytes, overlaps

PART_SEGMENTS = 4
"""What comes from a device goes in parts of so many segments (`transport.segment_kib`)."""
_END_S = 5.0


class Event(Protocol):
    """A point of a stream."""

    def synchronize(self) -> None:
        """Sleeps until the stream has come there; lets other threads run."""


class Device(Protocol):
    """What is asked of an accelerator. *The stream* is one that nothing but copies to host memory run on."""

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in its memory."""

    def serves(self, device: torch.device) -> bool:
        """Whether that is its memory."""

    def mark(self, tensor: torch.Tensor) -> Event:
        """Caller: a point on its current stream, of the device of `tensor`."""

    def follow(self, event: Event, tensors: Sequence[torch.Tensor]) -> None:
        """Copier's thread: the stream waits for `event`, and will use the tensors, all of one device."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        """To host memory, on the stream."""

    def pin(self, memory: torch.Tensor) -> bool:
        """Makes host memory fit for copies beside the computation; False if it cannot."""

    def unpin(self, memory: torch.Tensor) -> None: ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that is fit for them."""

    def here(self, device: torch.device) -> torch.device:
        """Caller: which one is meant, where `device` has no index."""

    def like(self, tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
        """Room on the device for copies of tensors in host memory, to be filled by `upload`."""

    def upload(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> Event:
        """To the device, on a stream of its own kind, each (target, source); the event is behind the copies."""

    def join(self, event: Event, tensors: Sequence[torch.Tensor]) -> None:
        """Caller: its current stream waits for `event`, and will use the tensors."""


class Cuda:
    """Streams and events of torch, also of its ROCm build. Not run on a GPU yet."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()

    def _stream(self, device: torch.device, way: str = "down") -> Any:
        """One for each way: a copy to the device must not wait for what is still to be computed there."""
        index = torch.cuda.current_device() if device.index is None else device.index
        with self._lock:
            found = self._streams.get((way, index))
            if found is None:
                found = self._streams[way, index] = torch.cuda.Stream(device=index)
        return found

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def mark(self, tensor: torch.Tensor) -> Any:
        return torch.cuda.current_stream(tensor.device).record_event()

    def follow(self, event: Any, tensors: Sequence[torch.Tensor]) -> None:
        # of this thread, which else would pin memory for the first device, and wake it up for that
        torch.cuda.set_device(tensors[0].device)
        stream = self._stream(tensors[0].device)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        stream = self._stream(source.device)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # who waits for it sleeps
            event.record(stream)
        return event

    def pin(self, memory: torch.Tensor) -> bool:
        try:
            return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0
        except (RuntimeError, AttributeError):
            return False

    def unpin(self, memory: torch.Tensor) -> None:
        with contextlib.suppress(RuntimeError, AttributeError):
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # torch keeps such memory for the next time, and back from it only what no copy uses any more
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)

    def here(self, device: torch.device) -> torch.device:
        if device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", torch.cuda.current_device())  # of this thread

    def like(self, tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
        # allocated on the stream that fills it: on the consumer's, memory could be had that its kernels still read
        with torch.cuda.stream(self._stream(device, "up")):
            return tuple(torch.empty_like(tensor, device=device) for tensor in tensors)

    def upload(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> Any:
        stream = self._stream(device, "up")
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return stream.record_event()

    def join(self, event: Any, tensors: Sequence[torch.Tensor]) -> None:
        if tensors:
            stream = torch.cuda.current_stream(tensors[0].device)
            stream.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(stream)


@dataclass(slots=True)
class Piece:
    """A tensor's bytes, on a device, that are to lie at `position` of a ring."""

    position: int
    data: torch.Tensor


@dataclass(slots=True)
class _Job:
    memory: Memory
    pieces: Sequence[Piece]
    versions: list[int | None]
    event: Event | None
    name: str
    done: Callable[[], None]


class SerialExecutor:
    """Runs calls one after the other on a thread, which starts with the first one. A call that raises is the last one.

    Args:
        name: of the thread.
        at_end: runs on the thread when it ends.
    """

    def __init__(self, name: str, at_end: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._at_end = at_end
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def put(self, call: Callable[[], None]) -> None:
        with self._changed:
            if self._stopped:
                return  # the endpoint has failed or ended, and its works say why
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                with told(f"the thread {self._name} cannot be started", TransportError):
                    thread.start()
                self._thread = thread
            self._calls.append(call)
            self._changed.notify_all()

    def finish(self, limit_s: float) -> bool:
        """Waits until nothing is left to do (s); False if there is."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._calls or self._busy), limit_s)

    def close(self, limit_s: float) -> bool:
        """Ends the thread, and drops what waits; False if it does not end within `limit_s`."""
        self._stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(limit_s)
            return not self._thread.is_alive()
        return True

    def _stop(self) -> None:
        with self._changed:
            self._stopped, self._busy = True, False
            self._calls.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while (call := self._next()) is not None:
                call()
                del call  # not kept while it waits: what it holds is the device's memory
        finally:
            self._stop()
            self._at_end()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._calls or self._stopped)
            if self._stopped:
                return None
            self._busy = True
            return self._calls.popleft()


class Copier:
    """Copies to the rings of one endpoint. The thread starts with the first tensor on a device.

    Args:
        rank: for the thread's name.
        failed: is called on the copier's thread with the reason of a failure, after which nothing is copied any more.
        segment_bytes: size of the buffers for rings that cannot be pinned.
        device: the accelerator.
    """

    def __init__(
        self, rank: int, failed: Callable[[str], None], segment_bytes: int, device: Device | None = None
    ) -> None:
        self.device: Device = device or Cuda()
        self.copies = SerialExecutor(f"adaptra-copier-{rank}", self._unpin)
        """To the rings."""
        self.fetches = SerialExecutor(f"adaptra-fetcher-{rank}")
        """Uploads that come before anybody waits: their own thread, because a copy waits for the computation."""
        self._failed = failed
        self._segment = segment_bytes
        self._pins: dict[tuple[Memory, int], torch.Tensor | None] = {}  # extents; None: it cannot be pinned
        self._bounce: list[torch.Tensor] = []

    def submit(
        self, memory: Memory, pieces: Sequence[Piece], event: Event | None, name: str, done: Callable[[], None]
    ) -> None:
        """Caller: `done` runs on the copier's thread when the pieces, and all that was submitted before, lie in the ring.

        With no pieces it keeps a message behind those that are being copied. `event`: behind what computes the pieces. `name`:
        of the message, for an error.
        """
        job = _Job(memory, pieces, [_version(piece.data) for piece in pieces], event if pieces else None, name, done)
        self.copies.put(lambda: self._serve(job))

    def finish(self, limit_s: float) -> bool:
        """Waits until all is copied to the rings (s); False if it is not."""
        return self.copies.finish(limit_s)

    def close(self) -> None:
        """Ends the threads. Before the rings are unmapped; what is not copied yet is dropped."""
        if not all([self.copies.close(_END_S), self.fetches.close(_END_S)]):
            log.error("the device does not complete a copy: the memory that it writes to is not given back")

    def _unpin(self) -> None:
        for area in self._pins.values():
            if area is not None:
                self.device.unpin(area)
        self._pins.clear()

    def _serve(self, job: _Job) -> None:
        try:
            self._copy(job)
            job.done()
        except Exception as error:  # noqa: BLE001  whoever waits for the message hears it
            self._failed(f"{job.name} could not be copied from the device: {type(error).__name__}: {error}")

    def _copy(self, job: _Job) -> None:
        if job.event is None:
            return
        self.device.follow(job.event, [piece.data for piece in job.pieces])
        last: Event | None = None
        for piece in job.pieces:
            at = 0
            for number, start, stop in job.memory.memfd.extents(piece.position, piece.data.numel()):
                part = piece.data[at : at + stop - start]
                area = self._pinned(job.memory, number)
                if area is None:
                    self._detour(job.memory, Piece(piece.position + at, part))
                else:
                    last = self.device.copy(area[start:stop], part)
                at += stop - start
        if last is not None:
            last.synchronize()
        for piece, version in zip(job.pieces, job.versions, strict=True):
            if version != _version(piece.data):
                raise RuntimeError(
                    "it was changed in place before it was copied: leave a tensor alone until its work is done, or "
                    "send a clone"
                )

    def _pinned(self, memory: Memory, number: int) -> torch.Tensor | None:
        """An extent of a ring."""
        if (memory, number) not in self._pins:
            extent = memory.memfd.extent
            area = memory.tensor[number * extent : (number + 1) * extent]
            self._pins[memory, number] = area if self.device.pin(area) else None
            if self._pins[memory, number] is None:
                log.warning("a staging ring cannot be pinned: copies from the device take a detour")
        return self._pins[memory, number]

    def _detour(self, memory: Memory, piece: Piece) -> None:
        """Through two pinned buffers: one fills while the other is copied into the ring."""
        if not self._bounce:
            self._bounce = [self.device.pinned((self._segment,), torch.uint8) for _ in range(2)]
        before: tuple[Event, int, torch.Tensor] | None = None
        for number, at in enumerate(range(0, piece.data.numel(), self._segment)):
            part = piece.data[at : at + self._segment]
            buffer = self._bounce[number % 2][: part.numel()]
            event = self.device.copy(buffer, part)
            if before is not None:
                self._land(memory, *before)
            before = (event, piece.position + at, buffer)
        if before is not None:
            self._land(memory, *before)

    def _land(self, memory: Memory, event: Event, position: int, buffer: torch.Tensor) -> None:
        event.synchronize()
        memory.copy_in(position, buffer)


class Block(NamedTuple):
    """A tensor's bytes, and where they begin in the payload."""

    start: int
    data: torch.Tensor
    later: bool
    """They are on the device, and copied from there by the copier."""

    @property
    def nbytes(self) -> int:
        return self.data.numel()


def blocks(tensors: Sequence[torch.Tensor], device: Device) -> list[Block]:
    """The payload of a message. Raises TransportError: the tensors are on several devices, or one has no memory."""
    found: list[Block] = []
    there: torch.device | None = None
    start = 0
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            later = device.owns(tensor)
            # from devices that cannot be copied from beside the computation, it is done now
            block = Block(start, as_bytes(tensor if later or tensor.device.type == "cpu" else tensor.cpu()), later)
            if not later and not block.data.data_ptr():
                raise TransportError(
                    f"tensor {index} ({type(tensor).__name__}) has no memory of its own: send the plain tensor behind it "
                    "(of a DTensor: `to_local()`)"
                )
            if later:
                there = there or block.data.device
                if block.data.device != there:
                    raise TransportError(
                        f"a message has tensors on {there} and {block.data.device}: send them one by one"
                    )
            found.append(block)
            start += aligned(block.nbytes)
    return found


def stage(memory: Memory, position: int, payload: Sequence[Block], at: int, nbytes: int) -> list[Piece]:
    """Copies bytes `at` to `at + nbytes` of a payload to `position` of a ring, except for what is on the device: that is
    returned."""
    later: list[Piece] = []
    for index, first, last in overlaps(payload, at, at + nbytes):
        block = payload[index]
        to = position + block.start + first - at
        data = block.data if last - first == block.nbytes else block.data[first:last]
        if block.later:
            later.append(Piece(to, data))
        else:
            memory.copy_in(to, data)
    return later


def _version(tensor: torch.Tensor) -> int | None:
    """Counts changes in place, which views share; None for tensors that do not count."""
    return None if tensor.is_inference() else tensor._version
