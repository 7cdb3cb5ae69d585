"""The RDMA ports of a proxy, and how its RDMA rails to one neighbour come up.

A rail needs numbers of both ends, which travel as notes over whatever rail there is already:

    dialling end: offers          ---- note ---->   accepts, then offers
    accepts       <---------------- note ----       (refuses: says why)
    its first slot  ============= RDMA =========>   the rail stands: used from now on
    the rail stands <============ RDMA ==========   its first slot

A rail that has heard from the other end works both ways, so no data is ever entrusted to one that is only hoped for. Each
end accepts only once it knows the way to the other one (`arp`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.proxy.loop import Loop, Timer
from adaptra_plugin.transport.proxy.rails.base import Rail, RailKind, Sink
from adaptra_plugin.transport.proxy.rails.rdma import nics
from adaptra_plugin.transport.proxy.rails.rdma.arp import ArpQuery
from adaptra_plugin.transport.proxy.rails.rdma.nics import Nic
from adaptra_plugin.transport.proxy.rails.rdma.rail import LANDING_BYTES, RdmaRail
from adaptra_plugin.transport.proxy.rails.rdma.verbs import VerbsError
from adaptra_plugin.transport.proxy.rails.setup import Local, RailFactory, RailSetup, Remote
from adaptra_plugin.transport.proxy.settings import ProxySettings
from adaptra_plugin.transport.proxy.wire import FrameHeader, MalformedFrame

MAX_TEXT = 500
_WITH_TLS = "adaptra.transport.tls is set, and RDMA does not encrypt"


class RdmaFactory(RailFactory):
    """The RDMA ports that a proxy uses, open; `why_none` if there are none."""

    def __init__(self) -> None:
        self.nics: list[Nic] = []
        self.why_none = "adaptra.transport.rail rules it out"

    def find(self, loop: Loop, settings: ProxySettings) -> None:
        """What is missing is a reason."""
        if not settings.wants(RailKind.RDMA.word):
            return
        if settings.tls:
            self.why_none = _WITH_TLS
            return
        if not settings.rdma_devices:
            self.why_none = "adaptra.transport.rdma_devices is empty"
            return
        self.nics, problems = nics.find(loop, settings.rdma_devices)
        self.why_none = "; ".join(problems) or "no RDMA port is up"
        if self.nics:
            for problem in problems:
                log.warning("an RDMA port is not used: %s", problem)

    def advertised(self) -> dict[str, Any]:
        return {"rdma": tuple(nic.info() for nic in self.nics)}

    def setup(self, local: Local, peer: Remote) -> RailSetup:
        return RdmaRails(self, local, peer)

    def abandon(self) -> None:
        """Closing here what is open would close it there."""
        for nic in self.nics:
            nic.device.abandon()

    def close(self) -> None:
        for nic in self.nics:
            nic.close()
        self.nics.clear()


class _Attempt:
    """A rail that does not stand yet, and its sink until it does."""

    rail: RdmaRail
    arp_query: ArpQuery
    timer: Timer

    def __init__(self, number: int, link: Sink, on_failed: Callable[[str], None]) -> None:
        self.number = number
        self.answered = False
        self.limit, self.lanes = link.limit, link.lanes
        self._on_failed = on_failed

    def place(self, rail: Rail, header: FrameHeader) -> list[memoryview] | None:
        raise MalformedFrame("a segment came over a rail that does not stand")

    def arrived(self, rail: Rail, header: FrameHeader, body: bytes = b"") -> None:
        raise MalformedFrame("a frame came over a rail that does not stand")

    def failed(self, rail: Rail, reason: str) -> None:
        self._on_failed(reason)

    def end(self) -> None:
        """It is no attempt any more."""
        self.arp_query.close()
        self.timer.cancel()

    def close(self) -> None:
        self.end()
        self.rail.close()


class RdmaRails(RailSetup):
    """The RDMA rails to one neighbour; one attempt a rail at a time. The other rails carry the notes."""

    kind = RailKind.RDMA

    def __init__(self, factory: RdmaFactory, local: Local, peer: Remote) -> None:
        super().__init__(local, peer)
        settings = local.settings
        self._nics = factory.nics
        self._timeout_s = settings.handshake_timeout_s
        self._theirs = peer.endpoint_info.rdma
        self._pairs = nics.pairs([nic.info() for nic in self._nics], self._theirs)
        self._attempts: dict[str, _Attempt] = {}
        self._numbers: dict[str, int] = {}  # of the newest attempt: notes may overtake each other
        self._closed = False
        # never more under way than the peer's rings hold; room for a segment must always come free
        rings_bytes = sum(ring.capacity for ring in peer.rings.values())
        self._landing_bytes = max(min(LANDING_BYTES, rings_bytes), 4 * (settings.segment_kib << 10))
        if not peer.near or peer.by_reference or not settings.wants(self.kind.word):
            return
        # the same at both ends, though they may number their ports differently
        self.names = tuple(f"{self.kind.word}{index}" for index in range(len(self._pairs)))
        if local.tls is not None:
            self._rule_out(_WITH_TLS)
        elif not factory.nics:
            self._rule_out(factory.why_none)
        elif not self._theirs:
            self._rule_out("the other end offers none, see its log")
        elif not self._pairs:
            self._rule_out("its ports are of another kind")

    @property
    def needs_carrier(self) -> bool:
        return True

    # --- the dialling end

    def dial(self, name: str) -> None:
        """Offers a rail, in place of an attempt that is being made."""
        if self._closed:
            return
        number = self._numbers[name] = self._numbers.get(name, 0) + 1
        mine, theirs = self._pairs[self.names.index(name)]
        try:
            offer = self._attempt(name, number, self._nics[mine], theirs).rail.offer()
        except VerbsError as error:
            # not from here: the caller may be in the middle of bringing up others
            self._loop.post(functools.partial(self._give_up, name, number, str(error)))
            return
        self._tell(name, number, port=theirs, offer=offer)

    def _answered(self, name: str, number: int, message: Mapping[str, Any]) -> None:
        attempt = self._attempts.get(name)
        if attempt is None or attempt.number != number or attempt.answered:
            return  # too late
        attempt.answered = True

        def accept() -> None:
            try:
                attempt.rail.accept(_offer_of(message, "answer"))
            except VerbsError as error:
                self._give_up(name, number, str(error))

        attempt.arp_query.when_known(accept)

    def _give_up(self, name: str, number: int, why: str) -> None:
        """An attempt has failed. The end that is dialled only forgets it: the other one tries again, or says why not."""
        if self._closed or self._numbers.get(name) != number:
            return
        self._forget(name)
        if self._peer.dials and not self._peer.over:
            self._peer.later(name)
            if not self._peer.announced:
                self._peer.skip(name, why)

    # --- the other end

    def _offered(self, name: str, number: int, message: Mapping[str, Any]) -> None:
        if number <= self._numbers.get(name, 0):
            return
        self._numbers[name] = number
        port = message.get("port")
        try:
            if type(port) is not int or not 0 <= port < len(self._nics):
                raise VerbsError(f"the offer of rail {name} is for port {str(port)[:20]}; there are {len(self._nics)}")
            # it offers anew because its end has failed, which this end may not have noticed yet
            self._peer.link.drop_rail(name, "the other end has connected anew")
            theirs = next((theirs for mine, theirs in self._pairs if mine == port), None)
            attempt = self._attempt(name, number, self._nics[port], theirs)
        except VerbsError as error:
            self._refuse(name, number, error)
            return

        def accept() -> None:
            try:
                attempt.rail.accept(_offer_of(message, "offer"))
                answer = attempt.rail.offer()
            except VerbsError as error:
                self._refuse(name, number, error)
            else:
                self._tell(name, number, answer=answer)

        attempt.arp_query.when_known(accept)

    def _refuse(self, name: str, number: int, error: VerbsError) -> None:
        self._forget(name)
        self._tell(name, number, refused=str(error))

    # --- both

    def message(self, message: dict[str, Any]) -> None:
        name, number = message.get(self.kind.word), message.get("attempt")
        if isinstance(name, str) and name in self.names and type(number) is int:
            # not from here: the link is in the middle of a frame
            self._loop.post(functools.partial(self._note, name, number, message))

    def _note(self, name: str, number: int, message: Mapping[str, Any]) -> None:
        if self._closed:
            return
        if not self._peer.dials:
            self._offered(name, number, message)
        elif isinstance(why := message.get("refused"), str):
            self._give_up(name, number, f"the other end says: {why[:MAX_TEXT]}")
        else:
            self._answered(name, number, message)

    def _attempt(self, name: str, number: int, nic: Nic, theirs: int | None) -> _Attempt:
        """`theirs`: which of the other end's ports. Raises VerbsError."""
        self._forget(name)
        attempt = _Attempt(number, self._peer.link, functools.partial(self._give_up, name, number))
        attempt.rail = RdmaRail(name, attempt, nic, self._peer.rings, landing_bytes=self._landing_bytes)
        attempt.rail.on_heard = functools.partial(self._stands, name, attempt)
        attempt.arp_query = nic.arp_query(self._theirs[theirs] if theirs is not None else {})
        attempt.timer = self._loop.call_later(self._timeout_s, functools.partial(self._late, name, attempt))
        self._attempts[name] = attempt
        return attempt

    def _late(self, name: str, attempt: _Attempt) -> None:
        if attempt.arp_query.known:
            why = f"the other end was not heard over {attempt.rail.describe()} within {self._timeout_s:g} s"
        else:
            why = f"{attempt.arp_query} within {self._timeout_s:g} s"
        self._give_up(name, attempt.number, why)

    def _stands(self, name: str, attempt: _Attempt) -> None:
        if self._attempts.get(name) is attempt:
            del self._attempts[name]
            attempt.end()
            attempt.rail.sink = self._peer.link
            if self._peer.over:
                attempt.rail.close()
            else:
                self._peer.stands(attempt.rail)

    def _forget(self, name: str) -> None:
        if (attempt := self._attempts.pop(name, None)) is not None:
            attempt.close()

    def _tell(self, name: str, number: int, **fields: Any) -> None:
        self._peer.link.send_rail_message({self.kind.word: name, "attempt": number, **fields})
        self._peer.link.pump()

    def close(self) -> None:
        self._closed = True
        for name in list(self._attempts):
            self._forget(name)


def _offer_of(message: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    offer = message.get(field)
    if not isinstance(offer, Mapping):
        raise VerbsError("a note about an RDMA rail has no offer")
    return offer
