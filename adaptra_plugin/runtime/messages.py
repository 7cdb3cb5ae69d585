"""Control messages between ranks, read and checked: what does not fit is refused with a sentence and does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptra_plugin.detect import IterationReport
from adaptra_plugin.errors import PlanError
from adaptra_plugin.runtime.plans import Proposal
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.transport import PeerInfo

AHEAD = 16
"""Iterations that a rank may be ahead of rank 0. Ranks wait for each other in every iteration, so more is garbage, which
would put off every new plan until then."""
_MOST = 1 << 53


def answer_from(message: Mapping[str, Any], begun: int) -> tuple[int, bool, int]:
    """(version, whether the rank takes part, newest iteration that has begun there) of an answer to a proposal.

    Args:
        begun: the newest iteration that has begun on this rank.

    Raises:
        ValueError: it is none.
    """
    return _integer(message, "version"), _truth(message, "ok"), _integer(message, "begun", -1, begun + AHEAD)


def verdict_from(message: Mapping[str, Any]) -> tuple[int, bool]:
    """(version, whether it is committed). Raises ValueError."""
    return _integer(message, "version"), _truth(message, "commit")


def version_from(message: Mapping[str, Any]) -> int:
    """Of a proposal that may be wrong otherwise, so that it can be answered. Raises ValueError."""
    return _integer(message, "version", 1)


def proposal_from(message: Mapping[str, Any], topology: Topology) -> Proposal:
    """A proposal that the job's pipelines can run.

    Raises:
        ValueError: a field is missing or wrong, or the plan is for other pipelines.
    """
    first = _integer(message, "first_iteration")
    profile, plan = Profile.from_json(message.get("profile")), Plan.from_json(message.get("plan"))
    here = (topology.length, topology.chunks)
    if (profile.ranks, profile.virtual_stages) != here or len(plan.schedule.ranks) != topology.length:
        raise PlanError(
            f"a plan for {len(plan.schedule.ranks)} ranks from a profile of {profile.ranks} with {profile.virtual_stages} "
            f"chunks: the pipelines have {topology.length} ranks with {topology.chunks}"
        )
    placed = tuple(stage % topology.length for stage in range(topology.stages))
    if plan.schedule.stage_rank != placed or plan.schedule.microbatches != profile.microbatches:
        raise PlanError(
            f"a plan of {plan.schedule.microbatches} microbatches with stages on ranks {plan.schedule.stage_rank}: "
            f"expected {profile.microbatches}, on {placed}"
        )
    return Proposal(version=version_from(message), profile=profile, plan=plan, first_iteration=first)


def loss_from(message: Mapping[str, Any], topology: Topology) -> tuple[PeerInfo, str]:
    """Which peer is lost, and why. Raises ValueError."""
    rank = _integer(message, "rank", 0, topology.world_size - 1)
    host, why = message.get("host"), message.get("why")
    if not isinstance(host, str) or not isinstance(why, str):
        raise ValueError(f"host and why: {host!r:.80} and {why!r:.80} are not texts")
    return PeerInfo(rank, topology.place(rank)[1], host), why


def report_from(message: Mapping[str, Any], sender: int, topology: Topology, begun: int) -> IterationReport:
    """The report of a rank that is about itself, its stages, and the links into it.

    Args:
        begun: the newest iteration that has begun on this rank.

    Raises:
        ValueError: it is none, or about something else.
    """
    report = IterationReport.from_json(message.get("report"))
    place = topology.place(sender)
    if (report.rank, report.replica, report.pp_rank) != (sender, *place):
        raise ValueError(
            f"it is about rank {report.rank}, replica {report.replica}, stage {report.pp_rank}; its sender is rank {sender}, "
            f"replica {place[0]}, stage {place[1]}"
        )
    if len(report.chunks) != topology.chunks:
        raise ValueError(f"{len(report.chunks)} model chunks: a rank has {topology.chunks}")
    known = topology.links()
    for link in report.links:
        if (min(link.src, link.dst), max(link.src, link.dst)) not in known:
            raise ValueError(f"{link.src} -> {link.dst} is no link between neighbours of {topology.length} stages")
    if len({link.src for link in report.links}) < len(report.links):
        raise ValueError("a link is listed twice")
    if report.iteration > begun + AHEAD:
        raise ValueError(f"iteration {report.iteration}: rank 0 is in iteration {begun}")
    return report


def _integer(message: Mapping[str, Any], name: str, least: int = 0, most: int = _MOST) -> int:
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: {value!r:.80} is not a whole number from {least} to {most}")
    return value


def _truth(message: Mapping[str, Any], name: str) -> bool:
    value = message.get(name)
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r:.80} is neither true nor false")
    return value
