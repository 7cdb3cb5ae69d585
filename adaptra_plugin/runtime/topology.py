"""Which rank runs which stage of which pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """All pipelines of a job, and this rank's place.

    Attributes:
        rank: world rank of this process.
        pipelines: for each pipeline (data-parallel replica), the world rank of each stage.
    """

    rank: int
    pipelines: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = sorted(rank for pipeline in self.pipelines for rank in pipeline)
        if ranks != list(range(len(ranks))):
            raise ValueError(f"pipelines {self.pipelines} do not hold every rank from 0 to {len(ranks) - 1} once")
        if len({len(pipeline) for pipeline in self.pipelines}) != 1:
            raise ValueError(f"pipelines {self.pipelines} differ in their number of stages")
        if self.rank not in ranks:
            raise ValueError(f"rank {self.rank} is in none of the pipelines {self.pipelines}")

    @classmethod
    def of(cls, rank: int, groups: Sequence[Sequence[int]]) -> Topology:
        return cls(rank, tuple(tuple(group) for group in groups))

    @property
    def world_size(self) -> int:
        return len(self.pipelines) * self.stages

    @property
    def stages(self) -> int:
        return len(self.pipelines[0])

    @property
    def replica(self) -> int:
        return self.place(self.rank)[0]

    @property
    def stage(self) -> int:
        return self.place(self.rank)[1]

    def place(self, rank: int) -> tuple[int, int]:
        """(replica, stage) of a rank."""
        for replica, pipeline in enumerate(self.pipelines):
            if rank in pipeline:
                return replica, pipeline.index(rank)
        raise ValueError(f"rank {rank} is in none of the pipelines {self.pipelines}")

    @property
    def previous(self) -> int | None:
        """Rank of the stage before this one."""
        return self.pipelines[self.replica][self.stage - 1] if self.stage > 0 else None

    @property
    def next(self) -> int | None:
        """Rank of the stage after this one."""
        return self.pipelines[self.replica][self.stage + 1] if self.stage < self.stages - 1 else None

    @property
    def neighbours(self) -> tuple[int, ...]:
        return tuple(rank for rank in (self.previous, self.next) if rank is not None)
