"""What the coordinator has to tell, as events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

from adaptra_plugin.detect import Finding
from adaptra_plugin.report import StragglerEvent
from adaptra_plugin.runtime.topology import Topology


def subject(finding: Finding) -> str:
    """`link 2-3 slow`, `stage 1 healed`."""
    return f"{finding.kind} {'-'.join(map(str, finding.stages))} {finding.state}"


def finding_event(
    finding: Finding,
    topology: Topology,
    hosts: Mapping[int, str],
    action: str,
    before_ms: float | None,
    after_ms: float | None,
    version: int,
) -> StragglerEvent:
    """What was found and what is done about it. `before_ms`, `after_ms`: predicted iteration without and with that."""
    ranks = tuple(topology.pipelines[finding.replica][stage] for stage in finding.stages)
    return StragglerEvent(
        time_unix=time.time(),
        kind=finding.kind,
        state=finding.state,
        replica=finding.replica,
        link="-".join(map(str, finding.stages)) if finding.kind == "link" else None,
        stages=finding.stages,
        ranks=ranks,
        hosts=tuple(hosts[rank] for rank in ranks),
        since_iteration=finding.since_iteration,
        found_iteration=finding.found_iteration,
        delay_before_ms=finding.before_ms,
        delay_after_ms=finding.after_ms,
        action=action,
        predicted_iteration_ms_before=before_ms,
        predicted_iteration_ms_after=after_ms,
        predicted_gain=before_ms / after_ms if before_ms is not None and after_ms else None,
        plan_version=version,
    )


def part_event(
    part: str,
    state: Literal["lost", "healed"],
    text: str,
    iteration: int,
    version: int,
    rank: int,
    hosts: Mapping[int, str],
) -> StragglerEvent:
    """A part of Adaptra on `rank` fails, or works again."""
    return StragglerEvent(
        time_unix=time.time(),
        kind="part",
        state=state,
        replica=0,
        link=None,
        stages=(),
        ranks=(rank,),
        hosts=(hosts[rank],),
        since_iteration=iteration,
        found_iteration=iteration,
        delay_before_ms=0.0,
        delay_after_ms=0.0,
        action=text,
        predicted_iteration_ms_before=None,
        predicted_iteration_ms_after=None,
        predicted_gain=None,
        plan_version=version,
        part=part,
    )
