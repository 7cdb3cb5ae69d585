"""The backward pass of linear layers in two parts: input first, weights when there is time.

Zero-bubble schedules (Qi et al., ICLR'24; used by the method's sec. 4.3) need the gradient with respect to a stage's
input (I) before, and apart from, the gradients with respect to its weights (W). `split_linears` makes the linear layers of a
module able to run in two parts; a `WeightQueue` keeps what W needs. Everything else runs the fused backward in I.

W feeds each gradient through `torch.autograd.backward(p.expand_as(p), dw)`, so that every hook on the parameter's
AccumulateGrad node (data parallelism, ZeRO, BF16 optimizer) fires exactly as in a fused backward, once per microbatch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adaptra_plugin.errors import UnsupportedError

logger = logging.getLogger("adaptra.runtime")


Gradient = Callable[[Tensor, Tensor], Tensor | None]
"""Of a weight, from the layer's input x and the gradient of its output y. None: it has been accumulated already, and no hook
waits for it."""


def linear_gradient(x: Tensor, grad_y: Tensor) -> Tensor:
    """`grad_y^T x`, of shape (outputs, inputs), summed over all leading dimensions."""
    return grad_y.reshape(-1, grad_y.shape[-1]).t().mm(x.reshape(-1, x.shape[-1]))


@dataclass(frozen=True, slots=True)
class _Deferred:
    """One use of one weight in one microbatch."""

    weight: nn.Parameter
    x: Tensor
    grad_y: Tensor
    gradient: Gradient
    task: int
    """The call of autograd in which it came up: one for each `backward()`, nested ones included."""


class WeightQueue:
    """Weight gradients of one stage that wait for their W.

    A microbatch (with several model chunks: one of a chunk) is opened by `collect` while its I runs and emptied by `run`. Not
    thread-safe: backward passes of one rank run one after the other.
    """

    def __init__(self) -> None:
        self.active = False
        """True while a forward should record for a split backward."""
        self._collecting: list[_Deferred] | None = None
        self._waiting: dict[Hashable, list[_Deferred]] = {}
        self._fused: set[int] = set()
        self._fired: set[int] = set()
        self._shared: set[int] = set()
        self._watches: list[Any] = []

    @property
    def microbatches(self) -> tuple[Hashable, ...]:
        """Microbatches whose W has not run."""
        return tuple(self._waiting)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards inside run split."""
        self.active = True
        try:
            yield
        finally:
            self.active = False

    @contextmanager
    def collect(self, microbatch: Hashable) -> Iterator[None]:
        """Backward passes inside leave the weight gradients of `microbatch` for `run`."""
        if microbatch in self._waiting:
            raise RuntimeError(f"microbatch {microbatch} already waits for its weight gradients")
        self._collecting = []
        self._fired.clear()
        try:
            yield
            self._waiting[microbatch] = self._collecting
            self._shared.update(self._fired.intersection(id(item.weight) for item in self._collecting))
        finally:
            self._collecting = None

    def run(self, microbatch: Hashable) -> None:
        """Computes and accumulates the weight gradients of `microbatch` (action W)."""
        totals: dict[tuple[int, int], tuple[nn.Parameter, Tensor]] = {}
        with torch.no_grad():
            # A weight used several times in one call of autograd: it sums the uses, in the order in which their backward
            # passes ran, before it accumulates; several calls accumulate one by one. The same here, for the same bits.
            for item in self._waiting.pop(microbatch):
                gradient = item.gradient(item.x, item.grad_y)
                if gradient is None:
                    continue
                key = (id(item.weight), item.task)
                seen = totals.get(key)
                totals[key] = (item.weight, gradient if seen is None else seen[1] + gradient)
        for weight, gradient in totals.values():
            with torch.enable_grad():
                alias = weight.expand_as(weight)
            torch.autograd.backward(alias, gradient)

    def clear(self) -> None:
        """Forgets everything that waits (after a failed iteration)."""
        self._waiting.clear()
        self._collecting = None

    def defers(self, weight: nn.Parameter) -> bool:
        """True if a forward through `weight` now should leave its gradient to W."""
        return self.active and weight.requires_grad and id(weight) not in self._fused

    def defer(self, weight: nn.Parameter, x: Tensor, grad_y: Tensor, gradient: Gradient = linear_gradient) -> None:
        """Caller: the backward of a layer, inside `collect`. `gradient` is called in W, without autograd."""
        if self._collecting is None:
            raise UnsupportedError(
                "the model differentiates inside its own forward or loss (torch.autograd.grad, a gradient penalty): "
                'the backward of its linear layers cannot be split; set "adaptra": {"split_backward": false}'
            )
        self._collecting.append(_Deferred(weight, x, grad_y, gradient, torch._C._current_graph_task_id()))

    def watch(self, weights: list[nn.Parameter]) -> None:
        """Finds, in the first iteration, weights that are also used outside of linear layers (`settle` ends it).

        Autograd would add both uses before accumulating; split, they are accumulated one after the other: right, but not to
        the bit.
        """

        def fired(weight: nn.Parameter) -> None:
            if self._collecting is not None:
                self._fired.add(id(weight))

        self._watches = [w.register_post_accumulate_grad_hook(fired) for w in weights if w.requires_grad]

    def settle(self) -> None:
        """Ends the watch: the weights it found run fused from now on. Between iterations only: a microbatch must not be split
        in its forward and fused in the recomputation of an activation checkpoint."""
        for handle in self._watches:
            handle.remove()
        self._watches = []
        if self._shared:
            logger.warning(
                "%d weights are used by a linear layer and elsewhere in the same stage: their backward is not split any more",
                len(self._shared),
            )
        self._fused |= self._shared
        self._shared = set()


class _SplitLinear(torch.autograd.Function):
    """`F.linear` whose backward returns the input's and bias's gradients and queues the weight's.

    The Parameter travels in a tuple (`box`), invisible to autograd; the tensor input `weight` is detached: otherwise the
    hooks of its AccumulateGrad node would fire in I with no gradient. `anchor` requires grad, so that the backward is
    called on a first stage too, where `x` needs none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        box: tuple[WeightQueue, nn.Parameter],
        anchor: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.box = box
        ctx.bias_shape = None if bias is None else bias.shape
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, weight = ctx.saved_tensors
        queue, parameter = ctx.box
        # detached: the queue must not keep the graph alive
        queue.defer(parameter, x.detach(), grad_y.detach())
        grad_x = grad_y.matmul(weight) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.bias_shape is not None and ctx.needs_input_grad[2]:
            # torch flattens 2-D and contiguous 3-D inputs before adding the bias; the order of summation follows
            flattened = x.dim() <= 2 or (x.dim() == 3 and x.is_contiguous())
            flat = grad_y.reshape(-1, grad_y.shape[-1]) if flattened else grad_y
            grad_bias = flat.sum_to_size(ctx.bias_shape)
        return grad_x, None, grad_bias, None, None


@dataclass(frozen=True)
class SplitReport:
    """How many layers of a module run a split backward.

    Attributes:
        split: linear layers that do.
        fused: layers with parameters of their own that do not, by type name.
    """

    split: int
    fused: dict[str, int]


class Split(Protocol):
    """Layers of a host's model that can run split."""

    report: SplitReport

    @property
    def weights(self) -> list[nn.Parameter]:
        """Of the layers that can."""

    def remove(self) -> None:
        """Every layer is as it was before."""


class SplitLinears:
    """The linear layers of one module, made able to run split; `remove` restores each of them."""

    def __init__(self, module: nn.Module, queue: WeightQueue) -> None:
        self.queue = queue
        uses: dict[int, int] = {}
        for owner in module.modules():
            for parameter in owner._parameters.values():
                if parameter is not None:
                    uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        self._layers: list[nn.Linear] = []
        fused: dict[str, int] = {}
        for layer in module.modules():
            own = [p for p in layer._parameters.values() if p is not None]
            if not own:
                continue
            if _is_plain_linear(layer) and uses[id(layer.weight)] == 1 and "forward" not in vars(layer):
                assert isinstance(layer, nn.Linear)
                self._install(layer)
            else:
                name = type(layer).__name__
                fused[name] = fused.get(name, 0) + 1
        self.report = SplitReport(split=len(self._layers), fused=fused)

    @property
    def weights(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self._layers]

    def _install(self, layer: nn.Linear) -> None:
        queue = self.queue
        anchor = torch.zeros(1, device=layer.weight.device, requires_grad=True)
        original = layer.forward

        def forward(x: Tensor) -> Tensor:
            weight = layer.weight
            if (
                not torch.is_grad_enabled()
                or not queue.defers(weight)
                or torch.is_autocast_enabled(x.device.type)  # the cast of the weight is part of the fused graph
                or x.dtype != weight.dtype
                or not weight.is_floating_point()
                or x.layout != torch.strided
                or torch._C._are_functorch_transforms_active()
            ):
                return original(x)
            return _SplitLinear.apply(x, weight.detach(), layer.bias, (queue, weight), anchor)

        # An instance attribute: the class stays as it is, and `remove` is one `del`.
        forward.__wrapped__ = original  # type: ignore[attr-defined]
        layer.forward = forward  # type: ignore[method-assign]
        self._layers.append(layer)

    def remove(self) -> None:
        """Every layer is as it was before."""
        for layer in self._layers:
            del layer.forward
        self._layers = []


def _is_plain_linear(layer: nn.Module) -> bool:
    """True for `nn.Linear` and subclasses that compute what it computes (no parametrization, no own forward)."""
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and isinstance(layer._parameters.get("weight"), nn.Parameter)
        and layer.weight.dim() == 2
    )
