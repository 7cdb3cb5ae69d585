"""One peer, seen from the proxy: its rails as they come and go, its clock, and whether it is there, gone or lost."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adaptra_plugin.transport.bind import is_loopback
from adaptra_plugin.transport.clock import ClockOffset
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.proxy.events import LaneKey, Rings
from adaptra_plugin.transport.proxy.handshake import Claim
from adaptra_plugin.transport.proxy.health import Health, State
from adaptra_plugin.transport.proxy.inbox import Incoming
from adaptra_plugin.transport.proxy.link import Link
from adaptra_plugin.transport.proxy.loop import Timer
from adaptra_plugin.transport.proxy.news import RailNews
from adaptra_plugin.transport.proxy.peer_prober import ONLY_ITS_HOST, PeerProber
from adaptra_plugin.transport.proxy.rails.base import Rail
from adaptra_plugin.transport.proxy.rails.setup import Local, RailFactory, RailSetup
from adaptra_plugin.transport.types import Direction, EndpointInfo, PeerInfo

FIRST_PINGS = 8
"""Pings in a row before a link counts as connected: the offset of the clocks must be known for the first message."""
LONGEST_PAUSE_S = 3600.0
_AT_ONCE_S = 0.1
_MAX_SKIPPED = 64
"""Rails that the other end may give up; there are never so many."""

LOOK = "Its process ended or its host went down: look at the end of its log, then restart the job from a checkpoint."
LEFT = ("PeerLostError", "it has ended and closed its connections", "Look at the end of its log for the reason.")


class Owner(Local, Protocol):
    """The proxy that a peer belongs to."""

    factories: Sequence[RailFactory]

    def wrap(self, rail: Rail, peer: Peer) -> Rail:
        """The rail with the faults that are injected into it."""

    def peer_up(self, peer: Peer) -> None: ...
    def peer_refused(self, peer: Peer, text: str, why: str = "") -> None: ...
    def peer_lost(self, peer: Peer, error: str, reason: str, remedy: str) -> None: ...
    def peer_left(self, peer: Peer) -> None: ...
    def peer_done(self, peer: Peer) -> None: ...
    def peer_control(self, peer: Peer, message: dict[str, Any]) -> None: ...
    def peer_rail(self, peer: Peer, rail: Rail, state: State, why: str) -> None: ...
    def may_be_direct(self, peer: Peer) -> bool: ...
    def memfds(self, peer: Peer, rings: list[int], direct: int | None) -> None: ...
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
        info, endpoint_info: who it is, and how it is reached.
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
        self.announced = False
        self.dials = dials
        self.skipped: dict[str, str] = {}  # rails that will not come, and why
        self._owner = owner
        self._loop = owner.loop
        self.rings = {key: lane.ring for key, lane in neighbour.rings.items()} if neighbour else {}
        self._timers: dict[str, Timer] = {}
        self._closing = False
        self._garbled = False  # the last rail has ended because what came over it was no frame
        self._prober = PeerProber(owner.loop, endpoint_info.addresses[0], owner.settings.reconnect_s, self._lose)
        self._news = RailNews(owner.loop, lambda rail, state, why: owner.peer_rail(self, rail, state, why))
        settings = owner.settings
        self.link = Link(
            neighbour.rings if neighbour else {},
            self,
            owner.loop,
            limit=neighbour.limit if neighbour else 0,
            segment_bytes=settings.segment_kib << 10,
            checksum=lambda rail: (
                rail.damages or settings.checked(same_host=owner.endpoint_info.boot == endpoint_info.boot)
            ),
        )
        self._setups: list[RailSetup] = []
        for factory in owner.factories:
            self._setups.append(factory.setup(owner, self))
        self._setup_of = {name: setup for setup in self._setups for name in setup.names}
        self._carried = False  # what needs another rail to come up has been tried

    @property
    def over(self) -> bool:
        return self.gone or self.departed or self._closing

    @property
    def by_reference(self) -> bool:
        return any(setup.by_reference and setup.names for setup in self._setups)

    # --- coming up

    def start(self) -> None:
        if self.dials:
            for name, setup in self._setup_of.items():
                if not setup.needs_carrier:
                    self._dial(name)
        self._prober.begin()
        self.check_up()

    @property
    def up(self) -> bool:
        """All rails stand that will come and, towards a neighbour, the clocks are compared."""
        for name, setup in self._setup_of.items():
            if name not in self.skipped:
                connection = self.link.connections.get(name)
                if connection is None or not (connection.ready and setup.complete):
                    return False
        return not self.near or self.clock.count >= FIRST_PINGS

    def check_up(self) -> None:
        if self.announced or self.gone:
            return
        for setup in self._setups if self.near else ():
            word = setup.kind.word
            if self._owner.settings.demands(word) and self.skipped.keys() >= (names := set(setup.names or (word,))):
                why = "; ".join(sorted({self.skipped[name] for name in names}))
                self._owner.peer_refused(self, f"adaptra.transport.rail is {word}, which is impossible: {why}", why)
                return
        if self.up:
            self.announced = True
            self._owner.peer_up(self)

    def missing(self) -> str:
        """In words, for an error: which rails have not come, and why."""
        waiting = sorted(self._setup_of.keys() - self.skipped.keys() - self.link.connections.keys())
        reasons = sorted({why for name in waiting if (why := self._setup_of[name].why_missing(name))})
        how = "; ".join(reasons) or ("it has not dialled this rank" if waiting else "no answer to pings")
        if (
            is_loopback(self.endpoint_info.addresses[0].host)
            and self.endpoint_info.boot != self._owner.endpoint_info.boot
        ):
            how += f"; that is loopback, {ONLY_ITS_HOST}"
        return f"{self.info} at {self.endpoint_info.addresses[0]} ({len(waiting)} connections missing: {how})"

    def _dial(self, name: str) -> None:
        setup = self._setup_of[name]
        if not (self.over or setup.dialling(name) or name in self.link.connections):
            setup.dial(name)

    def refused(self, why: str) -> None:
        self._owner.peer_refused(self, why)

    def not_listening(self) -> None:
        self._prober.refused()

    @property
    def may_be_direct(self) -> bool:
        return self._owner.may_be_direct(self)

    @property
    def direct(self) -> bool:
        """The two endpoints can tell each other of messages."""
        return any(setup.direct for setup in self._setups)

    def memfds(self, rings: list[int], direct: int | None) -> None:
        self._owner.memfds(self, rings, direct)

    def skip(self, name: str, why: str) -> None:
        if name not in self.skipped:
            self.skipped[name] = why
            self.link.send_rail_message({"skip": name, "why": why})
            self.link.pump()
        self.check_up()

    def adopt(self, sock: socket.socket, claim: Claim) -> str | None:
        """Takes over a connection that has passed its handshake, or says why it has no place here."""
        name = claim.rail
        if self.over:
            return f"rank {self.info.rank} has left already"
        if name not in self._setup_of or name in self.skipped:
            return f"no connection {name} is wanted with rank {self.info.rank}"
        if name in self.link.connections:
            if claim.source == self._owner.me.rank:
                return f"rank {self.info.rank} is connected for {name} already"
            # it has dialled again because its end has failed, which this end has not noticed yet
            self.link.drop_rail(name, "the other end has connected anew")
        self._setup_of[name].taken(sock, claim)
        return None

    def stands(self, rail: Rail, *, ready: bool = True) -> None:
        self._prober.end()
        self._news.alive()
        self.skipped.pop(rail.name, None)
        self.link.add_rail(self._owner.wrap(rail, self), ready=ready)
        self.link.ping(rail.name)
        if self.dials and not self._carried:
            self._carried = True
            for name, setup in self._setup_of.items():
                if setup.needs_carrier:
                    self._dial(name)
        self.check_up()

    def mapped(self, refusal: str | None) -> None:
        """The endpoint has mapped the peer's rings, or cannot, for the reason given."""
        for setup in self._setups:
            setup.mapped(refusal)

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
        if self.announced and not self.over and self._news.step(rail, state, why):
            self._ask()

    def pong(self, sent: float, remote_received: float, remote_sent: float, received: float) -> None:
        self.clock.add(sent, remote_received, remote_sent, received)
        self._news.answered(sent)
        if not self.announced:
            if self.clock.count < FIRST_PINGS and self.link.connections:
                self.link.ping(next(iter(self.link.connections)))
            self.check_up()

    def rail_message(self, rail: Rail, message: dict[str, Any]) -> None:
        """The other proxy speaks of rails."""
        if isinstance(name := message.get("closed"), str):
            self._loop.post(functools.partial(self.link.drop_rail, name, "the other end has closed it"))
        elif isinstance(name := message.get("skip"), str):
            if len(self.skipped) < _MAX_SKIPPED:
                why = message.get("why")
                self.skipped.setdefault(name[:64], f"the other end says: {why[:1000] if isinstance(why, str) else ''}")
            self.check_up()
        elif "stood" in message:
            self._they_stood(message["stood"])
        else:
            for setup in self._setups:
                setup.message(message)

    # --- pauses

    def stood(self, began: float, ended: float) -> None:
        """This process stood still (s, its clock): the other end has to know, and clocks are compared anew."""
        if self.near and self.announced and not self.over:
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
        if self.over:
            if not (self.departed or self.link.connections) and self.link.unsent:
                log.warning("closed with %d messages unsent to %s: %s", self.link.unsent, self.info, reason)
            self._check_done()
            return
        self._setup_of[rail.name].lost(rail.name)
        if self.dials:
            self._plan_again(rail.name)
        if not self.link.connections:
            self._garbled = rail.garbled
            self._prober.begin(reason)

    def later(self, name: str) -> None:
        if not self.over:
            self.link.health.setdefault(name, Health()).failed(self._loop.clock())
            self._plan_again(name)

    def _plan_again(self, name: str) -> None:
        pause = max(0.0, self.link.health[name].until - self._loop.clock())
        # what was the last rail is missed at once
        wait = pause if self.link.connections else min(pause, _AT_ONCE_S)
        self._timers[name] = self._loop.call_later(wait, lambda: self._again(name))

    def _again(self, name: str) -> None:
        if self.gone or name in self.link.connections:
            return
        if self._setup_of[name].needs_carrier and not self.link.connections:
            self._timers[name] = self._loop.call_later(_AT_ONCE_S, lambda: self._again(name))
            return
        self.link.health[name].probing()
        self._dial(name)

    def _lose(self, reason: str) -> None:
        if not self.over:
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
        for setup in self._setups:
            setup.close()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._prober.end()
        self._news.drop()

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
