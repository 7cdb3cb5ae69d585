"""Is the peer there at all? Asked while no rail to it stands. A host that is up refuses where nobody listens any more."""

from __future__ import annotations

from collections.abc import Callable

from adaptra_plugin.backoff import Backoff
from adaptra_plugin.transport.bind import is_loopback
from adaptra_plugin.transport.proxy.handshake_connection import Probe
from adaptra_plugin.transport.proxy.loop import Loop, Timer
from adaptra_plugin.transport.types import Address

FIRST_PROBE_S, LONGEST_PAUSE_S = 0.1, 1.0
ONLY_ITS_HOST = "which only its own host reaches: for ranks elsewhere set adaptra.transport.bind there"
REFUSALS = 3
"""Before a first rail has stood, one refusal may be a host that is still coming up behind a firewall."""


class PeerProber:
    """Probes a peer's address, more and more seldom, until a rail stands.

    Args:
        patience_s: how long a peer may be without any rail once one has stood (s).
        lose: is given the reason why the peer counts as gone.
    """

    def __init__(self, loop: Loop, address: Address, patience_s: float, lose: Callable[[str], None]) -> None:
        self._loop = loop
        self._address = address
        self._patience_s = patience_s
        self._lose = lose
        self._reason: str | None = None  # why the last rail went; None: none has stood yet
        self._since: float | None = None
        self._pauses = Backoff(FIRST_PROBE_S, LONGEST_PAUSE_S)
        self._refusals = 0
        self._probe: Probe | None = None
        self._timer: Timer | None = None

    def begin(self, reason: str | None = None) -> None:
        """No rail stands: none yet, or the last one has gone for `reason`."""
        self.end()
        self._reason, self._since = reason, self._loop.clock()
        self._pauses.reset()
        if reason is None:
            self._pauses.pause_s = LONGEST_PAUSE_S
            self._timer = self._loop.call_later(LONGEST_PAUSE_S, self._look)
        else:
            self._look()

    def end(self) -> None:
        """A rail stands, or nobody wants to know any more. Idempotent."""
        self._since = None
        self._refusals = 0
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def refused(self) -> None:
        """A connection was refused, here or where a rail was dialled."""
        if self._since is None:
            return
        self._refusals += 1
        if self._reason is not None:
            self._lose(f"{self._reason}, and nothing listens at {self._address} any more")
        elif self._refusals >= REFUSALS:
            loopback = is_loopback(self._address.host)
            why = f"that is loopback, {ONLY_ITS_HOST}" if loopback else "or a firewall refuses for it"
            self._lose(f"nothing listens at {self._address} (refused {self._refusals} times), {why}")

    def _look(self) -> None:
        if self._since is None:
            return
        silent = self._loop.clock() - self._since
        if self._reason is not None and silent >= self._patience_s:
            self._lose(f"{self._reason}, and no rail has come back within {silent:.1f} s")
            return
        if self._probe is not None:
            self._probe.close()
        self._probe = Probe(self._loop, self._address, self._probed)
        pause = min(self._pauses.next(), max(self._patience_s - silent, 0.01))
        self._timer = self._loop.call_later(pause, self._look)

    def _probed(self, somebody: bool) -> None:
        self._probe = None
        if somebody:
            self._refusals = 0
        else:
            self.refused()
