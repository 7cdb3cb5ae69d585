"""The backward pass of linear layers in two parts: input first, weights when there is time.

Modules are left alone. While a forward records, the name `torch.nn.functional.linear` is bound to `SplitLinears`'s own function,
so a linear layer of any class takes part that calls it with a parameter of the model: `nn.Linear`, the layers of GPT-NeoX, users'
own. Names that are bound to somebody else's function then, and whatever else is not known, run as in stock.

A split call runs the stock function on stand-ins of input and bias: a small graph of its own, from the input to the output,
that ends at the real parameter. I takes from it the gradients of input and bias, W that of the weight. So each is what autograd
computes for stock, whatever way torch chooses for the layout at hand.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from adaptra_plugin.bindings import names_bound_to
from adaptra_plugin.runtime.census import Census, State
from adaptra_plugin.runtime.weight_grad_store import Formula, GraphRest, WeightGradStore, linear_gradient

_LINEAR = torch._C._nn.linear
"""`torch.nn.functional.linear` as torch makes it."""


@dataclass(frozen=True)
class SplitReport:
    """How many layers of a module run a split backward.

    Attributes:
        split: linear layers that do; before the end of the first iteration, those that are likely to.
        fused: layers with parameters of their own that do not, by type name.
    """

    split: int
    fused: dict[str, int]


class Split(Protocol):
    """Layers of a host's model that can run split."""

    @property
    def report(self) -> SplitReport: ...

    def begin(self) -> None:
        """An iteration begins."""

    def recording(self) -> AbstractContextManager[None]:
        """Forwards inside run split."""

    def finalize(self) -> None:
        """An iteration has ended."""

    def remove(self) -> None:
        """Nothing is left in the model."""


class Rebinding:
    """Names that are bound to a stand-in while forwards record, if they are bound to the stock object then."""

    def __init__(self, stock: Any, stand_in: Any, names: Callable[[], list[tuple[ModuleType, str]]]) -> None:
        self._stock, self._stand_in, self._find = stock, stand_in, names
        self._names: list[tuple[ModuleType, str]] = []
        self._modules = 0
        self._takers: list[tuple[Any, int]] = []

    def look(self) -> None:
        """Finds the names, if modules have been imported since; not for each forward, as every module is searched."""
        if len(sys.modules) != self._modules:
            self._modules = len(sys.modules)
            self._names = self._find()

    @property
    def taker(self) -> Any:
        """Who records now, on this thread or on one that runs a backward for it; None: nobody."""
        if not self._takers:
            return None
        taker, thread = self._takers[-1]
        mine = thread == threading.get_ident() or torch._C._current_graph_task_id() != -1
        return taker if mine else None

    @contextmanager
    def to(self, taker: Any) -> Iterator[None]:
        """Inside, calls by the names reach the stand-in, which finds `taker`."""
        outermost = not self._takers
        self._takers.append((taker, threading.get_ident()))
        try:
            if outermost:
                self._bind(self._stock, self._stand_in)
            yield
        finally:
            self._takers.pop()
            if outermost:
                self._bind(self._stand_in, self._stock)

    def _bind(self, old: Any, new: Any) -> None:
        for module, name in self._names:
            if vars(module).get(name) is old:
                setattr(module, name, new)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` while a forward records."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _LINEAR(input, weight, bias)
    taker = _REBINDING.taker
    if taker is None or (state := taker.census.state(weight)) in (None, State.FUSED) or not _is_plain(input, bias):
        return _LINEAR(input, weight, bias)
    if state is State.SPLIT:
        call = _Call(taker.queue, weight)
        if _is_product(input, weight, bias):
            return _product(input, bias, taker.anchor(weight), call)
        y = _SplitLinear.apply(input, bias, taker.anchor(weight), call)
        return y if call.shape is None else y.view(call.shape)
    y = _LINEAR(input, weight, bias)
    if _is_ordinary(weight):
        taker.census.observe(weight, input, y)
    return y


def _names_of_linear() -> list[tuple[ModuleType, str]]:
    return [(module, name) for module, name, _ in names_bound_to(_LINEAR) if not module.__name__.startswith("torch._C")]


_REBINDING = Rebinding(_LINEAR, _linear, _names_of_linear)


autocasts = torch._C._is_any_autocast_enabled  # asking by x.device would take longer than all the rest


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_inference()
    )


def _is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a call does what it does for ordinary tensors, with nobody else in between. Its weight is observed before it is split."""
    return (
        (bias is None or _is_ordinary(bias))
        and _is_ordinary(x)
        and not (
            autocasts()  # casts are kept for the whole forward, and shared between layers
            or torch._C._are_functorch_transforms_active()
            or torch.jit.is_tracing()
            or forward_ad._current_level >= 0
            or not torch._C._autograd._saved_tensors_hooks_is_enabled()
            or (
                torch._C._len_torch_function_stack() > 0
                and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
            )
        )
    )


@dataclass(slots=True)
class _Call:
    """A split call, invisible to autograd.

    Attributes:
        shape: of the output, if that is a view of what has been computed. The view is made in the host's graph then, as in stock:
            the gradient of a view that is changed in place comes in another layout.
    """

    queue: WeightGradStore
    weight: nn.Parameter
    shape: torch.Size | None = None


def _is_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch is known to compute a call as one product of two matrices that are laid out by rows, with nobody looking at
    what it saves."""
    return (
        x.is_contiguous()
        and weight.is_contiguous()
        and x.is_floating_point()
        and (x.is_cpu or x.is_cuda)
        and (x.dim() in (2, 3) if bias is not None else x.dim() >= 2)
        and min(weight.shape) > 1
        and x.numel() > x.shape[-1]  # of a single row or column torch does not know whether it is laid out by rows
        and not _saved_tensors_are_hooked(True)
    )


_unsafe_view = torch.ops.aten._unsafe_view.default
_saved_tensors_are_hooked: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)


def _product(x: Tensor, bias: Tensor | None, anchor: Tensor, call: _Call) -> Tensor:
    if x.dim() == 2:
        return _SplitProduct.apply(x, bias, anchor, call)
    shape = (*x.shape[:-1], call.weight.shape[0])
    y = _SplitProduct.apply(x.view(-1, x.shape[-1]), bias, anchor, call)
    # with a bias the output is a view in stock as well: the gradient of a view that is changed in place has another layout
    return y.view(shape) if bias is not None else _unsafe_view(y, shape)


class _SplitProduct(torch.autograd.Function):
    """`F.linear` of the commonest layouts, with autograd's formulas for a product of matrices written out: the same kernels on
    the same operands, several times sooner than a graph of its own for each call (`_SplitLinear`, which need not know them)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, anchor: Tensor, call: _Call) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, call.weight)
        ctx.call, ctx.bias_shape = call, None if bias is None else bias.shape
        return _LINEAR(x, call.weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        if grad_y is None:
            return None, None, None, None  # as in stock: no gradient is not a gradient of zeros
        x, weight = ctx.saved_tensors
        ctx.call.queue.defer(ctx.call.weight, Formula(x.detach(), grad_y, linear_gradient))
        grad_x = grad_y.mm(weight) if ctx.needs_input_grad[0] else None
        grad_bias = grad_y.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None


class _Entrance(torch.autograd.Function):
    """Where a split call's own graph begins: a node that keeps no tensor alive, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("gradients are taken where the graph begins")


class _SplitLinear(torch.autograd.Function):
    """`F.linear` whose backward returns the gradients of input and bias and queues the rest.

    The Parameter travels in `call`: if autograd saw it, the hooks of its AccumulateGrad node would fire in I with no gradient.
    `anchor` requires grad, so that the backward is called on a first stage too, where `x` needs none.

    What the graph inside saves is saved by the Function: hooks on saved tensors (activation checkpoints, offloading) see what
    they see in stock, and are asked for it in the host's call of autograd.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, anchor: Tensor, call: _Call) -> Tensor:
        ctx.set_materialize_grads(False)
        saved: list[Tensor] = []
        held: list[Tensor] = []  # the same again, while they are needed

        def park(tensor: Tensor) -> int:
            saved.append(tensor)
            return len(saved) - 1

        with torch.enable_grad(), saved_tensors_hooks(park, held.__getitem__):
            x = _Entrance.apply(x.detach(), anchor) if x.requires_grad else x.detach()
            if bias is not None:
                bias = bias.detach().requires_grad_(bias.requires_grad)
            weight = call.weight.view_as(call.weight)
            y = _LINEAR(x, weight, bias)
        ctx.save_for_backward(*saved)
        saved.clear()  # the graph keeps the hook that has filled it
        if y._is_view() and y._base is not None and y.is_contiguous() and y._base.is_contiguous():
            call.shape, y = y.shape, y._base
        ctx.held, ctx.call = held, call
        ctx.output, ctx.weight = get_gradient_edge(y), get_gradient_edge(weight)
        ctx.ends = [None if t is None or not t.requires_grad else get_gradient_edge(t) for t in (x, bias)]
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        if grad_y is None:
            return None, None, None, None
        ctx.held[:] = ctx.saved_tensors
        ctx.call.queue.defer(ctx.call.weight, GraphRest(ctx.output, grad_y, ctx.weight, ctx.held))
        found: list[Tensor | None] = [None, None]
        wanted = [n for n in (0, 1) if ctx.needs_input_grad[n] and ctx.ends[n] is not None]
        if wanted:
            ends = [ctx.ends[n] for n in wanted]
            for n, gradient in zip(
                wanted, torch.autograd.grad(ctx.output, ends, grad_y, retain_graph=True), strict=True
            ):
                found[n] = gradient
        return *found, None, None


class SplitLayers:
    """Layers of a model that can run split: what the hosts have in common.

    Args:
        modules: all of them, parents and children.
        queue: where W takes from.
        rebinding: how calls of the layers are reached.
        likely: whether a layer can be expected to run split.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        queue: WeightGradStore,
        rebinding: Rebinding,
        likely: Callable[[nn.Module], bool],
    ) -> None:
        found = list(modules)
        self.queue = queue
        self.census = Census(found, queue)
        self._modules = [weakref.ref(module) for module in found]
        self._rebinding = rebinding
        self._likely = likely
        self._hooked = self._observed = False
        self._anchors: dict[int, Tensor] = {}
        rebinding.look()

    def anchor(self, weight: Tensor) -> Tensor:
        """A leaf that requires grad, on the device of the weight."""
        index = weight.get_device()
        if index not in self._anchors:
            self._anchors[index] = torch.zeros(1, device=weight.device, requires_grad=True)
        return self._anchors[index]

    def begin(self) -> None:
        """An iteration begins. Hooks on the backward of modules may look at gradients, or change them: with such hooks no backward
        is split, so that they find what they find in stock."""
        self._hooked = any(
            module._backward_hooks or module._backward_pre_hooks
            for found in self._modules
            if (module := found()) is not None
        )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards inside run split."""
        with contextlib.nullcontext() if self._hooked else self._rebinding.to(self):
            yield

    def runs_split(self, layer: nn.Module, states: Sequence[State | None]) -> bool:
        """For the report: whether a layer does, going by its parameters' states; it can be expected to as long as none was observed."""
        return State.SPLIT in states or (not (self._observed or State.FUSED in states) and self._likely(layer))

    @property
    def report(self) -> SplitReport:
        split = 0
        fused: dict[str, int] = {}
        for module in filter(None, (found() for found in self._modules)):
            states = [self.census.state(p) for p in module._parameters.values() if p is not None]
            if self.runs_split(module, states):
                split += 1
            elif states:
                name = type(module).__name__
                fused[name] = fused.get(name, 0) + 1
        return SplitReport(split, fused)

    def finalize(self) -> None:
        """An iteration has ended: what has been observed in it decides about the next."""
        self._observed = True
        if self.census.finalize():
            self._rebinding.look()  # modules that have been imported since

    def remove(self) -> None:
        """Nothing is left in the model."""
        self.census.close()


class SplitLinears(SplitLayers):
    """Layers that call `torch.nn.functional.linear` with a parameter of `module`; those of `kinds` can be expected to."""

    def __init__(self, module: nn.Module, queue: WeightGradStore, kinds: Any = nn.Linear) -> None:
        uses: dict[int, int] = {}
        for owner in module.modules():
            for parameter in owner._parameters.values():
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1

        def likely(layer: nn.Module) -> bool:
            weight = layer._parameters.get("weight")
            known = isinstance(layer, kinds) and weight is not None
            return known and weight.requires_grad and uses.get(id(weight), 1) == 1

        super().__init__(module.modules(), queue, _REBINDING, likely)
