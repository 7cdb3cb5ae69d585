"""What of a job can be known to be wrong before anything starts: whether its configuration fits the number of its stages."""

from __future__ import annotations

from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.errors import ConfigError
from adaptra_plugin.runtime.switching import PlanBook
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.profile import Profile, StageProfile

THREAD_RANKS = 32
"""Up to so many ranks, their reports cost rank 0's interpreter less than a process of its own is worth."""


def limits_of(config: AdaptraConfig, stages: int) -> list[int | None]:
    """The activation limit of each stage.

    Raises:
        ConfigError: there are more or fewer than stages.
    """
    limits = config.max_activations
    if limits is None or isinstance(limits, int):
        return [limits] * stages
    if len(limits) != stages:
        raise ConfigError(f"adaptra.max_activations has {len(limits)} entries for {stages} stages: give one per stage")
    return list(limits)


def check_links(config: AdaptraConfig, topology: Topology) -> None:
    """Raises ConfigError for injected links that are none."""
    for name, links in (("links", config.simulate.links), ("faults", config.simulate.faults)):
        for link in links:
            if not topology.has_link(link.src, link.dst):
                raise ConfigError(
                    f"adaptra.simulate.{name}: {link.src}-{link.dst} is not a link between neighbours of {topology.length} stages"
                )


def first_book(config: AdaptraConfig, topology: Topology, microbatches: int) -> PlanBook:
    """Plans for times that nobody has measured yet.

    Raises:
        PlanError: the limits cannot be kept with so many microbatches.
    """
    stages = tuple(StageProfile(1.0, 1.0, 1.0, limit) for limit in limits_of(config, topology.stages))
    unknown = Profile(microbatches=1, stages=stages, virtual_stages=topology.chunks)
    book = PlanBook(unknown, config.schedule, config.transport.deadline_s)
    book.plan_for(microbatches)
    return book


def has_own_process(config: AdaptraConfig, topology: Topology) -> bool:
    """Whether the coordinator runs in a process of its own."""
    return config.coordinator == "process" or (config.coordinator == "auto" and topology.world_size > THREAD_RANKS)
