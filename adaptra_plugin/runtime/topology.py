"""Which rank runs which stages of which pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from adaptra_plugin.detect import links_of
from adaptra_plugin.report.remote import COORDINATOR as COORDINATOR


@dataclass(frozen=True)
class Topology:
    """All pipelines of a job, and this rank's place.

    A rank has a *position* in its pipeline and runs the stages `position`, `position + length`, and so on, one for each of
    its model chunks; with one chunk the position is the stage. Data-parallel, tensor-parallel and context-parallel ranks
    each have a pipeline of their own: a *replica*.

    Attributes:
        rank: world rank of this process.
        pipelines: for each replica, the world rank at each position.
        chunks: model chunks (virtual stages) of each rank.
    """

    rank: int
    pipelines: tuple[tuple[int, ...], ...]
    chunks: int = 1

    def __post_init__(self) -> None:
        ranks = sorted(rank for pipeline in self.pipelines for rank in pipeline)
        if ranks != list(range(len(ranks))):
            raise ValueError(f"pipelines {self.pipelines} do not hold every rank from 0 to {len(ranks) - 1} once")
        if len({len(pipeline) for pipeline in self.pipelines}) != 1:
            raise ValueError(f"pipelines {self.pipelines} differ in their number of stages")
        if self.rank not in ranks:
            raise ValueError(f"rank {self.rank} is in none of the pipelines {self.pipelines}")
        if self.chunks < 1:
            raise ValueError(f"{self.chunks} model chunks: a rank has at least one")

    @classmethod
    def of(cls, rank: int, groups: Sequence[Sequence[int]], chunks: int = 1) -> Topology:
        return cls(rank, tuple(tuple(group) for group in groups), chunks)

    @property
    def world_size(self) -> int:
        return len(self.pipelines) * self.length

    @property
    def length(self) -> int:
        """Ranks of a pipeline."""
        return len(self.pipelines[0])

    @property
    def stages(self) -> int:
        """Stages of a pipeline, over all ranks and chunks."""
        return self.length * self.chunks

    @property
    def replica(self) -> int:
        return self.place(self.rank)[0]

    @property
    def position(self) -> int:
        return self.place(self.rank)[1]

    @property
    def own_stages(self) -> range:
        """The stages that this rank runs, one for each chunk."""
        return range(self.position, self.stages, self.length)

    def chunk(self, stage: int) -> int:
        """Which of its rank's chunks a stage is."""
        return stage // self.length

    def is_last(self, stage: int) -> bool:
        return stage == self.stages - 1

    def links(self) -> list[tuple[int, int]]:
        """(position, position) of the links between neighbours; with several chunks a pipeline is a ring."""
        return links_of(self.length, wraparound=self.chunks > 1)

    def has_link(self, a: int, b: int) -> bool:
        """Whether two positions are neighbours."""
        return (min(a, b), max(a, b)) in self._links

    @cached_property
    def _links(self) -> frozenset[tuple[int, int]]:
        return frozenset(self.links())

    def place(self, rank: int) -> tuple[int, int]:
        """(replica, position) of a rank."""
        try:
            return self._places[rank]
        except KeyError:
            raise ValueError(f"rank {rank} is in none of the pipelines {self.pipelines}") from None

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        return {
            rank: (replica, position)
            for replica, pipeline in enumerate(self.pipelines)
            for position, rank in enumerate(pipeline)
        }

    @property
    def previous(self) -> int | None:
        """Rank that runs the stages before this rank's."""
        return self._at(self.position - 1)

    @property
    def next(self) -> int | None:
        """Rank that runs the stages after this rank's."""
        return self._at(self.position + 1)

    def _at(self, position: int) -> int | None:
        if 0 <= position < self.length or (self.chunks > 1 and self.length > 1):
            return self.pipelines[self.replica][position % self.length]
        return None

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Each once: with two ranks of several chunks, both neighbours are the same one."""
        return tuple(dict.fromkeys(rank for rank in (self.previous, self.next) if rank is not None))
