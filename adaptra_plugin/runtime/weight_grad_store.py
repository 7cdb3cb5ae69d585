"""Weight gradients that wait for their W.

Zero-bubble schedules (Qi et al., ICLR'24; used by the method's sec. 4.3) need the gradient with respect to a stage's
input (I) before, and apart from, the gradients with respect to its weights (W). While I runs, layers leave here what
W needs; W accumulates through the AccumulateGrad nodes of the parameters, so that every hook on them (data parallelism,
ZeRO, BF16 optimizer) fires exactly as in a fused backward, once per microbatch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from adaptra_plugin.errors import UnsupportedError

Product = Callable[[Tensor, Tensor], Tensor | None]
"""Of a weight, from the layer's input x and the gradient of its output y. None: it has been accumulated already; hooks find no
gradient then."""


def linear_gradient(x: Tensor, grad_y: Tensor) -> Tensor:
    """`grad_y^T x`, of shape (outputs, inputs), for two-dimensional arguments."""
    return grad_y.t().mm(x)


class Use(Protocol):
    """What W needs for one use of one weight."""

    @property
    def watched(self) -> Sequence[Tensor]:
        """Tensors that must not be changed in place before W has run."""

    def gradient(self) -> Tensor | None:
        """None: it has been accumulated already; hooks find no gradient then."""


@dataclass(frozen=True, slots=True, eq=False)
class GraphRest:
    """A use of a weight whose W is what autograd would do: the rest of the layer's own graph, from its output to the weight.

    Attributes:
        output: where the gradient of the layer's output enters the graph.
        grad_y: that gradient.
        weight: where the graph leaves towards the parameter: no hook of the parameter fires there.
        held: what the graph has saved; given back after W.
    """

    output: GradientEdge
    grad_y: Tensor
    weight: GradientEdge
    held: list[Tensor]

    @property
    def watched(self) -> Sequence[Tensor]:
        return (*self.held, self.grad_y)

    def gradient(self) -> Tensor:
        (gradient,) = torch.autograd.grad(self.output, self.weight, self.grad_y, retain_graph=True)
        return gradient


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """A use of a weight whose gradient is computed by a function, without autograd."""

    x: Tensor
    grad_y: Tensor
    product: Product

    @property
    def watched(self) -> Sequence[Tensor]:
        return (self.x, self.grad_y)

    def gradient(self) -> Tensor | None:
        with torch.no_grad():
            return self.product(self.x, self.grad_y)


@dataclass(frozen=True, slots=True, eq=False)
class _Deferred:
    """One use of one weight in one microbatch."""

    weight: nn.Parameter
    use: Use
    task: int
    """The call of autograd in which it came up: one for each `backward()`, nested ones included."""
    versions: tuple[int, ...]
    """Of the tensors that W needs: how often they had been changed in place when I ran."""


class WeightGradStore:
    """Weight gradients of one rank's stages that wait for their W.

    A microbatch (with several model chunks: one of a chunk) is opened by `collect` while its I runs and emptied by `run`. Not
    thread-safe: backward passes of one rank run one after the other.
    """

    def __init__(self) -> None:
        self._collecting: list[_Deferred] | None = None
        self._waiting: dict[Hashable, list[_Deferred]] = {}

    @property
    def microbatches(self) -> tuple[Hashable, ...]:
        """Microbatches whose W has not run."""
        return tuple(self._waiting)

    @property
    def collecting(self) -> bool:
        """True while an I runs."""
        return self._collecting is not None

    @contextmanager
    def collect(self, microbatch: Hashable) -> Iterator[None]:
        """Backward passes inside leave the weight gradients of `microbatch` for `run`."""
        if microbatch in self._waiting:
            raise RuntimeError(f"microbatch {microbatch} already waits for its weight gradients")
        self._collecting = []
        try:
            yield
            self._waiting[microbatch] = self._collecting
        finally:
            self._collecting = None

    def defer(self, weight: nn.Parameter, use: Use) -> None:
        """Caller: the backward of a layer, inside `collect`.

        Raises:
            UnsupportedError: not inside `collect`, so that no W would ever follow.
        """
        if self._collecting is None:
            raise UnsupportedError(
                "the model differentiates inside its own forward or loss (torch.autograd.grad, a gradient penalty), which it "
                "did not do for this layer in the first iterations: its backward was to be split and cannot be; "
                'set "adaptra": {"split_backward": false}'
            )
        self._collecting.append(_Deferred(weight, use, torch._C._current_graph_task_id(), _versions(use)))

    def run(self, microbatch: Hashable) -> None:
        """Computes and accumulates the weight gradients of `microbatch` (action W).

        Raises:
            UnsupportedError: what they need has been changed in place since their I.
        """
        _run(self._waiting.pop(microbatch))

    def flush(self, weight: nn.Parameter) -> None:
        """Accumulates what earlier microbatches have left of a weight: its gradient in the present one has not been left, and
        accumulates next. Caller: a hook, inside `collect`."""
        collecting, self._collecting = self._collecting, None
        try:
            for microbatch, deferred in self._waiting.items():
                due = [item for item in deferred if item.weight is weight]
                if due:
                    self._waiting[microbatch] = [item for item in deferred if item.weight is not weight]
                    _run(due)
        finally:
            self._collecting = collecting

    def claim(self, weight: nn.Parameter) -> Tensor | None:
        """The sum of what the present call of autograd has left of a weight so far, which is not deferred any more; None: nothing."""
        assert self._collecting is not None
        task = torch._C._current_graph_task_id()
        due = [item for item in self._collecting if item.weight is weight and item.task == task]
        self._collecting = [item for item in self._collecting if item not in due] if due else self._collecting
        parts = [gradient for item in due if (gradient := item.use.gradient()) is not None]
        return functools.reduce(torch.add, parts) if parts else None

    def clear(self) -> None:
        """Forgets everything that waits (after a failed iteration)."""
        self._waiting.clear()
        self._collecting = None


def _versions(use: Use) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in use.watched)


def _run(deferred: Sequence[_Deferred]) -> None:
    if any(item.versions != _versions(item.use) for item in deferred):
        raise UnsupportedError(
            "the input of a linear layer, its weight or the gradient of its output has been changed in place between the backward of "
            'a microbatch and its weight gradients: set "adaptra": {"split_backward": false}'
        )
    for items in _rounds(deferred):
        _accumulate(items)
    for item in deferred:
        if isinstance(item.use, GraphRest):
            item.use.held.clear()


class _Nothing(torch.autograd.Function):
    """Hands no gradient on: what the backward of a layer does that has accumulated by itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def _rounds(items: Sequence[_Deferred]) -> list[list[_Deferred]]:
    """Items whose weights accumulate together, in the order of autograd.

    A weight used several times in one call of autograd is accumulated once, with the sum of its uses, when the backward of the
    last of them has run; several calls accumulate one by one. So a round has at most one call of each weight.
    """
    calls: dict[int, list[int]] = {}
    for item in items:
        mine = calls.setdefault(id(item.weight), [])
        if item.task in mine:
            mine.remove(item.task)
        mine.append(item.task)
    rounds: list[list[_Deferred]] = []
    for item in items:
        number = calls[id(item.weight)].index(item.task)
        while len(rounds) <= number:
            rounds.append([])
        rounds[number].append(item)
    return rounds


def _accumulate(items: Sequence[_Deferred]) -> None:
    """One call of autograd for all weights, each of which has one call of its own among the items."""
    uses: dict[int, list[_Deferred]] = {}
    for item in items:
        uses.setdefault(id(item.weight), []).append(item)
    roots: list[Any] = []
    gradients: list[Tensor] = []
    for first, *others in uses.values():
        if isinstance(first.use, GraphRest) and not others:
            roots.append(first.use.output)
            gradients.append(first.use.grad_y)
            continue
        # summed in the order in which autograd would have met the uses, before they are accumulated: for the same bits
        total = first.use.gradient()
        for item in others:
            gradient = item.use.gradient()
            total = None if total is None or gradient is None else total + gradient
        with torch.enable_grad():
            roots.append(_Nothing.apply(first.weight) if total is None else first.weight.expand_as(first.weight))
        gradients.append(torch.zeros_like(roots[-1]) if total is None else total)
    if roots:
        # retained: two outputs of a stage may have been differentiated one by one through the same layer
        weights = [first.weight for (first, *_) in uses.values()]
        torch.autograd.backward(roots, gradients, retain_graph=True, inputs=weights)
