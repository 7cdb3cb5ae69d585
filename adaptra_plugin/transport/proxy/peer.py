"""One peer, seen from the proxy: its rails as they come and go, its clock, and whether it is there, gone or lost."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from adaptra_plugin.errors import HandshakeError
from adaptra_plugin.transport.bind import is_loopback
from adaptra_plugin.transport.clock import ClockOffset
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.proxy.events import LaneKey, Rings
from adaptra_plugin.transport.proxy.handshake import Claim, Purpose, Settings
from adaptra_plugin.transport.proxy.handshake_connection import Connector
from adaptra_plugin.transport.proxy.health import Health, State
from adaptra_plugin.transport.proxy.inbox import Incoming
from adaptra_plugin.transport.proxy.link import Link
from adaptra_plugin.transport.proxy.loop import Loop, Timer
from adaptra_plugin.transport.proxy.news import RailNews
from adaptra_plugin.transport.proxy.nics import pairs
from adaptra_plugin.transport.proxy.peer_prober import ONLY_ITS_HOST, PeerProber
from adaptra_plugin.transport.proxy.rails.base import Rail, RailKind
from adaptra_plugin.transport.proxy.rails.exchange import RingExchange
from adaptra_plugin.transport.proxy.rails.rdma import RdmaRail
from adaptra_plugin.transport.proxy.rails.stream import StreamRail
from adaptra_plugin.transport.proxy.rdma_setup import Ports, RdmaSetup
from adaptra_plugin.transport.proxy.settings import ProxySettings
from adaptra_plugin.transport.proxy.tls import Tls
from adaptra_plugin.transport.types import Direction, EndpointInfo, PeerInfo

FIRST_PINGS = 8
"""Pings in a row before a link counts as connected: the offset of the clocks must be known for the first message."""
LONGEST_PAUSE_S = 3600.0
_AT_ONCE_S = 0.1
_MAX_SKIPPED = 64
"""Rails that the other end may give up; there are never so many."""

LOOK = "Its process ended or its host went down: look at the end of its log, then restart the job from a checkpoint."
LEFT = ("PeerLostError", "it has ended and closed its connections", "Look at the end of its log for the reason.")


class Owner(Protocol):
    """The proxy that a peer belongs to."""

    settings: ProxySettings
    me: PeerInfo
    endpoint_info: EndpointInfo
    secret: bytes
    loop: Loop
    tls: Tls | None
    ports: Ports

    def wrap(self, rail: Rail, peer: Peer) -> Rail:
        """The rail with the faults that are injected into it."""

    def peer_up(self, peer: Peer) -> None: ...
    def peer_refused(self, peer: Peer, text: str, why: str = "") -> None: ...
    def peer_lost(self, peer: Peer, error: str, reason: str, remedy: str) -> None: ...
    def peer_left(self, peer: Peer) -> None: ...
    def peer_done(self, peer: Peer) -> None: ...
    def peer_control(self, peer: Peer, message: dict[str, Any]) -> None: ...
    def peer_rail(self, peer: Peer, rail: Rail, state: State, why: str) -> None: ...
    def memfds(self, peer: Peer, descriptors: list[int]) -> None: ...
    def message(self, peer: Peer, direction: Direction, lane: int, found: Incoming) -> None: ...
    def acked(self, peer: Peer, direction: Direction, lane: int, message: int) -> None: ...
    def consumed(self, peer: Peer, direction: Direction, lane: int, message: int) -> None: ...
    def peer_stuck(self, peer: Peer, direction: Direction, lane: int, stuck: bool) -> None: ...
    def peer_stood(self, rank: int, began: float, ended: float) -> None: ...


@dataclass(frozen=True)
class Neighbour:
    """What a peer is told beyond its address if data goes to it."""

    rings: Mapping[LaneKey, Rings]
    limit: int


class Peer:
    """Owns the link to one rank, and everything that is being done to bring its rails up.

    Args:
        info, card: who it is, and how it is reached.
        neighbour: rings; None if only control messages go to and fro.
        dials: whether this side makes the connections.
    """

    def __init__(
        self, owner: Owner, info: PeerInfo, endpoint_info: EndpointInfo, neighbour: Neighbour | None, *, dials: bool
    ) -> None:
        self.info = info
        self.endpoint_info = endpoint_info
        self.near = neighbour is not None
        self.clock = ClockOffset()
        self.departed = False
        self.full = False  # more control messages wait for its endpoint than may
        self.gone = False  # lost, left or closed: nothing more is reported
        self.skipped: dict[str, str] = {}  # rails that will not come, and why
        self._owner = owner
        self._loop = owner.loop
        self._dials = dials
        self._rings = neighbour.rings if neighbour else {}
        self._connectors: dict[str, Connector] = {}
        self._timers: dict[str, Timer] = {}
        self._exchange: RingExchange | None = None
        self._mapped_here = self._mapped_there = False
        self._announced = False
        self._closing = False
        self._garbled = False  # the last rail has ended because what came over it was no frame
        self._prober = PeerProber(owner.loop, endpoint_info.addresses[0], owner.settings.reconnect_s, self._lose)
        self._news = RailNews(owner.loop, lambda rail, state, why: owner.peer_rail(self, rail, state, why))
        self._with_rdma = False
        self._expected = self._expected_rails()
        settings = owner.settings
        self.link = Link(
            self._rings,
            self,
            owner.loop,
            limit=neighbour.limit if neighbour else 0,
            segment_bytes=settings.segment_kib << 10,
            checksum=lambda rail: (
                rail.damages or settings.checked(same_host=owner.endpoint_info.boot == endpoint_info.boot)
            ),
        )
        self._rdma = RdmaSetup(
            owner.loop,
            self.link,
            owner.ports.nics if self._with_rdma else (),
            endpoint_info.rdma,
            {key: rings.ring for key, rings in self._rings.items()},
            segment_bytes=settings.segment_kib << 10,
            timeout_s=settings.handshake_timeout_s,
            dials=dials,
            on_up=self._rdma_up,
            on_failed=self._rdma_failed,
        )
        self._expected.update(self._rdma.names)

    def _expected_rails(self) -> set[str]:
        """Rails that are tried at the start."""
        owner = self._owner
        if not self.near:
            return {"tcp0"}
        found = {f"tcp{index}" for index in range(owner.settings.connections_per_direction * self._paths)}
        if owner.settings.wants(RailKind.SHM):
            if owner.endpoint_info.boot != self.endpoint_info.boot:
                self.skipped["shm"] = "it runs on another host"
            elif not (owner.endpoint_info.unix and self.endpoint_info.unix):
                self.skipped["shm"] = "one end does not offer it"
            else:
                found.add("shm")
        if owner.settings.wants(RailKind.RDMA) and "shm" not in found:
            if owner.tls is not None:
                self.skipped["rdma"] = "adaptra.transport.tls is set, and RDMA does not encrypt"
            elif not owner.ports.nics:
                self.skipped["rdma"] = owner.ports.why_none
            elif not self.endpoint_info.rdma:
                self.skipped["rdma"] = "the other end offers none, see its log"
            elif not pairs(owner.ports.infos(), self.endpoint_info.rdma):
                self.skipped["rdma"] = "its ports are of another kind"
            self._with_rdma = "rdma" not in self.skipped
        return found

    @property
    def _paths(self) -> int:
        """Pairs of interfaces."""
        return min(len(self._owner.endpoint_info.addresses), len(self.endpoint_info.addresses))

    # --- coming up

    def start(self) -> None:
        for name in sorted(self._expected.difference(self._rdma.names)) if self._dials else ():
            self._dial(name)
        self._prober.begin()
        self._announce()

    @property
    def up(self) -> bool:
        """All rails stand that will come and, towards a neighbour, the clocks are compared."""
        waiting = self._expected - self.skipped.keys()
        if not all(name in self.link.connections and self.link.connections[name].ready for name in waiting):
            return False
        return not self.near or (("shm" not in waiting or self._mapped_here) and self.clock.count >= FIRST_PINGS)

    def _announce(self) -> None:
        if self._announced or self.gone:
            return
        for kind in (RailKind.SHM, RailKind.RDMA):
            names = {name for name in self._expected if name.startswith(kind.word)} or {kind.word}
            if self.near and self._owner.settings.demands(kind) and names <= self.skipped.keys():
                why = "; ".join(sorted({self.skipped[name] for name in names}))
                self._owner.peer_refused(
                    self, f"adaptra.transport.rail is {kind.word}, which is impossible: {why}", why
                )
                return
        if self.up:
            self._announced = True
            self._owner.peer_up(self)

    def missing(self) -> str:
        """In words, for an error: which rails have not come, and why."""
        waiting = sorted(self._expected - self.skipped.keys() - self.link.connections.keys())
        reasons = sorted({self._connectors[name].last_reason for name in waiting if name in self._connectors})
        how = "; ".join(reasons) or ("it has not dialled this rank" if waiting else "no answer to pings")
        if (
            is_loopback(self.endpoint_info.addresses[0].host)
            and self.endpoint_info.boot != self._owner.endpoint_info.boot
        ):
            how += f"; that is loopback, {ONLY_ITS_HOST}"
        return f"{self.info} at {self.endpoint_info.addresses[0]} ({len(waiting)} connections missing: {how})"

    def _dial(self, name: str) -> None:
        if self.gone or self.departed or self._closing or name in self._connectors or name in self.link.connections:
            return
        if name in self._rdma.names:
            self._rdma.dial(name)
            return
        shm = name == "shm"
        if shm and name in self.skipped:
            return
        index = 0 if shm else int(name.removeprefix("tcp"))
        path = index % self._paths if self.near else 0
        claim = Claim(
            self._owner.me.rank, self._owner.me.pp_rank, self.info.rank, Purpose.SHM if shm else Purpose.TCP, index
        )
        source = self._owner.endpoint_info.addresses[path].host if path else None
        settings = self._owner.settings
        self._connectors[name] = Connector(
            self._loop,
            self.endpoint_info.unix if shm else self.endpoint_info.addresses[path],
            claim,
            self._owner.secret,
            Settings(settings.connections_per_direction, settings.ring_bytes),
            settings.handshake_timeout_s,
            source,
            self._dialled,
            self._turned_away,
            self._dial_failed,
            tls=None if shm else self._owner.tls,
        )

    def _dialled(self, sock: socket.socket, claim: Claim, settings: Settings) -> None:
        self._connectors.pop(claim.rail, None)
        reason = self.adopt(sock, claim)
        if reason is not None:
            log.warning("dropped: connection %s to rank %d: %s", claim.rail, self.info.rank, reason)
            sock.close()

    def _turned_away(self, claim: Claim, error: HandshakeError) -> None:
        self._connectors.pop(claim.rail, None)
        if self._announced:
            # who they are was settled at the start: something was in the way, or damaged
            log.warning("rail %s to %s did not come back: %s", claim.rail, self.info, error)
            self._later(claim.rail)
        elif claim.rail == "shm":
            self._skip("shm", f"it refused: {error}")
        else:
            self._owner.peer_refused(self, f"refused the connection: {error}")

    def _dial_failed(self, claim: Claim, error: Exception) -> None:
        if claim.rail == "shm" and not self._announced:
            self._connectors.pop("shm").close()
            self._skip("shm", f"its socket cannot be reached from here ({error}): is it in another network namespace?")
        elif claim.rail != "shm" and isinstance(error.__cause__ or error, ConnectionRefusedError):
            self._prober.refused()

    def _skip(self, name: str, why: str) -> None:
        """A rail is given up for good; the link does without it."""
        if name not in self.skipped:
            self.skipped[name] = why
            self.link.send_rail_message({"skip": name, "why": why})
            self.link.pump()
        self._announce()

    def adopt(self, sock: socket.socket, claim: Claim) -> str | None:
        """Takes over a connection that has passed its handshake, or says why it has no place here."""
        if self.departed or self.gone or self._closing:
            return f"rank {self.info.rank} has left already"
        if claim.rail not in self._expected or claim.rail in self.skipped:
            return f"no connection {claim.rail} is wanted with rank {self.info.rank}"
        if claim.rail in self.link.connections:
            if claim.source == self._owner.me.rank:
                return f"rank {self.info.rank} is connected for {claim.rail} already"
            # it has dialled again because its end has failed, which this end has not noticed yet
            self.link.drop_rail(claim.rail, "the other end has connected anew")
        if claim.purpose == Purpose.SHM:
            if self._exchange is not None:
                self._exchange.close()
            rings = [self._rings[key].ring.fd for key in self._rings]
            timeout_s = self._owner.settings.handshake_timeout_s
            self._exchange = RingExchange(self._loop, sock, rings, self._rings_came, self._no_rings, timeout_s)
        else:
            self._add(StreamRail(RailKind.TCP, claim.rail, self.link, self._loop, sock), ready=True)
        return None

    def _rings_came(self, sock: socket.socket, descriptors: list[int]) -> None:
        self._exchange = None
        self._mapped_here = False
        self._owner.memfds(self, descriptors)
        # the peer may have said that it has mapped this rank's rings before theirs came
        self._add(StreamRail(RailKind.SHM, "shm", self.link, self._loop, sock), ready=self._mapped_there)

    def _no_rings(self, reason: str) -> None:
        self._exchange = None
        if self._dials and self._announced:
            log.warning("rail shm to %s did not come back: %s", self.info, reason)
            self._later("shm")
        elif self._dials:
            self._skip("shm", reason)

    def _add(self, rail: Rail, *, ready: bool) -> None:
        self._prober.end()
        self._news.alive()
        self.skipped.pop(rail.name, None)
        self.link.add_rail(self._owner.wrap(rail, self), ready=ready)
        self.link.ping(rail.name)
        self._rdma.begin()
        self._announce()

    def _rdma_up(self, rail: RdmaRail) -> None:
        if self.gone or self.departed or self._closing:
            rail.close()
        else:
            self._add(rail, ready=True)

    def _rdma_failed(self, name: str, why: str) -> None:
        """This end has offered the rail, and will again, after a pause that grows."""
        if self.gone or self.departed or self._closing:
            return
        pause = self.link.health.setdefault(name, Health()).failed(self._loop.clock())
        self._timers[name] = self._loop.call_later(pause, lambda: self._again(name))
        if not self._announced:
            self._skip(name, why)

    def mapped(self, refusal: str | None) -> None:
        """The endpoint has mapped the peer's rings, or cannot, for the reason given: then the link does without."""
        if refusal is not None:
            self._skip("shm", refusal)
            self.link.drop_rail("shm", refusal)
            return
        self._mapped_here = True
        self.link.send_rail_message({"mapped": "shm"})
        self.link.pump()
        self._announce()

    # --- what the link reports

    def message(self, direction: Direction, lane: int, found: Incoming) -> None:
        self._owner.message(self, direction, lane, found)

    def acked(self, direction: Direction, lane: int, message: int) -> None:
        self._owner.acked(self, direction, lane, message)

    def consumed(self, direction: Direction, lane: int, message: int) -> None:
        self._owner.consumed(self, direction, lane, message)

    def peer_stuck(self, direction: Direction, lane: int, stuck: bool) -> None:
        self._owner.peer_stuck(self, direction, lane, stuck)

    def control(self, message: dict[str, Any]) -> None:
        self._owner.peer_control(self, message)

    def rail_state(self, rail: Rail, state: State, why: str) -> None:
        if self._announced and not (self.gone or self.departed or self._closing) and self._news.step(rail, state, why):
            self._ask()

    def pong(self, sent: float, remote_received: float, remote_sent: float, received: float) -> None:
        self.clock.add(sent, remote_received, remote_sent, received)
        self._news.answered(sent)
        if not self._announced:
            if self.clock.count < FIRST_PINGS and self.link.connections:
                self.link.ping(next(iter(self.link.connections)))
            self._announce()

    def rail_message(self, rail: Rail, message: dict[str, Any]) -> None:
        """The other proxy speaks of rails."""
        if isinstance(name := message.get("closed"), str):
            self._loop.post(functools.partial(self.link.drop_rail, name, "the other end has closed it"))
        elif isinstance(name := message.get("skip"), str):
            if len(self.skipped) < _MAX_SKIPPED:
                why = message.get("why")
                self.skipped.setdefault(name[:64], f"the other end says: {why[:1000] if isinstance(why, str) else ''}")
            self._announce()
        elif message.get("mapped") == "shm":
            self._mapped_there = True
            self.link.make_ready("shm")
            self._announce()
        elif "stood" in message:
            self._they_stood(message["stood"])
        elif "rdma" in message:
            # not from here: the link is in the middle of a frame
            self._loop.post(functools.partial(self._rdma.message, message))

    # --- pauses

    def stood(self, began: float, ended: float) -> None:
        """This process stood still (s, its clock): the other end has to know, and clocks are compared anew."""
        if self.near and self._announced and not (self.gone or self.departed or self._closing):
            self.link.send_rail_message({"stood": [began, ended]})
            self._ask()
            self.link.pump()

    def _they_stood(self, when: Any) -> None:
        if not isinstance(when, list) or len(when) != 2 or not all(type(at) is float for at in when):
            return
        now = self._loop.clock()
        began, ended = (self.clock.local(at, now) for at in when)
        if now - LONGEST_PAUSE_S < began <= ended:
            self._owner.peer_stood(self.info.rank, began, min(ended, now))
            self._ask()

    def _ask(self) -> None:
        for name in list(self.link.connections):
            self.link.ping(name)

    # --- rails go

    def rail_lost(self, rail: Rail, reason: str) -> None:
        if self.departed or self._closing or self.gone:
            if not (self.departed or self.link.connections) and self.link.unsent:
                log.warning("closed with %d messages unsent to %s: %s", self.link.unsent, self.info, reason)
            self._check_done()
            return
        if rail.name == "shm":
            self._mapped_there = False
        if self._dials:
            self._plan_again(rail.name)
        if not self.link.connections:
            self._garbled = rail.garbled
            self._prober.begin(reason)

    def _later(self, name: str) -> None:
        """An attempt to bring a rail back has failed."""
        if not (self.gone or self.departed or self._closing):
            self.link.health[name].failed(self._loop.clock())
            self._plan_again(name)

    def _plan_again(self, name: str) -> None:
        pause = max(0.0, self.link.health[name].until - self._loop.clock())
        # what was the last rail is missed at once
        wait = pause if self.link.connections else min(pause, _AT_ONCE_S)
        self._timers[name] = self._loop.call_later(wait, lambda: self._again(name))

    def _again(self, name: str) -> None:
        if self.gone or name in self.link.connections:
            return
        if name in self._rdma.names and not self.link.connections:  # nothing carries its offer
            self._timers[name] = self._loop.call_later(_AT_ONCE_S, lambda: self._again(name))
            return
        self.link.health[name].probing()
        self._dial(name)

    def _lose(self, reason: str) -> None:
        if not (self.gone or self.departed or self._closing):
            error, remedy = "PeerLostError", LOOK
            if self._garbled:
                error = "TransportError"
                remedy = "Install the same release of adaptra_plugin on all ranks; if it is, the network corrupts data."
            self.gone = True
            self.close()
            self._owner.peer_lost(self, error, reason, remedy)

    # --- the end

    def goodbye(self) -> None:
        if not self.departed:
            self.departed = True
            self._news.drop()
            self._owner.peer_left(self)
            self._check_done()

    def begin_close(self) -> None:
        """Sends what waits, then goodbye."""
        self._closing = True
        self._end_attempts()
        self.link.say_goodbye()
        self._check_done()

    def finished(self) -> None:
        self.close()
        self._owner.peer_done(self)

    @property
    def done(self) -> bool:
        return self.gone or (self._closing and not self.link.connections)

    def _check_done(self) -> None:
        if self._closing and not self.link.connections:
            self._owner.peer_done(self)

    def _end_attempts(self) -> None:
        for connector in self._connectors.values():
            connector.close()
        self._connectors.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._rdma.close()
        self._prober.end()
        self._news.drop()
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def close(self) -> None:
        """Gives everything back at once."""
        self.gone = True
        self._end_attempts()
        self.link.close()

    def stats(self) -> dict[str, Any]:
        return {
            "clock_offset_ms": self.clock.offset * 1e3,
            "round_trip_ms": self.clock.round_trip * 1e3,
            "retries": self.link.retries,
            "damaged": self.link.corrupt,
            "rails": {
                name: {
                    "state": health.state.value,
                    "mb_per_s": round(self.link.connections[name].speed / 1e6, 1)
                    if name in self.link.connections
                    else 0.0,
                    "delivered_bytes": self.link.connections[name].delivered if name in self.link.connections else 0,
                }
                for name, health in self.link.health.items()
            },
            "skipped": dict(self.skipped),
        }
