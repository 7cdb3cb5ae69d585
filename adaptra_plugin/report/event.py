"""What happened to a link, a stage or a peer, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class StragglerEvent:
    """One change that somebody should know about. Delays and iteration times are ms."""

    time_unix: float
    """Seconds since the epoch at which it was found."""
    kind: Literal["link", "stage", "peer", "rail", "part"]
    state: Literal["slow", "healed", "lost"]
    replica: int
    """Pipeline replica (data-parallel index)."""
    link: str | None
    """`2-3` for the link between stages 2 and 3."""
    stages: tuple[int, ...]
    """Pipeline stages concerned; `ranks` and `hosts` are in the same order."""
    ranks: tuple[int, ...]
    """World ranks of the stages."""
    hosts: tuple[str, ...]
    """Host names of the ranks."""
    since_iteration: int
    """First iteration in which it was so."""
    found_iteration: int
    """Iteration whose measurements confirmed it."""
    delay_before_ms: float
    """Link: one-way delay of the worst direction; stage: compute time of a microbatch."""
    delay_after_ms: float
    """The same now."""
    action: str
    """What was done about it, such as `replan v3 from iteration 24` or `none: the plan in use is still the best`."""
    predicted_iteration_ms_before: float | None
    """Predicted iteration time if nothing were done."""
    predicted_iteration_ms_after: float | None
    """Predicted iteration time with the action."""
    predicted_gain: float | None
    """Ratio of the two."""
    plan_version: int
    """Plan in use once the action is done."""
    rail: str | None = None
    """`rdma0`, `tcp1`: the rail of `link` that was lost or works again."""
    part: str | None = None
    """`exact solver`: the part of Adaptra that fails on `ranks`, without harm to training, or works again."""

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
            return f"stage {', '.join(map(str, self.stages))}"
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
