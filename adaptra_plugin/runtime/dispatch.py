"""What a rank runs next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.actions import Action, Kind

_MAKES = {
    Kind.FORWARD: "F",
    Kind.BACKWARD_INPUT: "I",
    Kind.BACKWARD_WEIGHT: "W",
    Kind.FULL_BACKWARD: "IW",
}
"""On a stage, each of these is made in the order of the microbatches: so results stay those of the stock schedule, to the bit."""
_ENDS = ((Kind.BACKWARD_INPUT, Kind.FULL_BACKWARD), (Kind.BACKWARD_WEIGHT, Kind.FULL_BACKWARD))
"""What a forward takes until then: a slot of the host, and its activations."""


class DispatchPolicy(Protocol):
    """Chooses what a rank runs next."""

    def next(self, ready: Sequence[Action]) -> Action:
        """One of the actions that can run now, of which there is at least one, in the order of the plan.

        The first one is the plan's own next action, whether its input is there or not: running it may mean to wait. The
        others have all they need. They are found when somebody looks beyond the first one.
        """
        ...


class InOrder:
    """The plan's order."""

    def next(self, ready: Sequence[Action]) -> Action:
        return ready[0]


IN_ORDER = InOrder()


class _Ready(Sequence[Action]):
    """The actions that can run now. The plan's own next one costs nothing to ask for."""

    def __init__(self, actions: Sequence[Action], arrived: Callable[[Action], bool]) -> None:
        self._actions = actions
        self._arrived = arrived
        self.left = deque(actions)

    def __iter__(self) -> Iterator[Action]:
        yield self.left[0]
        forwards = _count(self.left, (Kind.FORWARD,))
        held = [_count(self.left, ends) - forwards for ends in _ENDS]  # by forwards that have run
        most = [_peak(self._actions, ends) for ends in _ENDS]
        before: set[tuple[int, str | int]] = set()  # what comes first: a microbatch of a stage, or one more of a kind
        highest = list(held)
        for action in self.left:
            makes = {(action.stage, part) for part in (action.microbatch, *_MAKES[action.kind])}
            forward = action.kind is Kind.FORWARD
            # in the plan's order from here on, with this action moved to the front, no more may be held than the plan holds
            room = not forward or all(h < m for h, m in zip(highest, most, strict=True))
            if action is not self.left[0] and room and before.isdisjoint(makes) and self._arrived(action):
                yield action
            before |= makes
            held = [h + forward - (action.kind in ends) for h, ends in zip(held, _ENDS, strict=True)]
            highest = [max(pair) for pair in zip(highest, held, strict=True)]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return self.left[0] if index == 0 else list(self)[index]


def dispatch(
    actions: Sequence[Action], arrived: Callable[[Action], bool], policy: DispatchPolicy = IN_ORDER
) -> Iterator[Action]:
    """The actions of a rank, one by one. A generator: the caller asks for the next one when it has finished the last one.

    Args:
        actions: in the order of the plan.
        arrived: whether what an action takes from a neighbour, if anything, is there.
        policy: chooses.

    Raises:
        PlanError: the policy has chosen an action that cannot run now.
    """
    ready = _Ready(actions, arrived)
    left, choose = ready.left, policy.next
    while left:
        action = choose(ready)
        if action is left[0]:
            left.popleft()
        elif action in ready:
            left.remove(action)
        else:
            raise PlanError(f"{action} cannot run now: {', '.join(map(str, ready))} can")
        yield action


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
    if all(action.kind is Kind.FORWARD for action in actions):
        return 2  # nothing is kept: the next microbatch may be loaded before the last one is sent
    return max(1, _peak(actions, _ENDS[0]))


def _peak(actions: Sequence[Action], ends: Collection[Kind]) -> int:
    """The largest number of forwards that have run without their end."""
    taken = (1 if action.kind is Kind.FORWARD else -(action.kind in ends) for action in actions)
    return max(accumulate(taken), default=0)


def _count(actions: Iterable[Action], kinds: Collection[Kind]) -> int:
    return sum(action.kind in kinds for action in actions)
