"""What a rank runs next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from adaptra_plugin.schedule.actions import Action, Kind


def in_order(actions: Sequence[Action]) -> Iterator[Action]:
    """The plan's order. A generator: the caller asks for the next action when it has finished the last one."""
    yield from actions


def forward_only(stages: Sequence[int], microbatches: int, ranks: int) -> tuple[Action, ...]:
    """The actions of an evaluation on a rank with these stages.

    With several of them, `ranks` microbatches go through the first one, then through the next one, and so on: by then the first of
    them is back from the other ranks.
    """
    group = microbatches if len(stages) == 1 else ranks
    return tuple(
        Action(stage, Kind.FORWARD, microbatch)
        for first in range(0, microbatches, group)
        for stage in stages
        for microbatch in range(first, min(first + group, microbatches))
    )


def buffers_needed(actions: Sequence[Action]) -> int:
    """Slots a host needs so that slot `microbatch % slots` is free when its forward starts.

    A slot is taken from F until I or B has ended; microbatches run in order, so the largest number of taken slots suffices.
    """
    taken = most = 0
    if all(action.kind is Kind.FORWARD for action in actions):
        return 2  # nothing is kept: the next microbatch may be loaded before the last one is sent
    for action in actions:
        if action.kind is Kind.FORWARD:
            taken += 1
            most = max(most, taken)
        elif action.kind in (Kind.BACKWARD_INPUT, Kind.FULL_BACKWARD):
            taken -= 1
    return max(1, most)
