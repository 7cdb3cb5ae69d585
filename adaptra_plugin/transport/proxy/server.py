"""The proxy of a rank: serves its endpoint over the bridge, and its peers over their rails. Single-threaded."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptra_plugin.errors import TransportError
from adaptra_plugin.shortage import explain
from adaptra_plugin.transport.bind import is_loopback, is_wildcard, listen
from adaptra_plugin.transport.bridge import MAX_CONTROL_BACKLOG, MAX_PACKET, RECORD, Op, Reader, Writer, packed_time
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.events import LaneKey, Rings
from adaptra_plugin.transport.proxy.handshake import Claim, Settings
from adaptra_plugin.transport.proxy.handshake_connection import Acceptor
from adaptra_plugin.transport.proxy.health import State
from adaptra_plugin.transport.proxy.inbox import Incoming
from adaptra_plugin.transport.proxy.interfaces import address_of
from adaptra_plugin.transport.proxy.loop import READ, WRITE, Loop, Timer
from adaptra_plugin.transport.proxy.peer import LEFT, Neighbour, Peer
from adaptra_plugin.transport.proxy.peer_prober import ONLY_ITS_HOST
from adaptra_plugin.transport.proxy.placing import place
from adaptra_plugin.transport.proxy.rails.base import Rail
from adaptra_plugin.transport.proxy.rails.faulty import Faults
from adaptra_plugin.transport.proxy.rdma_setup import Ports
from adaptra_plugin.transport.proxy.settings import ProxySettings
from adaptra_plugin.transport.proxy.silence import TICK_S
from adaptra_plugin.transport.proxy.tls import Tls
from adaptra_plugin.transport.types import Address, Direction, EndpointInfo, PeerInfo

_BACKLOG = 512
_IDLE_TICK_S = 0.5
FAREWELL_S = 0.5
_LAST_WORDS_S = 1.0
_PACKETS = 16
"""Packets of the endpoint before others get their turn."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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
        self.refused = 0
        self.ports = Ports()
        self._data, self._control = data, control
        data.setblocking(False)
        control.setblocking(False)
        self._reader, self._writer = Reader(control), Writer(control)
        self._records: deque[bytes] = deque()
        self._peers: dict[int, Peer] | None = None
        self._early: list[tuple[socket.socket, Claim, Settings]] = []  # came before `connect`
        self._memfds: list[Memfd] = []
        self._passing: deque[list[int]] = deque()  # descriptors that are on their way to the endpoint
        self._acceptors: list[Acceptor] = []
        self._connecting: Timer | None = None
        self._closing: Timer | None = None
        self._orphaned = False
        self.loop.watch(data, READ, self._data_ready)
        self.loop.watch(control, READ, self._control_ready)
        self.loop.turn_ended = self._turn_ended

    def run(self) -> None:
        """Serves; gives back every descriptor at the end."""
        try:
            self.loop.run()
        except Exception as error:
            self._last_words(error)
            raise
        finally:
            self._give_back()

    def _last_words(self, error: Exception) -> None:
        with contextlib.suppress(OSError):
            self._control.settimeout(_LAST_WORDS_S)
            self._tell("failed", text=f"{type(error).__name__}: {explain(error)}")
            self._writer.flush()

    def stop(self) -> None:
        """The endpoint is gone: peers see connections that end without goodbye."""
        self._orphaned = True
        self.loop.stop()

    # --- the endpoint's commands

    def _control_ready(self, mask: int) -> None:
        if mask & WRITE:
            self._flush_control()
        if mask & READ:
            try:
                found = self._reader.receive()
            except BlockingIOError:
                return
            except OSError:
                found = None
            if found is None:
                return self.stop()
            for message, descriptors in found:
                self._command(message, descriptors)

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
            self._peer(message["rank"], lambda peer: self._send_control(peer, data))
        elif op == "stats":
            refused = sum(acceptor.refused for acceptor in self._acceptors)
            peers = {peer.info.rank: peer.stats() for peer in self._each_peer()}
            self._tell("stats", id=message["id"], data={"refused_connections": refused, "peers": peers})
        elif op == "close":
            self._begin_close(float(message["linger_s"]))

    def _send_control(self, peer: Peer, data: bytes) -> None:
        peer.link.send_control(data)
        peer.link.pump()

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
            self.ports.find(self.loop, self.settings)
            self.endpoint_info = self._listen(str(message["bind"]), message.get("shown"))
        except (TransportError, OSError) as error:
            self._tell("start_failed", text=explain(error))
            return
        self.loop.pulse.stood = self._stood
        self._tell("ready", endpoint_info=self.endpoint_info.to_text())
        self._tick()

    def _listen(self, bind: str, reached_at: str | None) -> EndpointInfo:
        settings = self.settings
        addresses = []
        hosts = dict.fromkeys([bind, *(address_of(name) for name in settings.interfaces)])
        for host in hosts:
            sock = listen(host, _BACKLOG)
            self._add_listener(sock)
            shown, port = sock.getsockname()[:2]  # the address of a host that was given by name
            addresses.append(Address(reached_at if is_wildcard(host) and reached_at else shown, port))
        unix = f"adaptra-{secrets.token_hex(12)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.bind(b"\0" + unix.encode())  # abstract: nothing in the file system, gone with its last descriptor
        sock.listen(_BACKLOG)
        self._add_listener(sock)
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        return EndpointInfo(
            addresses=tuple(addresses),
            ring_bytes=settings.ring_bytes,
            connections=settings.connections_per_direction,
            boot=boot,
            unix=unix,
            rdma=self.ports.infos(),
        )

    def _add_listener(self, sock: socket.socket) -> None:
        settings = self.settings
        known = Settings(settings.connections_per_direction, settings.ring_bytes)
        self._acceptors.append(
            Acceptor(
                self.loop,
                sock,
                self.secret,
                self.me.rank,
                known,
                settings.handshake_timeout_s,
                self._authenticated,
                tls=None if sock.family == socket.AF_UNIX else self.tls,
            )
        )

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
            self._acceptors[0].refuse(sock, reason)

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
            self._tell("connect_failed", error=error, text=text, why=why)

    def _check_connected(self) -> None:
        if self._connecting is not None and all(peer.up for peer in self._each_peer()):
            self._connecting.cancel()
            self._connecting = None
            links = {
                peer.info.rank: {
                    "rails": sorted(peer.link.connections),
                    "why": "; ".join(f"no {name}: {why}" for name, why in sorted(peer.skipped.items())),
                }
                for peer in self._each_peer()
                if peer.near
            }
            self._tell("connected", links=links)

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
        self._tell("lost", rank=peer.info.rank, error=error, reason=reason, remedy=remedy)
        self._record(Op.LOST, peer.info.rank)

    def peer_left(self, peer: Peer) -> None:
        error, reason, remedy = LEFT
        self._connect_failed(error, f"{peer.info} was lost while connecting: {reason}. {remedy}")
        log.info("left: %s has ended and closed its connections", peer.info)
        self._tell("left", rank=peer.info.rank, error=error, reason=reason, remedy=remedy)
        self._record(Op.LOST, peer.info.rank)

    def peer_done(self, peer: Peer) -> None:
        self._check_closed()

    def peer_control(self, peer: Peer, message: dict[str, Any]) -> None:
        self._tell("control", rank=peer.info.rank, message=message)

    def peer_rail(self, peer: Peer, rail: Rail, state: State, why: str) -> None:
        level = log.info if state is State.HEALTHY else log.warning
        level("rail %s to %s is %s: %s", rail.describe(), peer.info, state.value, why)
        self._tell("rail", rank=peer.info.rank, rail=rail.name, state=state.value, why=why)

    def memfds(self, peer: Peer, descriptors: list[int]) -> None:
        self._tell("memfds", descriptors, rank=peer.info.rank)
        self._passing.append(descriptors)
        self._flush_control()

    def message(self, peer: Peer, direction: Direction, lane: int, found: Incoming) -> None:
        now = self.loop.clock()
        self._record(
            *(Op.ARRIVED, peer.info.rank, direction, lane, int(found.by_reference), found.message, found.total),
            *(peer.clock.delay(found.sent, now) * 1e3, packed_time(now)),
        )

    def acked(self, peer: Peer, direction: Direction, lane: int, message: int) -> None:
        self._record(Op.ACKED, peer.info.rank, direction, lane, 0, message)

    def consumed(self, peer: Peer, direction: Direction, lane: int, message: int) -> None:
        self._record(Op.CONSUMED, peer.info.rank, direction, lane, 0, message)

    def _stood(self, seconds: float) -> None:
        """This process stood still, at some time in the last `seconds`: what it measured across that is not the links'."""
        self.loop.post(lambda: None)  # a turn, at the end of which the endpoint hears of it
        now = self.loop.clock()
        self.peer_stood(-1, now - seconds, now)
        for peer in self._each_peer():
            peer.stood(now - seconds, now)

    def peer_stood(self, rank: int, began: float, ended: float) -> None:
        self._record(Op.STOOD, rank, total=round((ended - began) * 1e6), value=began)

    def peer_stuck(self, peer: Peer, direction: Direction, lane: int, stuck: bool) -> None:
        self._record(Op.PEER_STUCK, peer.info.rank, direction, lane, 0, 0, int(stuck))

    # --- the bridge

    def _tell(self, event: str, descriptors: Sequence[int] = (), **fields: Any) -> None:
        self._writer.put({"event": event, **fields}, descriptors)

    def log_line(self, level: int, text: str) -> None:
        """A line for the endpoint's logger."""
        self._tell("log", level=level, text=text)

    def _flush_control(self) -> None:
        try:
            done = self._writer.flush()
        except OSError:
            self.stop()
            return
        self.loop.watch(self._control, READ | WRITE * (not done), self._control_ready)
        if done:
            for peer in self._each_peer():
                if not peer.gone:
                    peer.link.control_taken()
        while done and self._passing:
            for fd in self._passing.popleft():
                os.close(fd)

    def _record(
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

    def _data_ready(self, mask: int) -> None:
        if mask & WRITE:
            self._flush_records()
        if mask & READ:
            touched: dict[int, Peer] = {}
            try:
                for _ in range(_PACKETS):
                    packet = self._data.recv(MAX_PACKET)
                    if not packet:
                        self.stop()
                        return
                    for record in RECORD.iter_unpack(packet):
                        self._transfer(record, touched)
            except BlockingIOError:
                pass
            except OSError:
                self.stop()
                return
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

    def _flush_records(self) -> None:
        """Several records a packet; what the endpoint does not take now waits."""
        per_packet = MAX_PACKET // RECORD.size
        while self._records:
            batch = [self._records[index] for index in range(min(per_packet, len(self._records)))]
            try:
                self._data.send(b"".join(batch))
            except BlockingIOError:
                break
            except OSError:
                self.stop()
                return
            for _ in batch:
                self._records.popleft()
        self.loop.watch(self._data, READ | WRITE * bool(self._records), self._data_ready)

    def _turn_ended(self) -> None:
        for peer in self._each_peer():
            if not peer.gone:
                peer.link.flush()
                self._tell_backlog(peer)
        if not self._orphaned:
            self._flush_control()
            self._flush_records()

    def _tell_backlog(self, peer: Peer) -> None:
        waiting = peer.link.untaken.waiting
        if (waiting > MAX_CONTROL_BACKLOG) != peer.full:
            peer.full = not peer.full
            self._tell("backlog", rank=peer.info.rank, waiting=waiting)

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
        self._tell("closed")
        self._flush_control()
        self.loop.stop()

    def abandon(self) -> None:
        """In a forked child that does not run it: closes the inherited descriptors, and takes no lock."""
        self.ports.abandon()
        self.loop.close()  # first: a child must not unregister sockets from the selector it shares with its parent
        self._give_back()

    def _give_back(self) -> None:
        for peer in self._each_peer():
            peer.close()
        for acceptor in self._acceptors:
            acceptor.close()
        for sock, _, _ in self._early:
            sock.close()
        for descriptors in self._passing:
            for fd in descriptors:
                os.close(fd)
        self.ports.close()
        for memfd in self._memfds:
            memfd.close()
        self._data.close()
        self._control.close()
        self.loop.close()
