"""Schedules: a tuple of actions per rank, immutable and validated. A schedule that exists can be run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.actions import CODE, Action, intern
from adaptra_plugin.schedule.compiled import no_collection
from adaptra_plugin.schedule.rules import keeps_rules

F, I, W, B = range(4)  # noqa: E741  codes of the kinds, see actions.KINDS


@dataclass(frozen=True, eq=False)
class Schedule:
    """Per rank, the actions it runs, in order.

    What is made from numbers (``from_rows``, ``from_table``) has `ranks` only once somebody asks for them: hundreds of thousands
    of objects, of which a rank that runs a plan needs its own.

    Rules, checked on construction; PlanError says which rank, which step and which rule:
    every stage lives on one rank; every microbatch has on every stage one F and either one B or one I and one W;
    I (or B) after F and W after I; each kind in order of microbatches on every stage; no deadlock.
    """

    ranks: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(tuple(actions) for actions in self.ranks))
        self._check()

    def __getattr__(self, name: str) -> tuple[tuple[Action, ...], ...]:
        """`ranks`, where they have not been asked for yet."""
        if name != "ranks" or "table" not in self.__dict__:
            raise AttributeError(name)
        found = tuple(map(self.of_rank, range(self.length)))
        self.__dict__["ranks"] = found
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return all(map(np.array_equal, self.table, other.table))

    def __hash__(self) -> int:
        return hash(self.table[1].tobytes())

    def of_rank(self, rank: int) -> tuple[Action, ...]:
        """What a rank runs, in order."""
        if "ranks" in self.__dict__:
            return self.ranks[rank]
        offsets, actions = self.table
        with no_collection():
            return tuple(intern(*row) for row in actions[offsets[rank] : offsets[rank + 1]].tolist())

    def _check(self) -> None:
        offsets, actions = self.table
        places = np.array(self.stage_rank, np.int64)
        if len(actions) and keeps_rules(offsets, actions, places, self.microbatches):
            return
        self._check_places()  # one of these says which rule is broken, and where
        self._check_order()
        self._check_progress()

    @classmethod
    def from_text(cls, ranks: Iterable[Iterable[str]]) -> Schedule:
        """From lists of printed actions, as in the PLAN format."""
        return cls(tuple(tuple(Action.parse(text) for text in actions) for actions in ranks))

    @classmethod
    def from_words(cls, words: Iterable[Sequence[int]]) -> Schedule:
        """From one word of kind codes (0 F, 1 I, 2 W, 3 B) per rank, one stage a rank, microbatches in order."""
        tables = [np.stack([np.full(len(w), s), w, occurrence(w)], axis=1) for s, w in enumerate(map(_codes, words))]
        return cls._from_tables(tables)

    @classmethod
    def from_rows(cls, rows: NDArray[np.int64], microbatches: int) -> Schedule:
        """From action numbers ``(stage * 3 + kind code) * microbatches + microbatch``, ``[rank, position]``."""
        group = rows // microbatches
        return cls._from_tables(list(np.stack([group // 3, group % 3, rows % microbatches], axis=2)))

    @classmethod
    def _from_tables(cls, tables: list[NDArray[np.int64]]) -> Schedule:
        return cls.from_table(np.concatenate([[0], np.cumsum([len(t) for t in tables])]), np.concatenate(tables))

    @classmethod
    def from_table(cls, offsets: NDArray[np.int64], actions: NDArray[np.int64]) -> Schedule:
        """From a ``table``, whose numbers are no larger than its length."""
        made = object.__new__(cls)
        made.__dict__["table"] = (offsets.astype(np.int64), actions.astype(np.int64))
        made._check()
        return made

    @property
    def split_only(self) -> bool:
        """Whether every backward is split into I and W."""
        return not (self.table[1][:, 1] == B).any()

    @property
    def rows(self) -> NDArray[np.int64]:
        """The inverse of ``from_rows``, for schedules with split backwards and equally many stages a rank."""
        actions = self.table[1]
        numbers = (actions[:, 0] * 3 + actions[:, 1]) * self.microbatches + actions[:, 2]
        return numbers.reshape(self.length, -1)

    def to_text(self) -> list[list[str]]:
        """Lists of printed actions, one per rank."""
        return [[str(action) for action in actions] for actions in self.ranks]

    def to_csv(self) -> str:
        """One line per rank, actions separated by commas: torch.distributed.pipelining's ``compute_only`` format."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(self.to_text())
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> Schedule:
        """Reads what ``to_csv`` wrote; empty cells are skipped. Raises PlanError for invalid schedules."""
        return cls.from_text([cell for cell in row if cell.strip()] for row in csv.reader(io.StringIO(text)) if row)

    # -- shape ---------------------------------------------------------------------------------------------------
    @cached_property
    def stage_rank(self) -> tuple[int, ...]:
        """The rank that holds each stage (-1: none does)."""
        offsets, actions = self.table
        places = np.full(int(actions[:, 0].max(initial=-1)) + 1, -1, np.int64)
        # backwards, so that the first rank that names a stage owns it
        places[actions[::-1, 0]] = np.repeat(np.arange(self.length), np.diff(offsets))[::-1]
        return tuple(places.tolist())

    @property
    def length(self) -> int:
        """Number of ranks."""
        return len(self.table[0]) - 1

    @property
    def stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.stage_rank)

    @cached_property
    def microbatches(self) -> int:
        """Number of microbatches."""
        return 1 + int(self.table[1][:, 2].max(initial=-1))

    @cached_property
    def split_backward(self) -> bool:
        """Whether any backward is split into I and W."""
        return bool((self.table[1][:, 1] == I).any())

    @cached_property
    def warmup(self) -> tuple[int, ...]:
        """Forwards of each rank before its first backward."""
        return tuple(int(np.argmax(kinds != F)) for kinds in self._kinds)

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank, the most activations held at once (start of F to end of W or B, over all its stages)."""
        held = [np.cumsum((kinds == F).astype(np.int64) - (kinds >= W)) for kinds in self._kinds]
        return tuple(int(levels.max()) for levels in held)

    @property
    def _kinds(self) -> list[NDArray[np.int64]]:
        offsets, actions = self.table
        return np.split(actions[:, 1], offsets[1:-1])

    @cached_property
    def table(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Offsets per rank ``[ranks + 1]`` and actions ``[actions, 3]`` (stage, kind code, microbatch), for kernels."""
        offsets = np.zeros(len(self.ranks) + 1, np.int64)
        offsets[1:] = np.cumsum([len(actions) for actions in self.ranks])
        rows = [(a.stage, CODE[a.kind], a.microbatch) for actions in self.ranks for a in actions]
        # tables have an entry a stage: one mistyped number must not decide how large they are
        if any(stage >= len(rows) or microbatch >= len(rows) for stage, _, microbatch in rows):
            self._check_numbers(len(rows))
        return offsets, np.array(rows, np.int64).reshape(-1, 3)

    def grid(self, mark: dict[int, int] | None = None, most: int = 40) -> str:
        """The rank-by-step grid as text; ``mark[rank]`` is a step to point at. Long ranks show the steps around it."""
        lines = []
        for rank, actions in enumerate(self.ranks):
            at = None if mark is None else mark.get(rank)
            first = 0 if at is None else max(0, at - most // 2)
            cells = [f">{a}<" if n == at else str(a) for n, a in enumerate(actions) if first <= n < first + most]
            if at is not None and at >= len(actions):
                cells.append(">end<")
            head = f"rank {rank}" + (f" from step {first}" if first else "")
            lines.append(f"{head}: {' '.join(cells)}{' ...' if first + most < len(actions) else ''}")
        return "\n".join(lines)

    # -- rules ---------------------------------------------------------------------------------------------------
    def _fail(self, rank: int, step: int, rule: str) -> None:
        action = self.ranks[rank][step] if step < len(self.ranks[rank]) else "end"
        raise PlanError(f"rank {rank}, step {step} ({action}): {rule}\n{self.grid({rank: step})}")

    def _check_numbers(self, count: int) -> None:
        for rank, actions in enumerate(self.ranks):
            for step, action in enumerate(actions):
                for name, number in (("stage", action.stage), ("microbatch", action.microbatch)):
                    if number >= count:
                        self._fail(
                            rank,
                            step,
                            f"{name} {number} in a schedule of {count} actions: each needs actions of its own",
                        )

    def _check_places(self) -> None:
        if not any(self.ranks):
            raise PlanError("the schedule has no actions")
        for rank, actions in enumerate(self.ranks):
            if not actions:
                raise PlanError(f"rank {rank} has no actions: every rank holds at least one stage")
            for step, action in enumerate(actions):
                owner = self.stage_rank[action.stage]
                if owner != rank:
                    self._fail(rank, step, f"stage {action.stage} already lives on rank {owner}")
        if -1 in self.stage_rank:
            raise PlanError(f"stage {self.stage_rank.index(-1)} of {self.stages} lives on no rank\n{self.grid()}")

    def _check_order(self) -> None:
        for rank, actions in enumerate(self.ranks):
            done = {stage: [0, 0, 0] for stage, owner in enumerate(self.stage_rank) if owner == rank}
            for step, action in enumerate(actions):
                code, count = CODE[action.kind], done[action.stage]
                after = "F" if code in (I, B) else "I"
                name = "backward" if code in (I, B) else f"{action.kind}"
                slot = I if code == B else code
                if action.microbatch != count[slot]:
                    again = action.microbatch < count[slot]
                    self._fail(
                        rank,
                        step,
                        f"{name} of microbatch {action.microbatch} on stage {action.stage} "
                        + ("is there twice" if again else f"is out of order: microbatch {count[slot]} is next"),
                    )
                if code != F and action.microbatch >= count[slot - 1]:
                    self._fail(rank, step, f"{name} before {after} of the same microbatch")
                if code == B and count[W] != count[I]:
                    self._fail(rank, step, f"a fused backward while W of microbatch {count[W]} is outstanding")
                count[slot] += 1
                if code == B:
                    count[W] += 1
            for stage, count in done.items():
                for name, number in zip(("F", "backward", "W"), count, strict=True):
                    if number != self.microbatches:
                        self._fail(
                            rank,
                            len(actions),
                            f"{name} of microbatch {number} on stage {stage} is missing: every microbatch of "
                            f"{self.microbatches} needs F and B, or F, I and W",
                        )

    def _check_progress(self) -> None:
        last = self.stages - 1
        forward, backward = [0] * self.stages, [0] * self.stages
        at = [0] * len(self.ranks)
        ready = list(range(len(self.ranks)))
        while ready:
            rank = ready.pop()
            actions = self.ranks[rank]
            step = at[rank]
            woken = set()
            while step < len(actions):
                action = actions[step]
                stage, code = action.stage, CODE[action.kind]
                if code == F:
                    if stage and forward[stage - 1] <= action.microbatch:
                        break
                    forward[stage] += 1
                    if stage < last:
                        woken.add(self.stage_rank[stage + 1])
                elif code != W:
                    if stage < last and backward[stage + 1] <= action.microbatch:
                        break
                    backward[stage] += 1
                    if stage:
                        woken.add(self.stage_rank[stage - 1])
                step += 1
            at[rank] = step
            ready.extend(woken - {rank})
        stuck = {rank: step for rank, step in enumerate(at) if step < len(self.ranks[rank])}
        if stuck:
            rank, step = min(stuck.items(), key=lambda item: item[1])
            action = self.ranks[rank][step]
            needs = action.stage - 1 if CODE[action.kind] == F else action.stage + 1
            raise PlanError(
                f"deadlock: rank {rank}, step {step} ({action}) waits for stage {needs}, and every unfinished rank "
                f"waits like it\n{self.grid(stuck)}"
            )


def _codes(word: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(word, np.int64)


def occurrence(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each number has occurred before it: of kind codes, the microbatch."""
    narrow = numbers.astype(np.uint16) if numbers.max(initial=0) < 1 << 16 else numbers  # sorted five times as fast
    order = np.argsort(narrow, kind="stable")
    ordered = numbers[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
    out = np.empty(len(numbers), np.int64)
    out[order] = np.arange(len(numbers)) - np.repeat(first, np.diff(first, append=len(numbers)))
    return out
