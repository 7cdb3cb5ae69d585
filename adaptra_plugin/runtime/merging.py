"""One profile for all replicas of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """One profile for all replicas: the slowest of each stage and link.

    Replicas wait for each other at the end of an iteration, and a plan made for a slower link costs a fast replica only memory.
    """
    first = profiles[0]
    stages = tuple(
        StageProfile(
            max(s.forward_ms for s in same),
            max(s.backward_input_ms for s in same),
            max(s.backward_weight_ms for s in same),
            same[0].max_activations,
        )
        for same in zip(*(p.stages for p in profiles), strict=True)
    )
    links = tuple(
        LinkProfile(
            link.src,
            link.dst,
            max(p.link(link.src, link.dst).latency_ms for p in profiles),
            max(p.link(link.src, link.dst).transfer_ms for p in profiles),
        )
        for link in first.links
    )
    return replace(first, stages=stages, links=links)
