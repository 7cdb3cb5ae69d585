"""What a host sees of the transport: a channel per neighbour."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.transport.clock import ClockOffset
from adaptra_plugin.transport.faults import LinkFault
from adaptra_plugin.transport.lanes import RecvLane, SendLane, lane_stats
from adaptra_plugin.transport.tickets import Fate, Loss, RecvTicket, Ticket
from adaptra_plugin.transport.types import Direction, Key, PeerInfo


class Link:
    """The lanes shared with one neighbour: per direction, as many as there are connections."""

    def __init__(self, info: PeerInfo, config: TransportConfig, fate: Fate) -> None:
        self.info = info
        self.connections = config.connections_per_direction
        self.clock = ClockOffset()
        lanes = range(self.connections)
        self.sending = {d: [SendLane(info, d, config, fate) for _ in lanes] for d in Direction}
        self.receiving = {d: [RecvLane(info, d, config, fate) for _ in lanes] for d in Direction}
        for sender in self.sending[Direction.ACTIVATION]:
            sender.relieve = self._absorb_gradient
        for receiver in self.receiving[Direction.GRADIENT]:
            receiver.on_stuck = self._nudge_activations

    def lanes(self, direction: Direction, index: int) -> tuple[SendLane, RecvLane]:
        return self.sending[direction][index], self.receiving[direction][index]

    def send_lanes(self) -> Iterator[SendLane]:
        for lanes in self.sending.values():
            yield from lanes

    def recv_lanes(self) -> Iterator[RecvLane]:
        for lanes in self.receiving.values():
            yield from lanes

    def _absorb_gradient(self) -> bool:
        return any(lane.absorb() for lane in self.receiving[Direction.GRADIENT])

    def _nudge_activations(self) -> None:
        for lane in self.sending[Direction.ACTIVATION]:
            lane.nudge()

    def abort(self, loss: Loss) -> None:
        for lane in (*self.send_lanes(), *self.recv_lanes()):
            lane.abort(loss)

    def stats(self) -> dict[str, Any]:
        return {
            "clock_offset_ms": self.clock.offset * 1e3,
            "round_trip_ms": self.clock.round_trip * 1e3,
            "directions": {
                d.word: {
                    "sent": _total([lane_stats(lane) for lane in self.sending[d]]),
                    "received": _total([lane_stats(lane) for lane in self.receiving[d]]),
                }
                for d in Direction
            },
        }


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: sum(row[name] for row in rows) for name in rows[0]}


class Channel:
    """Sends to and receives from one neighbour. Safe to use from several threads.

    Messages of a direction are spread over its connections by microbatch; those of one connection arrive in order. A
    message that is received but never taken with `wait` keeps its place in the bounded staging ring, so take them all.
    """

    def __init__(self, link: Link, fault: LinkFault, clock: Callable[[], float]) -> None:
        self.peer = link.info
        self._link = link
        self._fault = fault
        self._clock = clock

    def send(self, key: Key, tensors: Sequence[torch.Tensor], tag: int = 0) -> Ticket:
        """Copies the tensors into the staging ring and returns; they may be overwritten at once.

        Blocks only while the ring is full (one warning), at most `transport.deadline_s`. `tag` is a 64-bit number that
        the receiver finds in the message.

        While an activation is blocked, gradients that fill a receive ring of the same peer are absorbed: copied, on this
        thread and in the order of their keys, into the tickets that are posted for them. Else two stages whose sends to
        each other are both blocked would wait for ever. Memory stays bounded by the plan: no more gradients can be
        outstanding than microbatches are between forward and backward on this stage.

        Gradients need not absorb in turn. Stages form a line and a blocked one waits for one neighbour, so a deadlock
        contains two neighbours that wait for each other. One of them waiting to receive while the other is blocked
        in a send is none: consumption follows the order of sending, so all that lies in front of the missing message
        is taken already, and either it arrives or there is room for it. That leaves the earlier stage in sending an
        activation and the later one in sending a gradient, and there the earlier one absorbs. (By induction from
        stage 0, which sends no gradients: each stage's gradients find room, so each stage comes to its receives.)

        Raises:
            TransportError: the message is longer than the ring, cannot travel, or the endpoint has failed.
            TransferTimeout: the ring stayed full.
            PeerLostError: the peer is gone.
        """
        lane = self._link.sending[key.direction][key.microbatch % self._link.connections]
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return lane.send(key, tensors, tag, self._clock, self._fault.verdict(total).hold_s)

    def recv(self, key: Key) -> RecvTicket:
        """Posts a receive and returns at once; failures show in the ticket's `wait`."""
        return self._link.receiving[key.direction][key.microbatch % self._link.connections].post(key)
