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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy import nics
from adaptra_plugin.transport.proxy.arp import ArpQuery
from adaptra_plugin.transport.proxy.link import Link
from adaptra_plugin.transport.proxy.loop import Loop, Timer
from adaptra_plugin.transport.proxy.nics import Nic
from adaptra_plugin.transport.proxy.rails.base import Rail, RailKind
from adaptra_plugin.transport.proxy.rails.rdma import LANDING_BYTES, RdmaRail
from adaptra_plugin.transport.proxy.settings import ProxySettings
from adaptra_plugin.transport.proxy.verbs import VerbsError
from adaptra_plugin.transport.proxy.wire import FrameHeader, MalformedFrame
from adaptra_plugin.transport.types import Direction

MAX_TEXT = 500


class Ports:
    """The RDMA ports that a proxy uses, open; `why_none` if there are none."""

    def __init__(self) -> None:
        self.nics: list[Nic] = []
        self.why_none = "adaptra.transport.rail rules it out"

    def find(self, loop: Loop, settings: ProxySettings) -> None:
        """Opens what the configuration wants and the machine has. Never raises: what is missing is a reason."""
        if not settings.wants(RailKind.RDMA):
            return
        if settings.tls:
            self.why_none = "adaptra.transport.tls is set, and RDMA does not encrypt"
            return
        if not settings.rdma_devices:
            self.why_none = "adaptra.transport.rdma_devices is empty"
            return
        self.nics, problems = nics.find(loop, settings.rdma_devices)
        self.why_none = "; ".join(problems) or "no RDMA port is up"
        if self.nics:
            for problem in problems:
                log.warning("an RDMA port is not used: %s", problem)

    def infos(self) -> tuple[dict[str, Any], ...]:
        """For `EndpointInfo.rdma`."""
        return tuple(nic.info() for nic in self.nics)

    def abandon(self) -> None:
        """In a forked child: what is open belongs to the parent, and closing it here would close it there."""
        for nic in self.nics:
            nic.device.abandon()

    def close(self) -> None:
        """After all rails over them."""
        for nic in self.nics:
            nic.close()
        self.nics.clear()


class _Attempt:
    """A rail that does not stand yet, and its sink until it does."""

    rail: RdmaRail
    arp_query: ArpQuery
    timer: Timer

    def __init__(self, number: int, link: Link, on_failed: Callable[[str], None]) -> None:
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

    def drained(self, rail: Rail) -> None: ...

    def end(self) -> None:
        """It is no attempt any more."""
        self.arp_query.close()
        self.timer.cancel()

    def close(self) -> None:
        self.end()
        self.rail.close()


class RdmaSetup:
    """Makes the RDMA rails to one neighbour; one attempt a rail at a time.

    Args:
        link: carries the notes, and is the sink of rails that stand.
        mine, theirs: this proxy's ports, and the other one's as its card has them.
        rings: what is sent from.
        segment_bytes: longest segment; the landing holds several.
        timeout_s: for an attempt, from the offer to the first word of the other end.
        dials: whether this end makes the offers.
        on_up: a rail stands. on_failed: `(name, why)`, at the dialling end: this attempt will not succeed.
    """

    def __init__(
        self,
        loop: Loop,
        link: Link,
        mine: Sequence[Nic],
        theirs: Sequence[Mapping[str, Any]],
        rings: Mapping[tuple[Direction, int], Memfd],
        *,
        segment_bytes: int,
        timeout_s: float,
        dials: bool,
        on_up: Callable[[RdmaRail], None],
        on_failed: Callable[[str, str], None],
    ) -> None:
        self._loop = loop
        self._link = link
        self._nics = list(mine)
        self._rings = dict(rings)
        self._timeout_s = timeout_s
        self._dials = dials
        self._on_up, self._on_failed = on_up, on_failed
        self._theirs = list(theirs)
        self._pairs = nics.pairs([nic.info() for nic in mine], theirs)
        self.names = [f"rdma{index}" for index in range(len(self._pairs))]
        """The same at both ends, though they may number their ports differently."""
        self._attempts: dict[str, _Attempt] = {}
        self._numbers: dict[str, int] = {}  # of the newest attempt: notes may overtake each other
        self._begun = self._closed = False
        # never more under way than the peer's rings hold; room for a segment must always come free
        rings_bytes = sum(ring.capacity for ring in self._rings.values())
        self._landing_bytes = max(min(LANDING_BYTES, rings_bytes), 4 * segment_bytes)

    # --- the dialling end

    def begin(self) -> None:
        """A rail stands that can carry notes; the first call counts."""
        if self._dials and not self._begun:
            self._begun = True
            for name in self.names:
                self.dial(name)

    def dial(self, name: str) -> None:
        """Offers a rail, in place of an attempt that is being made."""
        if self._closed:
            return
        number = self._numbers[name] = self._numbers.get(name, 0) + 1
        mine, theirs = self._pairs[int(name.removeprefix("rdma"))]
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
        if self._dials:
            self._on_failed(name, why)

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
            self._link.drop_rail(name, "the other end has connected anew")
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

    def message(self, message: Mapping[str, Any]) -> None:
        """A note of the other end about one of these rails."""
        name, number = message.get("rdma"), message.get("attempt")
        if self._closed or not isinstance(name, str) or name not in self.names or type(number) is not int:
            return
        if not self._dials:
            self._offered(name, number, message)
        elif isinstance(why := message.get("refused"), str):
            self._give_up(name, number, f"the other end says: {why[:MAX_TEXT]}")
        else:
            self._answered(name, number, message)

    def _attempt(self, name: str, number: int, nic: Nic, theirs: int | None) -> _Attempt:
        """`theirs`: which of the other end's ports. Raises VerbsError."""
        self._forget(name)
        attempt = _Attempt(number, self._link, functools.partial(self._give_up, name, number))
        attempt.rail = RdmaRail(name, attempt, nic, self._rings, landing_bytes=self._landing_bytes)
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
            attempt.rail.sink = self._link
            self._on_up(attempt.rail)

    def _forget(self, name: str) -> None:
        if (attempt := self._attempts.pop(name, None)) is not None:
            attempt.close()

    def _tell(self, name: str, number: int, **fields: Any) -> None:
        self._link.send_rail_message({"rdma": name, "attempt": number, **fields})
        self._link.pump()

    def close(self) -> None:
        """No more attempts. Idempotent."""
        self._closed = True
        for name in list(self._attempts):
            self._forget(name)


def _offer_of(message: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    offer = message.get(field)
    if not isinstance(offer, Mapping):
        raise VerbsError("a note about an RDMA rail has no offer")
    return offer
