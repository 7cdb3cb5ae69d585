"""Faults injected on purpose between the caller and the wire, by configuration.

A `LinkFault` decorates one link: the channel asks it what to do with each frame before the frame is queued. Nothing
else in the transport knows that faults exist. Without configured faults the link has `HEALTHY`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adaptra_plugin.config import SlowLink


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens to one frame."""

    hold_s: float = 0.0
    """The frame reaches the wire no earlier than this after `send`; transfers overlap, only latency grows."""


UNTOUCHED = Verdict()


class LinkFault(Protocol):
    """Decides about the frames that this rank sends over one link."""

    def verdict(self, nbytes: int) -> Verdict: ...


class Healthy:
    """A link without injected faults."""

    def verdict(self, nbytes: int) -> Verdict:
        return UNTOUCHED


HEALTHY = Healthy()


class _Latency:
    """The slow links configured between two stages; several at once add up."""

    def __init__(self, links: tuple[SlowLink, ...], faults: Faults) -> None:
        self._links = links
        self._faults = faults

    def verdict(self, nbytes: int) -> Verdict:
        iteration = self._faults.iteration
        latency_ms = sum(link.latency_ms for link in self._links if link.active(iteration))
        return Verdict(latency_ms / 1e3) if latency_ms else UNTOUCHED


class Faults:
    """All injected faults of this rank's links; `iteration` (0-based) says which are active."""

    def __init__(self, stage: int, links: Sequence[SlowLink] = ()) -> None:
        self._stage = stage
        self._links = tuple(links)
        self.iteration = 0

    def towards(self, stage: int) -> LinkFault:
        """The faults of the link to a peer of `stage`. Each end delays what it sends, so both directions are slow."""
        ends = {self._stage, stage}
        links = tuple(link for link in self._links if {link.src, link.dst} == ends)
        return _Latency(links, self) if links else HEALTHY
