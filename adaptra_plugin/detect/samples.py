"""What a rank measured in one iteration, and its form on the wire.

    version, chunks, links, bytes of the host's name (1 byte each) | numbers | times | chunks | links | host's name

All is little-endian. Reports arrive over the network, so reading one checks every field: a report that does not fit is refused
with a sentence and never reaches the detector.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

VERSION = 1
_MAX_MS = 1e9  # eleven days: longer than any deadline; larger numbers are garbage, not measurements
_MAX_BYTES = 1e15
_MAX_ENTRIES = 64
_MAX_HOST = 255
_HEAD = struct.Struct("<4B")
_NUMBERS = struct.Struct("<IIIQIQ")
_NAMES = ("replica", "pp_rank", "rank", "iteration", "microbatches", "plan_version")
_TIMES = struct.Struct("<3d")
_CHUNK = struct.Struct("<3d")
_LINK = struct.Struct("<IIIdd")


@dataclass(frozen=True)
class StageTimes:
    """Median compute times of one microbatch on one stage over an iteration (ms), waiting excluded.

    An unsplit backward is reported as `backward_input_ms` with `backward_weight_ms = 0`.
    """

    forward_ms: float
    backward_input_ms: float
    backward_weight_ms: float

    @property
    def total_ms(self) -> float:
        """Forward and whole backward of one microbatch (ms); the same whether the backward is split or not."""
        return self.forward_ms + self.backward_input_ms + self.backward_weight_ms


@dataclass(frozen=True)
class LinkDelay:
    """Median one-way delay (ms) of the messages that position `dst` received from position `src` in one iteration.

    A difference of two clocks, so it may be slightly negative.
    """

    src: int
    dst: int
    delay_ms: float
    messages: int
    message_bytes: float = 0.0
    """Median size of the messages; 0 if it was not measured."""


@dataclass(frozen=True)
class IterationReport:
    """What one rank measured in one iteration: compute of its stages, delays of the links it receives from."""

    replica: int
    """Pipeline replica (data-parallel index)."""
    pp_rank: int
    """Position of the rank in its replica: its stage, or with several model chunks the first of its stages."""
    rank: int
    """World rank."""
    host: str
    """Host name, for people."""
    iteration: int
    """Training iteration, 0-based."""
    microbatches: int
    """Microbatches of the iteration."""
    iteration_ms: float
    """Wall time of the whole iteration (ms)."""
    plan_version: int
    """Version of the plan that the iteration ran."""
    chunks: tuple[StageTimes, ...]
    """Median compute times per microbatch of each model chunk, in the order of the stages."""
    links: tuple[LinkDelay, ...]
    """Delays of the directed links into this rank."""
    wait_ms: float = 0.0
    """Total time (ms) that the stage waited for messages."""
    compute_ms: float = 0.0
    """Total time (ms) that the stage computed; 0 if it was not measured."""

    @property
    def times(self) -> StageTimes:
        """Compute times of one microbatch on all chunks of the rank together."""
        return StageTimes(
            sum(chunk.forward_ms for chunk in self.chunks),
            sum(chunk.backward_input_ms for chunk in self.chunks),
            sum(chunk.backward_weight_ms for chunk in self.chunks),
        )

    @property
    def bubble_ms(self) -> float:
        """Time (ms) in which the stage did not compute; the waiting time alone if compute was not measured."""
        return max(0.0, self.iteration_ms - self.compute_ms) if self.compute_ms else self.wait_ms

    def metrics(self) -> dict[str, Any]:
        """What people look at: numbers (ms), and a delay per directed link."""
        return {
            "iteration": self.iteration,
            "pp_rank": self.pp_rank,
            "replica": self.replica,
            "microbatches": self.microbatches,
            "plan_version": self.plan_version,
            "iteration_ms": round(self.iteration_ms, 3),
            "forward_ms": round(self.times.forward_ms, 3),
            "backward_input_ms": round(self.times.backward_input_ms, 3),
            "backward_weight_ms": round(self.times.backward_weight_ms, 3),
            "wait_ms": round(self.wait_ms, 3),
            "bubble_ms": round(self.bubble_ms, 3),
            "link_delay_ms": {f"{link.src}-{link.dst}": round(link.delay_ms, 3) for link in self.links},
        }

    def to_bytes(self) -> bytes:
        """The form on the wire. Raises ValueError for a report that has none."""
        host = self.host.encode("utf-8", "backslashreplace")
        if len(host) > _MAX_HOST:
            raise ValueError(f"report.host: {self.host!r:.80} has {len(host)} bytes, at most {_MAX_HOST} fit")
        try:
            return b"".join(
                (
                    _HEAD.pack(VERSION, len(self.chunks), len(self.links), len(host)),
                    _NUMBERS.pack(*(getattr(self, name) for name in _NAMES)),
                    _TIMES.pack(self.iteration_ms, self.wait_ms, self.compute_ms),
                    *(_CHUNK.pack(c.forward_ms, c.backward_input_ms, c.backward_weight_ms) for c in self.chunks),
                    *(_LINK.pack(k.src, k.dst, k.messages, k.delay_ms, k.message_bytes) for k in self.links),
                    host,
                )
            )
        except struct.error as error:
            raise ValueError(f"report: a number does not fit its field: {error}") from None

    @classmethod
    def from_bytes(cls, data: bytes) -> IterationReport:
        """Reads and checks a report that came over the network.

        Raises:
            ValueError: names the field, its value and what is allowed.
        """
        if len(data) < _HEAD.size or data[0] != VERSION:
            raise ValueError(f"report: {len(data)} bytes that start with {data[:1].hex() or 'nothing'}: no report")
        _, chunk_count, link_count, host_bytes = _HEAD.unpack_from(data)
        if not 1 <= chunk_count <= _MAX_ENTRIES or link_count > _MAX_ENTRIES:
            raise ValueError(
                f"report: {chunk_count} chunks and {link_count} links: a rank has 1 to {_MAX_ENTRIES} chunks and at most "
                f"{_MAX_ENTRIES} links"
            )
        at = _HEAD.size + _NUMBERS.size + _TIMES.size
        links_at = at + chunk_count * _CHUNK.size
        host_at = links_at + link_count * _LINK.size
        if host_at + host_bytes != len(data):
            raise ValueError(f"report: {len(data)} bytes, {host_at + host_bytes} are announced")
        replica, pp_rank, rank, iteration, microbatches, plan_version = _NUMBERS.unpack_from(data, _HEAD.size)
        if microbatches < 1 or max(iteration, plan_version) >= 1 << 53:
            raise ValueError(
                f"report: {microbatches} microbatches in iteration {iteration} of plan v{plan_version}: expected at least "
                f"one, and numbers below 2**53"
            )
        iteration_ms, wait_ms, compute_ms = times = _TIMES.unpack_from(data, _HEAD.size + _NUMBERS.size)
        _check("report.iteration_ms, wait_ms, compute_ms", times)
        chunks = tuple(_CHUNK.iter_unpack(data[at:links_at]))
        for number, chunk in enumerate(chunks):
            _check(f"report.chunks[{number}]", chunk)
        return cls(
            replica=replica,
            pp_rank=pp_rank,
            rank=rank,
            host=_text(data[host_at:]),
            iteration=iteration,
            microbatches=microbatches,
            iteration_ms=iteration_ms,
            plan_version=plan_version,
            chunks=tuple(StageTimes(*chunk) for chunk in chunks),
            links=tuple(_link(n, item, pp_rank) for n, item in enumerate(_LINK.iter_unpack(data[links_at:host_at]))),
            wait_ms=wait_ms,
            compute_ms=compute_ms,
        )


def _link(number: int, item: tuple[Any, ...], pp_rank: int) -> LinkDelay:
    src, dst, messages, delay_ms, message_bytes = item
    where = f"report.links[{number}]"
    _check(f"{where}.delay_ms", (delay_ms,), least=-_MAX_MS)
    _check(f"{where}.message_bytes", (message_bytes,), most=_MAX_BYTES, what="bytes")
    if src == dst or dst != pp_rank:
        raise ValueError(f"{where}: {src} -> {dst} is not a link into stage {pp_rank}, which reports it")
    return LinkDelay(src, dst, delay_ms, messages, message_bytes)


def _check(where: str, values: Iterable[float], least: float = 0.0, most: float = _MAX_MS, what: str = "ms") -> None:
    for value in values:
        if not least <= value <= most:  # false for nan too
            raise ValueError(f"{where}: {value!r} is not a number of {what} between {least:g} and {most:g}")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"report.host: {data!r:.80} is not UTF-8: {error.reason}") from None
