"""Every error that Adaptra raises on purpose. Each message says what happened, with numbers, and what to change."""

from __future__ import annotations

from collections.abc import Sequence


class AdaptraError(Exception):
    """Base of all errors raised by adaptra_plugin."""


class ConfigError(AdaptraError, ValueError):
    """The "adaptra" block is wrong; the message has one line per mistake."""


class UnsupportedError(AdaptraError, RuntimeError):
    """A host version, or a combination of settings, that Adaptra refuses to run with."""


def refuse(found: Sequence[tuple[str, str]], otherwise: str) -> None:
    """Raises UnsupportedError if anything was found: (reason, remedy), a line each. `otherwise`: how to run without Adaptra."""
    if found:
        lines = "\n".join(f"  - {reason}: {remedy}" for reason, remedy in found)
        raise UnsupportedError(f"Adaptra cannot run this job ({otherwise}):\n{lines}")


class PlanError(AdaptraError, ValueError):
    """A profile, a schedule or a plan that is invalid or infeasible."""


class TransportError(AdaptraError, RuntimeError):
    """Bytes could not be moved between ranks. `why`: the cause alone, where the message says more."""

    why: str = ""


class PeerLostError(TransportError):
    """The process at the other end of a link is gone. `peer`: who (`PeerInfo`), if the error is about a transfer."""

    peer: object = None


class TransferTimeout(TransportError, TimeoutError):
    """A transfer did not complete within its deadline."""


class HandshakeError(TransportError):
    """A connection did not prove knowledge of the job's secret, or speaks another protocol version."""
