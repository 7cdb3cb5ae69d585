"""Which weights may have their gradients computed apart from the rest of the backward.

A weight may if all of its gradient comes from calls that can be split, and if these are differentiated by the schedule's
backward only. Both are observed in the iteration in which a weight is used for the first time: it runs as in stock, with hooks
that look on. What autograd hands to the parameter has to be what those calls have given.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adaptra_plugin.runtime.weight_grad_store import WeightGradStore

logger = logging.getLogger("adaptra.runtime")

STEPS = 16
"""Nodes of a call's graph that are looked at to find the one that uses the weight; it is the third at most in torch's own layers."""


class State(Enum):
    OBSERVED = "observed"
    SPLIT = "split"
    FUSED = "fused"


class _Weight:
    """What is known of one weight."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        # by its owner: `torch.utils.swap_tensors` (`Module.to`, `load_state_dict`) takes no parameter that has a weak reference
        self._owner, self._name = weakref.ref(owner), name
        self.state = State.OBSERVED
        self.used = False
        self.otherwise = False  # something else than the observed calls takes part in its gradient
        self.given: dict[int, list[Tensor | None]] = {}  # by observed calls, in each call of autograd
        self.hook: Any = None

    def weight(self) -> nn.Parameter | None:
        owner = self._owner()
        return None if owner is None else owner._parameters.get(self._name)


class Census:
    """The weights of a rank's part of the model, and what may be done with them. Does not keep the model alive.

    Args:
        modules: of the model, parents and children.
        queue: knows whether a backward pass is the schedule's.
    """

    def __init__(self, modules: Iterable[nn.Module], queue: WeightGradStore) -> None:
        self._queue = queue
        self._weights: dict[int, _Weight] = {}
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and not is_lazy(parameter) and parameter.numel():
                    self._weights.setdefault(id(parameter), _Weight(module, name))

    def state(self, weight: Any) -> State | None:
        """Of a weight in a forward that records; None: not one of the model, or frozen."""
        known = self._weights.get(id(weight))
        if known is None or not weight.requires_grad:
            return None
        return known.state if known.weight() is weight else None

    def observe(self, weight: nn.Parameter, x: Tensor, y: Tensor) -> None:
        """A forward has just computed y from x and the weight, as in stock."""
        known = self._weights[id(weight)]
        found = _user_of(weight, x, y)
        if found is None or y.grad_fn is None:
            known.otherwise = True
            return
        if known.hook is None:
            known.hook = weight.register_hook(lambda total: self._hand_over(known, total))
        node, index = found
        y.grad_fn.register_prehook(lambda grads: self._enter(known))
        node.register_hook(lambda grads, _: self._give(known, grads[index]))

    def finalize(self) -> bool:
        """Ends what has been observed, between two iterations: a microbatch must not run split in its forward and fused in the
        recomputation of an activation checkpoint. Whether anything is known now that was not."""
        lost = won = 0
        for known in self._weights.values():
            known.given.clear()
            weight = known.weight()
            if weight is None or known.state is State.FUSED:
                continue
            if known.otherwise:
                lost += 1
                known.state = State.FUSED
                self._unregister(known)
            elif known.used and known.state is State.OBSERVED:
                won += 1
                known.state = State.SPLIT
                self._unregister(known)
                known.hook = _first_hook(weight, lambda grad, known=known: self._accumulates(known, grad))
        if lost:
            logger.warning(
                "%d weights are used by a linear layer and elsewhere in the same stage, or differentiated inside its forward: "
                "their backward is not split",
                lost,
            )
        return bool(lost or won)

    def close(self) -> None:
        """Removes every hook."""
        for known in self._weights.values():
            self._unregister(known)
        self._weights.clear()

    # --- what hooks see

    def _enter(self, known: _Weight) -> None:
        """The backward of an observed call begins."""
        if not self._queue.collecting:
            known.otherwise = True  # differentiated inside the forward

    def _give(self, known: _Weight, gradient: Tensor | None) -> None:
        """An observed call has computed its part of the gradient; None: it has accumulated it by itself."""
        known.used = True
        known.given.setdefault(torch._C._current_graph_task_id(), []).append(gradient)

    def _hand_over(self, known: _Weight, total: Tensor | None) -> None:
        """Autograd is about to accumulate."""
        given = known.given.pop(torch._C._current_graph_task_id(), [])
        if not (self._queue.collecting and _is_sum(total, given)):
            known.otherwise = True

    def _accumulates(self, known: _Weight, gradient: Tensor) -> Tensor | None:
        """A weight that is split is about to be accumulated to; in I that is another use's doing, or a call's that could not be
        split this once. Microbatches keep their order, and what this one has left already belongs to the same sum."""
        weight = known.weight()
        if not self._queue.collecting or weight is None:
            return None
        known.otherwise = True
        self._queue.flush(weight)
        left = self._queue.claim(weight)
        return None if left is None else left + gradient

    @staticmethod
    def _unregister(known: _Weight) -> None:
        if known.hook is not None:
            known.hook.remove()
            known.hook = None


def _user_of(weight: nn.Parameter, x: Tensor, y: Tensor) -> tuple[Any, int] | None:
    """The node of y's graph that computes the weight's gradient, and which of its gradients that is. What has made x is not
    searched."""
    queue, seen = [y.grad_fn], 0
    while queue and seen < STEPS:
        node = queue.pop(0)
        if node is None or node is x.grad_fn:
            continue
        seen += 1
        for index, (following, _) in enumerate(node.next_functions):
            if getattr(following, "variable", None) is weight:
                return node, index
            queue.append(following)
    return None


def _first_hook(weight: nn.Parameter, hook: Any) -> Any:
    """Registers a hook that runs before those of the user."""
    handle = weight.register_hook(hook)
    hooks: Any = weight._backward_hooks
    in_order = sorted(hooks.items(), key=lambda entry: entry[0] != handle.id)
    hooks.clear()  # the same dictionary, as autograd holds it, filled anew: autograd goes by the order of insertion
    hooks.update(in_order)
    return handle


def _is_sum(total: Tensor | None, given: list[Tensor | None]) -> bool:
    """Whether nothing else has been added. Autograd hands a single gradient on as it is, and makes a new tensor for a sum, as the
    parts are still held here."""
    parts = [gradient for gradient in given if gradient is not None]
    if total is None or len(parts) < len(given) or not parts:
        return total is None and bool(given) and not parts
    added: Tensor = functools.reduce(torch.add, parts)
    if added.layout != torch.strided or total.layout != torch.strided:
        return False
    if len(parts) == 1:
        return added.data_ptr() == total.data_ptr()
    return torch.equal(added, total) or bool(torch.all((added == total) | (added.isnan() & total.isnan())))
