"""What a host sees of the transport: a channel per neighbour."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from adaptra_plugin.errors import TransportError
from adaptra_plugin.shortage import explain
from adaptra_plugin.transport.bridge import RECORD, Op, unpacked_time
from adaptra_plugin.transport.direct import DirectPath
from adaptra_plugin.transport.event_pump import Source
from adaptra_plugin.transport.frames import MalformedMessage
from adaptra_plugin.transport.lane import Lane
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.memfd import Memfd, extent_of, most_untold
from adaptra_plugin.transport.memory import Memory
from adaptra_plugin.transport.pauses import Pauses
from adaptra_plugin.transport.recv_lane import RecvLane
from adaptra_plugin.transport.send_lane import SendLane
from adaptra_plugin.transport.shared import BackpressureDrainer, Loss, Shared
from adaptra_plugin.transport.types import Direction, Key, PeerInfo
from adaptra_plugin.transport.works import RecvWork, SendWork

_REINSTALL = "Install the same release of adaptra_plugin on all ranks; if it is, the network corrupts data."


class Link:
    """The lanes shared with one neighbour, and the records that are about them.

    Args:
        info: the neighbour.
        capacity: of every ring (bytes).
        shared: what all lanes of the endpoint share.
        malformed: is called on the thread that has read nonsense, once the lanes are aborted.

    Raises:
        TransportError: the system has no shared memory to give.
    """

    def __init__(
        self, info: PeerInfo, capacity: int, shared: Shared, malformed: Callable[[PeerInfo, Loss], None]
    ) -> None:
        self.info = info
        self.connections = shared.config.connections_per_direction
        self.severed = False
        """No record of the proxy comes after this; the control stream says why."""
        self.pauses = Pauses(shared.pump.drain)
        self._malformed = malformed
        self._shared = shared
        self._path: DirectPath | None = None
        self._source: Source | None = None
        self._ahead_s = shared.clock() - time.monotonic()  # the endpoint's clock before the host's
        self.sending: dict[int, list[SendLane]] = {d: [] for d in Direction}
        self.receiving: dict[int, list[RecvLane]] = {d: [] for d in Direction}
        extent = extent_of(shared.config.segment_kib << 10, grows=shared.config.ring_grows)
        try:
            for direction in Direction:
                for index in range(self.connections):
                    ring = Memory(Memfd.create(capacity, extent))
                    self.sending[direction].append(SendLane(info, direction, index, ring, shared))
                    receive_ring = Memory(Memfd.create(capacity))
                    self.receiving[direction].append(RecvLane(info, direction, index, receive_ring, shared))
        except OSError as error:
            self.close()
            raise TransportError(
                f"no shared memory of {capacity} bytes for a staging ring towards {info} ({explain(error)}); or lower "
                "adaptra.transport.connections_per_direction or ring_mib"
            ) from None
        for receiver in self.recv_lanes():
            receiver.pauses = self.pauses
        if shared.drainer is None:
            drainer = BackpressureDrainer()
            drainer.add(self.receiving[Direction.GRADIENT])
            for sender in self.sending[Direction.ACTIVATION]:
                sender.drainer = drainer
        else:
            shared.drainer.add(self.recv_lanes())
            for lane in self.lanes():
                lane.drainer = shared.drainer

    def lanes(self) -> Iterator[Lane]:
        for direction in Direction:
            yield from self.sending[direction]
            yield from self.receiving[direction]

    def send_lanes(self) -> Iterator[SendLane]:
        for lanes in self.sending.values():
            yield from lanes

    def recv_lanes(self) -> Iterator[RecvLane]:
        for lanes in self.receiving.values():
            yield from lanes

    def descriptors(self) -> list[int]:
        """For each direction and lane: the ring that this rank fills, then the receive ring of the peer's."""
        return [
            lane.memory.memfd.fd
            for direction in Direction
            for pair in zip(self.sending[direction], self.receiving[direction], strict=True)
            for lane in pair
        ]

    def map_remote(self, descriptors: Sequence[int]) -> None:
        """Takes over the peer's own rings, for each direction and lane. Raises ValueError if they are not as announced."""
        lanes = list(self.recv_lanes())
        rest = list(descriptors)
        memfds: list[Memfd] = []
        try:
            if len(rest) != len(lanes):
                raise ValueError(f"{len(rest)} rings came, {len(lanes)} were expected")
            for lane in lanes:
                memfds.append(Memfd(rest.pop(0), lane.capacity))  # which closes one that it refuses
        except ValueError:
            for memfd in memfds:
                memfd.close()
            for fd in rest:
                os.close(fd)
            raise
        for memfd, lane in zip(memfds, lanes, strict=True):
            # a peer's rings stay the same when shared memory comes back, and messages may still wait in the mapping
            if lane.remote is not None and lane.remote.memfd.same_as(memfd):
                memfd.close()
            else:
                lane.remote = Memory(memfd)

    # --- the direct path

    def adopt(self, sock: socket.socket, me: int) -> None:
        """The peer, whose rings are mapped, can tell this rank of messages directly. A pair that came before was never used."""
        pump = self._shared.pump
        if self._path is not None and self._source is not None:
            if self.sending[Direction.ACTIVATION][0].direct is not None:
                sock.close()
                return
            pump.remove(self._source)
            self._path.close()
        untold = most_untold(next(self.recv_lanes()).capacity)
        self._path = path = DirectPath(sock, me, pump, self._shared.config.deadline_s, untold)
        for lane in self.recv_lanes():
            lane.direct = path
        self._source = Source(sock, self._direct_record, functools.partial(self._path_ended, path), path.flush)
        pump.add(self._source)

    def go_direct(self) -> None:
        """The peer listens at its end: what is sent from now on goes directly."""
        if not self.path_ended:
            for lane in self.send_lanes():
                lane.direct = self._path

    def _path_ended(self, path: DirectPath) -> None:
        path.ended = True
        path.end()  # the peer may not have noticed
        if path is self._path:
            for receiver in self.recv_lanes():
                receiver.direct = None
                receiver.peer_stuck = False  # it says so again
            for sender in self.send_lanes():
                sender.fall_back()

    @property
    def path_ended(self) -> bool:
        """Nothing more comes directly."""
        return self._path is None or self._path.ended

    def shut_path(self) -> None:
        """Nothing more goes directly."""
        if self._path is not None:
            self._path.shut()

    def _direct_record(self, packet: bytes) -> None:
        """What the peer itself says."""
        if self.path_ended:
            return
        if len(packet) != RECORD.size:
            self._nonsense("directly", f"{len(packet)} bytes are no record")
            return
        op, code, index, _, rank, position, total, _, at = RECORD.unpack(packet)
        if rank != self.info.rank or code > Direction.GRADIENT or index >= self.connections:
            self._nonsense(
                "directly", f"a record of rank {rank} about connection {index} of direction {code} is announced"
            )
        elif op == Op.ARRIVED:
            receiver = self.receiving[code][index]
            try:
                receiver.deliver_direct(position, total, unpacked_time(at) + self._ahead_s)
            except MalformedMessage as error:
                self._nonsense(f"on connection {receiver.direction.word} {receiver.index}", str(error))
        elif op == Op.CONSUMED:
            self.sending[code][index].consumed(position)
        elif op == Op.PEER_STUCK:
            self.receiving[code][index].peer_stuck = bool(total)
            self.flush()
        else:
            self._nonsense("directly", f"a record with op {op} came")

    def flush(self) -> None:
        """The peer hears now what room it has."""
        if self._path is not None and not self._path.ended:
            self._path.flush()

    def _read_path(self) -> None:
        """What the peer has told directly before it had to tell its proxy comes first."""
        while self._source is not None and self._source.read():
            pass

    # --- records

    def record(
        self, op: int, direction: int, lane: int, flags: int, position: int, total: int, value: float, after: int
    ) -> None:
        """Enters what the proxy says into the books."""
        if op == Op.ARRIVED:
            receiver = self.receiving[direction][lane]
            self._read_path()
            try:
                reference, came_s = bool(flags & 1), unpacked_time(after)
                receiver.deliver(position, total, by_reference=reference, delay_ms=value, came_s=came_s)
            except MalformedMessage as error:
                self._nonsense(f"on connection {receiver.direction.word} {receiver.index}", str(error))
        elif op == Op.ACKED:
            self.sending[direction][lane].acked(position)
        elif op == Op.CONSUMED:
            self.sending[direction][lane].consumed(position)
        elif op == Op.PEER_STUCK:
            self._read_path()
            self.receiving[direction][lane].peer_stuck = bool(total)
            self.flush()
        elif op == Op.STOOD:
            self.pauses.add(value, value + total / 1e6)
        elif op == Op.LOST:
            self.severed = True
        else:
            raise TransportError(f"the proxy has sent a record with unknown op {op}: this is a defect")

    def _nonsense(self, where: str, what: str) -> None:
        loss = Loss(TransportError, f"it sent a malformed message {where}: {what}", _REINSTALL)
        self.abort(loss)
        log.error("lost: %s: %s", self.info, loss.reason)
        self._malformed(self.info, loss)

    # --- the end

    def abort(self, loss: Loss) -> None:
        """Nothing more goes or comes; what has arrived stays readable. `EventPump.wake` has to follow."""
        if self._path is not None:
            self._path.ended = True
            self._path.end()
        for lane in self.lanes():
            lane.abort(loss)

    def close(self) -> None:
        """Gives the memory back."""
        if self._path is not None:
            self._path.close()
        for lane in self.lanes():
            lane.close()

    def stats(self) -> dict[str, Any]:
        return {
            "directions": {
                d.word: {
                    "sent": _total([lane.stats() for lane in self.sending[d]]),
                    "received": _total([lane.stats() for lane in self.receiving[d]]),
                }
                for d in Direction
            },
        }


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: sum(row[name] for row in rows) for name in rows[0]}


class Channel:
    """Sends to and receives from one neighbour. Safe to use from several threads.

    Messages of a direction are spread over its lanes by microbatch; those of one key arrive in order. A message that is
    received but never taken with `wait` keeps its place in the bounded staging ring, so take them all.
    """

    def __init__(self, link: Link) -> None:
        self.peer = link.info
        self._link = link

    def flush(self) -> None:
        """The peer hears of room that is free here now, and not only when there is time."""
        self._link.flush()

    @property
    def blocked_ms(self) -> float:
        """How long sends have waited for room, all together."""
        return sum(lane.counters.blocked_ms for lane in self._link.send_lanes())

    def send(self, key: Key, tensors: Sequence[torch.Tensor], tag: int = 0) -> SendWork:
        """Copies the tensors into the staging ring and returns; those in host memory may be overwritten at once.

        CUDA tensors are read later, beside what the device computes (`staging`): until the work is done they must not be
        changed in place, which would fail the endpoint; their memory may be let go of.

        Blocks only while the ring is full (one warning), at most `transport.deadline_s`. `tag` is a 64-bit number that
        the receiver finds in the message.

        A ring is full of messages that the peer has not copied out: whatever has been staged finds room at the peer and
        arrives. While an activation is blocked, gradients of the same peer are drained early if that peer's producer waits
        for room as well: oldest first, they are copied, on this thread, into the works that are posted for them. Else
        two stages whose sends to each other are both blocked would wait for ever. Memory stays bounded by the plan: no
        more gradients can be outstanding than microbatches are between forward and backward on this stage.

        Gradients need not drain early in turn. Stages form a line and a blocked one waits for one neighbour, so a deadlock
        contains two neighbours that wait for each other. One of them waiting to receive while the other is blocked in a
        send is none: what is staged arrives, so the missing message is not staged yet; consumption follows the order of
        sending, so all that was staged before it is taken already, the ring is empty and there is room for it. That
        leaves the earlier stage in sending an activation and the later one in sending a gradient. The later one has
        said that it waits, all gradients in its ring arrive, and receives are posted for them, because an iteration
        posts all of its receives when it begins: so the earlier one drains early until the later one finds room. (By
        induction from stage 0, which sends no gradients: each stage's gradients find room, so each stage comes to its
        receives.)

        In a ring of ranks with several model chunks (`Endpoint`, `ring`) none of this holds: chunks consume in another order than
        they are sent to, and who waits for whom may go round. There every thread that waits, in a send of either direction or
        for a message, drains early from every lane whose producer waits for room. A deadlock would contain a blocked producer (if all
        waited to receive, the plan itself would be stuck); the peer that it waits for waits as well, hears of it, has posted all
        receives of the iteration, and so drains early what lies in that ring. Memory is bounded by the plan here too: what has arrived
        and is not consumed is what the sender holds between its forward and its backward, or its own gradients.

        Raises:
            TransportError: the message is longer than the ring, cannot travel, or the endpoint has failed.
            TransferTimeout: the ring stayed full.
            PeerLostError: the peer is gone.
        """
        return self._link.sending[key.direction][key.microbatch % self._link.connections].send(key, tensors, tag)

    def recv(self, key: Key, device: torch.device | None = None) -> RecvWork:
        """Posts a receive and returns at once; failures show in the work's `wait`. `device`: where its tensors are to be;
        None: in host memory."""
        return self._link.receiving[key.direction][key.microbatch % self._link.connections].post(key, device)
