"""Profiles that several tests of the planner use."""

from __future__ import annotations

from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile


def even(stages: int, microbatches: int, times=(1.0, 1.0, 1.0), links=(), cap=None, virtual=1) -> Profile:
    """Equal stages; ``links`` are (src, dst, latency) or (src, dst, latency, transfer)."""
    return Profile(
        microbatches,
        tuple(StageProfile(*times, cap) for _ in range(stages)),
        tuple(LinkProfile(*link) for link in links),
        virtual,
    )
