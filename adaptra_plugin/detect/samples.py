"""What a rank measured in one iteration, and its form on the wire.

Reports arrive over the network, so reading one checks every field: a report that does not fit is refused with a
sentence and never reaches the detector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

_MAX_MS = 1e9  # eleven days: longer than any deadline; larger numbers are garbage, not measurements
_MAX_BYTES = 1e15
_MAX_ENTRIES = 64


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

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {
            **asdict(self),
            "chunks": [asdict(times) for times in self.chunks],
            "links": [asdict(link) for link in self.links],
        }

    @classmethod
    def from_json(cls, data: Any) -> IterationReport:
        """Reads and checks a report that came over the network.

        Raises:
            ValueError: names the field, its value and what is allowed.
        """
        data = _table("report", data, {item.name for item in fields(cls)}, optional={"wait_ms", "compute_ms"})
        chunks, links = _list("report.chunks", data["chunks"]), _list("report.links", data["links"])
        if not chunks:
            raise ValueError("report.chunks is empty: a rank has at least one model chunk")
        pp_rank = _integer("report.pp_rank", data["pp_rank"])
        host = data["host"]
        if not isinstance(host, str) or len(host) > 255:
            raise ValueError(f"report.host: {host!r:.80} is not a name of at most 255 characters")
        return cls(
            replica=_integer("report.replica", data["replica"]),
            pp_rank=pp_rank,
            rank=_integer("report.rank", data["rank"]),
            host=host,
            iteration=_integer("report.iteration", data["iteration"]),
            microbatches=_integer("report.microbatches", data["microbatches"], least=1),
            iteration_ms=_milliseconds("report.iteration_ms", data["iteration_ms"]),
            plan_version=_integer("report.plan_version", data["plan_version"]),
            chunks=tuple(_times(f"report.chunks[{number}]", item) for number, item in enumerate(chunks)),
            links=tuple(_link(number, item, pp_rank) for number, item in enumerate(links)),
            wait_ms=_milliseconds("report.wait_ms", data.get("wait_ms", 0.0)),
            compute_ms=_milliseconds("report.compute_ms", data.get("compute_ms", 0.0)),
        )


def _list(where: str, data: Any) -> Sequence[Any]:
    if not isinstance(data, list | tuple) or len(data) > _MAX_ENTRIES:
        raise ValueError(f"{where}: {data!r:.80} is not a list of at most {_MAX_ENTRIES} entries")
    return data


def _times(where: str, item: Any) -> StageTimes:
    item = _table(where, item, {field.name for field in fields(StageTimes)})
    return StageTimes(**{name: _milliseconds(f"{where}.{name}", value) for name, value in item.items()})


def _link(number: int, item: Any, pp_rank: int) -> LinkDelay:
    where = f"report.links[{number}]"
    item = _table(where, item, {field.name for field in fields(LinkDelay)}, optional={"message_bytes"})
    link = LinkDelay(
        src=_integer(f"{where}.src", item["src"]),
        dst=_integer(f"{where}.dst", item["dst"]),
        delay_ms=_milliseconds(f"{where}.delay_ms", item["delay_ms"], least=-_MAX_MS),
        messages=_integer(f"{where}.messages", item["messages"]),
        message_bytes=_number(
            f"{where}.message_bytes", item.get("message_bytes", 0.0), 0.0, _MAX_BYTES, "a size in bytes"
        ),
    )
    if link.src == link.dst or link.dst != pp_rank:
        raise ValueError(f"{where}: {link.src} -> {link.dst} is not a link into stage {pp_rank}, which reports it")
    return link


def _table(where: str, data: Any, names: Set[str], optional: Set[str] = frozenset()) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: {data!r:.80} is not an object")
    missing, unknown = names - optional - set(data), set(data) - names
    if missing or unknown:
        wrong = [f"misses {', '.join(sorted(missing))}"] if missing else []
        wrong += [f"has the unknown {', '.join(sorted(map(str, unknown)))}"] if unknown else []
        raise ValueError(f"{where} {' and '.join(wrong)[:200]}")
    return data


def _integer(where: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 53:
        raise ValueError(f"{where}: {value!r:.80} is not a whole number from {least}")
    return value


def _milliseconds(where: str, value: Any, least: float = 0.0) -> float:
    return _number(where, value, least, _MAX_MS, "a time in milliseconds")


def _number(where: str, value: Any, least: float, most: float, what: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{where}: {value!r:.80} is not {what} between {least:g} and {most:g}")
    return float(value)
