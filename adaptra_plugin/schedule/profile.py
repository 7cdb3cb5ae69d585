"""Profiles: all that planning needs to know of a pipeline. Times are milliseconds for one microbatch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.errors import PlanError

MOST_MS = 2.0**50 / 1e6
"""Longest total of a profile. The planner adds up several such totals in nanoseconds, scales them by percentages of up
to 300 and takes 2**62 for never: 2**50 ns, 13 days, is far below and far above any iteration."""

MOST_ACTIONS = 10_000_000
"""Most actions of a profile: tables of more would not fit into memory, and no pipeline comes near."""


def _time(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanError(f"{where} is {value!r}: expected a number of milliseconds")
    if not 0 <= value <= 1e9:  # false for nan too
        raise PlanError(f"{where} is {value} ms: expected a finite time between 0 and 1e9 ms")
    return float(value)


def _count(value: object, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{where} is {value!r}: expected a whole number")
    if value < least:
        raise PlanError(f"{where} is {value}: expected at least {least}")
    return value


@dataclass(frozen=True)
class StageProfile:
    """One stage: milliseconds a microbatch, and how many activations it may hold (None: no limit).

    An activation counts from the start of its F to the end of its W. With several stages a rank, the limits of a
    rank's stages add up to the rank's limit, because they share its memory; either all stages of a rank have one or
    none. Raises PlanError for times that are negative or not finite and for limits below one.
    """

    forward_ms: float
    backward_input_ms: float
    backward_weight_ms: float
    max_activations: int | None = None

    def __post_init__(self) -> None:
        for name in ("forward_ms", "backward_input_ms", "backward_weight_ms"):
            object.__setattr__(self, name, _time(getattr(self, name), name))
        if self.max_activations is not None:
            _count(self.max_activations, "max_activations", 1)

    @property
    def total_ms(self) -> float:
        """F + I + W of one microbatch."""
        return self.forward_ms + self.backward_input_ms + self.backward_weight_ms


@dataclass(frozen=True)
class LinkProfile:
    """A link from rank ``src`` to rank ``dst``: delay of a transfer, and how long each transfer occupies the link."""

    src: int
    dst: int
    latency_ms: float
    transfer_ms: float = 0.0

    def __post_init__(self) -> None:
        _count(self.src, "src", 0)
        _count(self.dst, "dst", 0)
        if self.src == self.dst:
            raise PlanError(f"link {self.src} -> {self.dst} leads to the rank it starts from")
        for name in ("latency_ms", "transfer_ms"):
            object.__setattr__(self, name, _time(getattr(self, name), name))


@dataclass(frozen=True)
class Profile:
    """Microbatches, stages in pipeline order, links between ranks, stages a rank.

    ``stages`` has ``ranks * virtual_stages`` entries; stage s lives on rank s modulo ranks, unless a schedule
    places it elsewhere (zb-v). The ``max_activations`` of a rank's stages add up to the rank's limit: all of them have
    one or none (checked where the placement is known, see tabulate). A link holds for both directions unless its reverse is listed
    too; links not listed cost nothing. Raises PlanError when the parts do not fit together.
    """

    microbatches: int
    stages: tuple[StageProfile, ...]
    links: tuple[LinkProfile, ...] = ()
    virtual_stages: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "links", tuple(self.links))
        _count(self.microbatches, "microbatches", 1)
        _count(self.virtual_stages, "virtual_stages", 1)
        if not self.stages:
            raise PlanError("stages is empty: a pipeline has at least one stage")
        if len(self.stages) % self.virtual_stages:
            raise PlanError(
                f"{len(self.stages)} stages cannot be spread over ranks that hold {self.virtual_stages} each: "
                "stages lists every stage of the pipeline, so its length is a multiple of virtual_stages"
            )
        self._check_size()
        seen: set[tuple[int, int]] = set()
        for link in self.links:
            if max(link.src, link.dst) >= self.ranks:
                raise PlanError(f"link {link.src} -> {link.dst} names a rank beyond the last, {self.ranks - 1}")
            if (link.src, link.dst) in seen:
                raise PlanError(f"link {link.src} -> {link.dst} is listed twice")
            seen.add((link.src, link.dst))

    def _check_size(self) -> None:
        """Sums of times are kept in 64-bit nanoseconds; no makespan is longer than everything one after the other."""
        actions = 3 * self.microbatches * len(self.stages)
        if actions > MOST_ACTIONS:
            raise PlanError(
                f"{self.microbatches} microbatches on {len(self.stages)} stages are {actions} actions, "
                f"at most {MOST_ACTIONS} can be planned: give fewer microbatches"
            )
        stages = sum(stage.total_ms for stage in self.stages)
        links = 2 * sum(link.latency_ms + link.transfer_ms for link in self.links)  # there and back
        total = self.microbatches * (stages + links * self.virtual_stages)
        if total > MOST_MS:
            raise PlanError(
                f"all work and transfers of {self.microbatches} microbatches add up to {total:.3g} ms, at most "
                f"{MOST_MS:.3g} ms can be planned: times are milliseconds, for one microbatch"
            )

    @property
    def ranks(self) -> int:
        """Number of ranks, each holding ``virtual_stages`` stages."""
        return len(self.stages) // self.virtual_stages

    def link(self, src: int, dst: int) -> LinkProfile:
        """The link from rank ``src`` to rank ``dst``; without cost when neither it nor its reverse is listed."""
        reverse = None
        for link in self.links:
            if (link.src, link.dst) == (src, dst):
                return link
            if (link.src, link.dst) == (dst, src):
                reverse = link
        return LinkProfile(src, dst, reverse.latency_ms if reverse else 0.0, reverse.transfer_ms if reverse else 0.0)

    def to_json(self) -> dict[str, Any]:
        """The PROFILE format as a dict of plain values."""
        stages: list[dict[str, Any]] = []
        for stage in self.stages:
            entry: dict[str, Any] = {
                "forward_ms": stage.forward_ms,
                "backward_input_ms": stage.backward_input_ms,
                "backward_weight_ms": stage.backward_weight_ms,
            }
            if stage.max_activations is not None:
                entry["max_activations"] = stage.max_activations
            stages.append(entry)
        out: dict[str, Any] = {"microbatches": self.microbatches, "stages": stages}
        if self.virtual_stages != 1:
            out["virtual_stages"] = self.virtual_stages
        if self.links:
            out["links"] = [
                {"src": k.src, "dst": k.dst, "latency_ms": k.latency_ms, "transfer_ms": k.transfer_ms}
                for k in self.links
            ]
        return out

    @classmethod
    def from_json(cls, data: object) -> Profile:
        """Reads the PROFILE format. Raises PlanError that names the entry which is missing, unknown or wrong."""
        top = _fields(data, "profile", {"microbatches", "stages"}, {"links", "virtual_stages"})
        stages = [
            _build(
                StageProfile,
                _fields(
                    entry,
                    f"stages[{n}]",
                    {"forward_ms", "backward_input_ms", "backward_weight_ms"},
                    {"max_activations"},
                ),
                f"stages[{n}]",
            )
            for n, entry in enumerate(_items(top["stages"], "stages"))
        ]
        links = [
            _build(
                LinkProfile,
                _fields(entry, f"links[{n}]", {"src", "dst", "latency_ms"}, {"transfer_ms"}),
                f"links[{n}]",
            )
            for n, entry in enumerate(_items(top.get("links") or [], "links"))
        ]
        return cls(top["microbatches"], tuple(stages), tuple(links), top.get("virtual_stages", 1))


def _items(value: object, where: str) -> list[object]:
    if not isinstance(value, (list, tuple)):
        raise PlanError(f"{where} is a {type(value).__name__}: expected a list")
    return list(value)


def _fields(value: object, where: str, required: set[str], optional: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PlanError(f"{where} is a {type(value).__name__}: expected an object")
    missing = sorted(required - set(value))
    unknown = sorted(set(value) - required - optional, key=str)
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has unknown {', '.join(map(str, unknown))}"] if unknown else []
        raise PlanError(f"{where} {' and '.join(parts)}; known: {', '.join(sorted(required | optional))}")
    return value


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    try:
        return cls(**values)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None
