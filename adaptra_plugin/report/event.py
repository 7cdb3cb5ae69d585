"""What happened to a link, a stage or a peer, for people and for machines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from adaptra_plugin.detect import Finding

Kind = Literal["link", "stage", "peer", "rail", "part"]
Change = Literal["lost", "healed"]


@dataclass(frozen=True, kw_only=True)
class StragglerEvent:
    """One change that somebody should know about. Delays and iteration times are ms."""

    time_unix: float = field(default_factory=time.time)
    """Seconds since the epoch at which it was found."""
    kind: Kind
    state: Literal["slow", "healed", "lost"]
    replica: int
    """Pipeline replica (data-parallel index)."""
    link: str | None = None
    """`2-3` for the link between positions 2 and 3."""
    pp_ranks: tuple[int, ...] = ()
    """Positions in the pipeline; `ranks` and `hosts` are in the same order."""
    ranks: tuple[int, ...]
    """World ranks there."""
    hosts: tuple[str, ...]
    """Host names of the ranks."""
    since_iteration: int
    """First iteration in which it was so."""
    found_iteration: int
    """Iteration whose measurements confirmed it."""
    delay_before_ms: float = 0.0
    """Link: one-way delay of the worst direction; stage: compute time of a microbatch."""
    delay_after_ms: float = 0.0
    """The same now."""
    action: str
    """What was done about it, such as `replan v3 from iteration 24` or `none: the plan in use is still the best`."""
    predicted_iteration_ms_before: float | None = None
    """Predicted iteration time if nothing were done."""
    predicted_iteration_ms_after: float | None = None
    """Predicted iteration time with the action."""
    predicted_gain: float | None = None
    """Ratio of the two."""
    plan_version: int
    """Plan in use once the action is done."""
    rail: str | None = None
    """`rdma0`, `tcp1`: the rail of `link` that was lost or works again."""
    part: str | None = None
    """`exact solver`: the part of Adaptra that fails on `ranks`, without harm to training, or works again."""

    @classmethod
    def of_finding(
        cls,
        finding: Finding,
        ranks: Sequence[int],
        hosts: Mapping[int, str],
        before_ms: float | None = None,
        after_ms: float | None = None,
        **common: Any,
    ) -> StragglerEvent:
        """A link or stage turned slow, changed its level, or healed.

        Args:
            ranks: world ranks of the finding's positions.
            hosts: host name of every rank.
            before_ms, after_ms: predicted iteration time (ms) without and with the action.
            common: `action` and `plan_version`.
        """
        changed = {name: getattr(finding, name) for name in ("kind", "state", "replica", "pp_ranks")}
        return cls(
            **changed,
            link=finding.name if finding.kind == "link" else None,
            ranks=tuple(ranks),
            hosts=tuple(hosts[rank] for rank in ranks),
            since_iteration=finding.since_iteration,
            found_iteration=finding.found_iteration,
            delay_before_ms=finding.before_ms,
            delay_after_ms=finding.after_ms,
            predicted_iteration_ms_before=before_ms,
            predicted_iteration_ms_after=after_ms,
            predicted_gain=before_ms / after_ms if before_ms is not None and after_ms else None,
            **common,
        )

    @classmethod
    def of_rail(cls, rail: str, state: Change, ends: Sequence[tuple[int, int, str]], **common: Any) -> StragglerEvent:
        """A rail of a link is given up for a while, or used again.

        Args:
            ends: (position, world rank, host) of both.
            common: `replica`, `iteration`, `action`, `plan_version`.
        """
        pp_ranks, ranks, hosts = zip(*ends, strict=True)
        link = "-".join(map(str, pp_ranks))
        return cls._now("rail", state, pp_ranks=pp_ranks, ranks=ranks, hosts=hosts, link=link, rail=rail, **common)

    @classmethod
    def of_peer(cls, pp_rank: int, rank: int, host: str, **common: Any) -> StragglerEvent:
        """The rank at a position is lost. `common`: as for a rail."""
        return cls._now("peer", "lost", pp_ranks=(pp_rank,), ranks=(rank,), hosts=(host,), **common)

    @classmethod
    def of_part(cls, part: str, state: Change, rank: int, host: str, **common: Any) -> StragglerEvent:
        """A part of Adaptra on a rank fails, or works again. `common`: as for a rail, without `replica`."""
        return cls._now("part", state, replica=0, ranks=(rank,), hosts=(host,), part=part, **common)

    @classmethod
    def _now(cls, kind: Kind, state: Change, *, iteration: int, **fields: Any) -> StragglerEvent:
        return cls(kind=kind, state=state, since_iteration=iteration, found_iteration=iteration, **fields)

    @classmethod
    def from_json(cls, data: Any) -> StragglerEvent:
        """The event behind the fields that another rank has sent.

        Raises:
            ValueError: they are not those of an event that can be reported.
        """
        if not isinstance(data, Mapping) or set(data) != {field.name for field in fields(cls)}:
            raise ValueError(f"no event: {data!r:.200} has not the fields of one")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        event = cls(**values)
        try:
            event.sentence()  # what cannot be put into words has a field of another kind than it should
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"no event: {error}") from None
        return event

    @property
    def subject(self) -> str:
        """Short name: `link 2-3`, `stage 2`, `peer rank 3`, `rail rdma0 of link 2-3`, `exact solver`."""
        if self.kind == "part":
            return str(self.part)
        if self.kind == "rail":
            return f"rail {self.rail} of link {self.link}"
        if self.kind == "link":
            return f"link {self.link}"
        if self.kind == "stage":
            return f"stage {', '.join(map(str, self.pp_ranks))}"
        return f"peer {_ranks(self.ranks, ())}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; tuples as lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def sentence(self) -> str:
        """One line for a log or an alert."""
        where = _ranks(self.ranks, self.hosts)
        who = where if self.kind == "peer" and where else f"{self.subject} ({where})" if where else self.subject
        if self.replica:
            who = f"replica {self.replica}: {who}"
        verb = "healed in" if self.state == "healed" else f"is {self.state} since"
        parts = [f"{who} {verb} iteration {self.since_iteration}"]
        if self.kind in ("link", "stage"):
            what = "delay" if self.kind == "link" else "compute"
            parts[0] += f": {what} {_ms(self.delay_before_ms)} -> {_ms(self.delay_after_ms)} ms"
        if self.action:
            parts.append(self.action)
        before, after = self.predicted_iteration_ms_before, self.predicted_iteration_ms_after
        if before is not None and after is not None:
            gain = f" ({self.predicted_gain:.3g}x)" if self.predicted_gain is not None else ""
            same = abs(before - after) < 0.005 * max(before, after)
            instead = "" if same else f" instead of {_ms(before)} ms"
            parts.append(f"predicted {_ms(after)} ms{instead} an iteration{'' if same else gain}")
        return "; ".join(parts)


def _ranks(ranks: tuple[int, ...], hosts: tuple[str, ...]) -> str:
    named = [f"rank {rank}" + (f" on {hosts[i]}" if i < len(hosts) else "") for i, rank in enumerate(ranks)]
    return " <-> ".join(named)


def _ms(value: float) -> str:
    """Milliseconds as a person writes them: 0.04, 0.4, 30.5, 812."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
