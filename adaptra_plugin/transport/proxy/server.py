"""The proxy of a rank: serves its endpoint over the bridge, and its peers over their rails. Single-threaded."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from adaptra_plugin.errors import TransportError
from adaptra_plugin.shortage import explain
from adaptra_plugin.transport.bind import is_loopback
from adaptra_plugin.transport.bridge import MAX_CONTROL_BACKLOG, Op, packed_time
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.endpoint_bridge import EndpointBridge
from adaptra_plugin.transport.proxy.events import LaneKey, Rings
from adaptra_plugin.transport.proxy.handshake import Claim, Settings
from adaptra_plugin.transport.proxy.health import State
from adaptra_plugin.transport.proxy.inbox import Incoming
from adaptra_plugin.transport.proxy.listeners import Listeners
from adaptra_plugin.transport.proxy.loop import Loop, Timer
from adaptra_plugin.transport.proxy.peer import LEFT, Neighbour, Peer
from adaptra_plugin.transport.proxy.peer_prober import ONLY_ITS_HOST
from adaptra_plugin.transport.proxy.placing import place
from adaptra_plugin.transport.proxy.rails.base import Rail
from adaptra_plugin.transport.proxy.rails.faulty import Faults
from adaptra_plugin.transport.proxy.rails.registry import FACTORIES
from adaptra_plugin.transport.proxy.rails.setup import RailFactory
from adaptra_plugin.transport.proxy.settings import ProxySettings
from adaptra_plugin.transport.proxy.silence import TICK_S
from adaptra_plugin.transport.proxy.tls import Tls
from adaptra_plugin.transport.types import Direction, EndpointInfo, PeerInfo

_IDLE_TICK_S = 0.5
FAREWELL_S = 0.5


class Proxy:
    """Runs until its endpoint closes it, or is gone.

    Args:
        data, control: the proxy's ends of the bridge; taken over.
    """

    settings: ProxySettings
    me: PeerInfo
    endpoint_info: EndpointInfo
    secret: bytes
    tls: Tls | None = None

    def __init__(self, data: socket.socket, control: socket.socket) -> None:
        self.loop = Loop()
        self.factories: Sequence[RailFactory] = [make() for make in FACTORIES]
        self._bridge = EndpointBridge(
            self.loop,
            data,
            control,
            on_command=self._command,
            on_records=self._transfers,
            on_told=self._told,
            on_gone=self.loop.stop,
        )
        self._listeners = Listeners(self, self._authenticated)
        self._peers: dict[int, Peer] | None = None
        self._early: list[tuple[socket.socket, Claim, Settings]] = []  # came before `connect`
        self._memfds: list[Memfd] = []
        self._connecting: Timer | None = None
        self._closing: Timer | None = None
        self.loop.turn_ended = self._turn_ended

    def run(self) -> None:
        """Serves; gives back every descriptor at the end."""
        try:
            self.loop.run()
        except Exception as error:
            self._bridge.last_words(f"{type(error).__name__}: {explain(error)}")
            raise
        finally:
            self._give_back()

    def stop(self) -> None:
        """The endpoint is gone: peers see connections that end without goodbye."""
        self._bridge.gone = True
        self.loop.stop()

    # --- the endpoint's commands

    def _command(self, message: dict[str, Any], descriptors: list[int]) -> None:
        op = message["op"]
        if op == "start":
            self._start(message)
        elif op == "connect":
            self._connect(message, descriptors)
        elif op in ("mapped", "unmapped"):
            self._peer(message["rank"], lambda peer: peer.mapped(message.get("why")))
        elif op == "control":
            data = message["message"].encode()
            self._peer(message["rank"], lambda peer: peer.link.send_control(data))
        elif op == "stats":
            refused = self._listeners.refused
            peers = {peer.info.rank: peer.stats() for peer in self._each_peer()}
            self._bridge.tell("stats", id=message["id"], data={"refused_connections": refused, "peers": peers})
        elif op == "close":
            self._begin_close(float(message["linger_s"]))

    def _peer(self, rank: int, action: Any) -> None:
        peer = (self._peers or {}).get(rank)
        if peer is not None and not peer.gone:
            action(peer)

    def _each_peer(self) -> Sequence[Peer]:
        return list((self._peers or {}).values())

    # --- start

    def _start(self, message: dict[str, Any]) -> None:
        self.me = PeerInfo(**message["me"])
        self.settings = ProxySettings.of(message["config"])
        self.secret = bytes.fromhex(message["secret"])
        place(self.settings)
        self.loop.spin_s = self.settings.spin_us / 1e6
        offset = float(message.get("clock_offset_s", 0.0))
        if offset:
            clock = self.loop.clock
            self.loop.clock = lambda: clock() + offset
        self._faults = Faults(message.get("simulate") or {}, self.me.pp_rank, self.loop)
        try:
            self.tls = Tls(self.settings.tls) if self.settings.tls else None
            for factory in self.factories:
                factory.find(self.loop, self.settings)
            advertised = {name: value for factory in self.factories for name, value in factory.advertised().items()}
            self.endpoint_info = self._listeners.open(str(message["bind"]), message.get("shown"), advertised)
        except (TransportError, OSError) as error:
            self._bridge.tell("start_failed", text=explain(error))
            return
        self.loop.pulse.stood = self._stood
        self._bridge.tell("ready", endpoint_info=self.endpoint_info.to_text())
        self._tick()

    def _connect(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """Dials, or waits for, every peer. Of two, the coordinator is dialled, else the higher rank."""
        coordinator, deadline_s = int(message["coordinator"]), float(message["deadline_s"])
        self._peers = {}
        self._connecting = self.loop.call_later(deadline_s, lambda: self._give_up(deadline_s))
        remind_s = float(message["remind_s"])
        self.loop.call_later(remind_s, lambda: self._remind(remind_s))
        neighbours = sum(bool(entry["neighbour"]) for entry in message["peers"])
        wanted = neighbours * len(Direction) * self.settings.connections_per_direction * 2
        if len(descriptors) < wanted:
            for fd in descriptors:
                os.close(fd)
            full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # the kernel has dropped what found no room
            self._connect_failed("TransportError", f"the proxy cannot take {wanted} rings ({explain(full)})")
            return
        fds = iter(descriptors)
        for entry in message["peers"]:
            info = PeerInfo(int(entry["rank"]), int(entry["pp_rank"]), str(entry["host"]))
            endpoint_info = EndpointInfo.parse(entry["endpoint_info"])
            near = self._neighbour(endpoint_info, fds) if entry["neighbour"] else None
            dials = self.me.rank != coordinator and (info.rank == coordinator or self.me.rank < info.rank)
            self._peers[info.rank] = Peer(self, info, endpoint_info, near, dials=dials)
        for peer in self._each_peer():
            peer.start()
        early, self._early = self._early, []
        for arrival in early:
            self._authenticated(*arrival)
        self._check_connected()

    def _neighbour(self, endpoint_info: EndpointInfo, fds: Any) -> Neighbour:
        capacity = min(self.settings.ring_bytes, endpoint_info.ring_bytes)
        rings: dict[LaneKey, Rings] = {}
        for direction in Direction:
            for lane in range(self.settings.connections_per_direction):
                ring, receive_ring = Memfd(next(fds), capacity, self.settings.ring_extent), Memfd(next(fds), capacity)
                self._memfds += (ring, receive_ring)
                rings[direction, lane] = Rings(ring, receive_ring)
        return Neighbour(rings, min(capacity, self.settings.max_message_mib << 20))

    def _authenticated(self, sock: socket.socket, claim: Claim, settings: Settings) -> None:
        if self._peers is None:
            self._early.append((sock, claim, settings))
            return
        peer = self._peers.get(claim.source)
        if peer is None:
            reason: str | None = f"rank {claim.source} is no neighbour of rank {self.me.rank}"
        elif peer.info.pp_rank != claim.pp_rank:
            reason = f"rank {claim.source} says it is stage {claim.pp_rank}, here it is known as {peer.info}"
        else:
            reason = peer.adopt(sock, claim)
        if reason is not None:
            self._listeners.refuse(sock, reason)

    def _give_up(self, deadline_s: float) -> None:
        only_here = all(is_loopback(address.host) for address in self.endpoint_info.addresses)
        loopback = f", loopback, {ONLY_ITS_HOST}" if only_here else ""
        self._connect_failed(
            "TransportError",
            f"rank {self.me.rank} is not connected after {deadline_s:g} s; missing: {self._missing()}. It listens on "
            f"{self.endpoint_info}{loopback}. Check that they run and that a firewall lets them through, or raise "
            "adaptra.transport.connect_deadline_s",
        )

    def _missing(self) -> str:
        return ", ".join(peer.missing() for peer in self._each_peer() if not peer.up)

    def _remind(self, pause_s: float) -> None:
        if self._connecting is not None:
            log.warning("rank %d is still not connected; missing: %s", self.me.rank, self._missing())
            self.loop.call_later(2 * pause_s, lambda: self._remind(2 * pause_s))

    def _connect_failed(self, error: str, text: str, why: str = "") -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
            self._bridge.tell("connect_failed", error=error, text=text, why=why)

    def _check_connected(self) -> None:
        if self._connecting is not None and all(peer.up for peer in self._each_peer()):
            self._connecting.cancel()
            self._connecting = None
            links = {
                peer.info.rank: {
                    "rails": sorted(peer.link.connections),
                    "direct": peer.direct,
                    "why": "; ".join(f"no {name}: {why}" for name, why in sorted(peer.skipped.items())),
                }
                for peer in self._each_peer()
                if peer.near
            }
            self._bridge.tell("connected", links=links)

    # --- what peers report

    def wrap(self, rail: Rail, peer: Peer) -> Rail:
        return self._faults.wrap(rail, peer.info.pp_rank)

    def peer_up(self, peer: Peer) -> None:
        self._check_connected()

    def peer_refused(self, peer: Peer, text: str, why: str = "") -> None:
        self._connect_failed("HandshakeError", f"{peer.info} at {peer.endpoint_info.addresses[0]}: {text}", why)

    def peer_lost(self, peer: Peer, error: str, reason: str, remedy: str) -> None:
        self._connect_failed(error, f"{peer.info} was lost while connecting: {reason}. {remedy}")
        log.error("lost: %s: %s", peer.info, reason)
        self._bridge.tell("lost", rank=peer.info.rank, error=error, reason=reason, remedy=remedy)
        self._bridge.record(Op.LOST, peer.info.rank)

    def peer_left(self, peer: Peer) -> None:
        error, reason, remedy = LEFT
        self._connect_failed(error, f"{peer.info} was lost while connecting: {reason}. {remedy}")
        log.info("left: %s has ended and closed its connections", peer.info)
        self._bridge.tell("left", rank=peer.info.rank, error=error, reason=reason, remedy=remedy)
        self._bridge.record(Op.LOST, peer.info.rank)

    def peer_done(self, peer: Peer) -> None:
        self._check_closed()

    def peer_control(self, peer: Peer, message: dict[str, Any]) -> None:
        self._bridge.pass_on(peer.info.rank, message)

    def peer_rail(self, peer: Peer, rail: Rail, state: State, why: str) -> None:
        level = log.info if state is State.HEALTHY else log.warning
        level("rail %s to %s is %s: %s", rail.describe(), peer.info, state.value, why)
        self._bridge.tell("rail", rank=peer.info.rank, rail=rail.name, state=state.value, why=why)

    def may_be_direct(self, peer: Peer) -> bool:
        return self.settings.direct and not self._faults.between(peer.info.pp_rank)

    def memfds(self, peer: Peer, rings: list[int], direct: int | None) -> None:
        descriptors = rings if direct is None else [*rings, direct]
        self._bridge.tell("memfds", descriptors, rank=peer.info.rank, direct=direct is not None)

    def message(self, peer: Peer, direction: Direction, lane: int, found: Incoming) -> None:
        now = self.loop.clock()
        self._bridge.record(
            *(Op.ARRIVED, peer.info.rank, direction, lane, int(found.by_reference), found.message, found.total),
            *(peer.clock.delay(found.sent, now) * 1e3, packed_time(now)),
        )

    def acked(self, peer: Peer, direction: Direction, lane: int, message: int) -> None:
        self._bridge.record(Op.ACKED, peer.info.rank, direction, lane, 0, message)

    def consumed(self, peer: Peer, direction: Direction, lane: int, message: int) -> None:
        self._bridge.record(Op.CONSUMED, peer.info.rank, direction, lane, 0, message)

    def _stood(self, seconds: float) -> None:
        """This process stood still, at some time in the last `seconds`: what it measured across that is not the links'."""
        self.loop.post(lambda: None)  # a turn, at the end of which the endpoint hears of it
        now = self.loop.clock()
        self.peer_stood(-1, now - seconds, now)
        for peer in self._each_peer():
            peer.stood(now - seconds, now)

    def peer_stood(self, rank: int, began: float, ended: float) -> None:
        self._bridge.record(Op.STOOD, rank, total=round((ended - began) * 1e6), value=began)

    def peer_stuck(self, peer: Peer, direction: Direction, lane: int, stuck: bool) -> None:
        self._bridge.record(Op.PEER_STUCK, peer.info.rank, direction, lane, 0, 0, int(stuck))

    # --- the bridge

    def _told(self) -> None:
        """The endpoint has taken what its peers have said."""
        for peer in self._each_peer():
            if not peer.gone:
                peer.link.control_taken()

    def log_line(self, level: int, text: str) -> None:
        """A line for the endpoint's logger."""
        self._bridge.tell("log", level=level, text=text)

    def _transfers(self, records: Iterable[tuple[Any, ...]]) -> None:
        touched: dict[int, Peer] = {}
        for record in records:
            self._transfer(record, touched)
        self._pump(touched)

    @staticmethod
    def _pump(touched: dict[int, Peer]) -> None:
        for peer in touched.values():
            peer.link.pump()
        touched.clear()

    def _transfer(self, record: tuple[Any, ...], touched: dict[int, Peer]) -> None:
        op, code, lane, _, rank, message, total, value, after = record
        if op == Op.ITERATION:
            # it comes in line with the transfers that it is about, so what was sent before goes first
            self._pump(touched)
            self._faults.iteration = message
            return
        peer = (self._peers or {}).get(rank)
        if peer is None or peer.gone:
            return
        direction = Direction(code)
        if op == Op.SEND:
            peer.link.send(direction, lane, message, total, value, after)
        elif op == Op.RELEASE:
            peer.link.release(direction, lane, message)
        elif op == Op.STUCK:
            peer.link.stuck(direction, lane, bool(total))
        touched[rank] = peer

    def _turn_ended(self) -> None:
        for peer in self._each_peer():
            if not peer.gone:
                peer.link.flush()
                waiting = peer.link.untaken.waiting
                if (waiting > MAX_CONTROL_BACKLOG) != peer.full:
                    peer.full = not peer.full
                    self._bridge.tell("backlog", rank=peer.info.rank, waiting=waiting)
        self._bridge.flush()

    def _tick(self) -> None:
        busy = False
        for peer in self._each_peer():
            if not peer.gone:
                peer.link.tick()
                busy |= bool(peer.link.unsent) or any(
                    connection.oldest is not None for connection in peer.link.connections.values()
                )
        self.loop.call_later(TICK_S if busy else _IDLE_TICK_S, self._tick)

    # --- the end

    def _begin_close(self, linger_s: float) -> None:
        if self._closing is not None:
            return
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
            linger_s = min(linger_s, FAREWELL_S)  # nothing waits but goodbyes, maybe for peers that never connect
        self._closing = self.loop.call_later(linger_s, self._out_of_patience)
        for peer in self._each_peer():
            if not peer.gone:
                peer.begin_close()
        self._check_closed()

    def _check_closed(self) -> None:
        if self._closing is not None and all(peer.done for peer in self._each_peer()):
            self.loop.post(self._finish)

    def _out_of_patience(self) -> None:
        for peer in self._each_peer():
            if not peer.gone and peer.link.unsent:
                log.warning("closed with %d messages unsent to %s", peer.link.unsent, peer.info)
        self._finish()

    def _finish(self) -> None:
        self._bridge.tell("closed")
        self._bridge.flush_control()
        self.loop.stop()

    def abandon(self) -> None:
        """In a forked child that does not run it: closes the inherited descriptors, and takes no lock."""
        for factory in self.factories:
            factory.abandon()
        self.loop.close()  # first: a child must not unregister sockets from the selector it shares with its parent
        self._give_back()

    def _give_back(self) -> None:
        for peer in self._each_peer():
            peer.close()
        self._listeners.close()
        for sock, _, _ in self._early:
            sock.close()
        for factory in self.factories:
            factory.close()
        for memfd in self._memfds:
            memfd.close()
        self._bridge.close()
        self.loop.close()
