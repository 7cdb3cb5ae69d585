"""The backward of Transformer Engine's layers in two parts.

Since 2.3 each layer has a store (`wgrad_store`). If the store says so, the backward leaves there what the weight gradients need,
quantised or not, and the function that computes them. While a forward records for a split backward, a layer finds a store of ours
instead of its own, one for each call.

For such a call the layer finds stand-ins of its weights too, with their data and attributes. Whatever it hands to autograd in I
(nothing, a placeholder for what it will add to `main_grad`, or the gradient of a bias) ends there, and waits for W. If autograd
saw the parameters, the hooks of their AccumulateGrad nodes would fire in I.

Layers that were built with `delay_wgrad_compute` run the same way. Where nothing records they keep things in their own stores,
and are asked for them as soon as the backward is over.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from torch import Tensor, nn

from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.runtime.census import State
from adaptra_plugin.runtime.split import SplitLayers
from adaptra_plugin.runtime.weight_grad_store import WeightGradStore

USERBUFFERS = ("ub_bulk_wgrad", "ub_bulk_dgrad", "ub_overlap_ag", "ub_overlap_ag_dgrad", "ub_overlap_rs_dgrad")
"""Settings with which a backward computes in buffers that other layers write to next: what is kept would not last until W."""
Part = tuple[list[str], list[str]]
"""Names of the weights and biases whose gradients one function computes."""


def parts(layer: nn.Module) -> list[Part]:
    """In the order in which the backward of a layer keeps them; empty: it cannot run split."""
    own, parameters = getattr(layer, "wgrad_store", None), layer._parameters
    if not all(callable(getattr(own, name, None)) for name in ("put", "delay_wgrad_compute")):
        return []
    if any(getattr(layer, name, False) for name in USERBUFFERS):
        return []
    if "fc1_weight" in parameters:
        found: list[Part] = [(["fc2_weight"], ["fc2_bias"]), (["fc1_weight"], ["fc1_bias"])]
    elif count := getattr(layer, "num_gemms", 0):
        found = [([f"weight{n}" for n in range(count)], [f"bias{n}" for n in range(count)])]
    else:
        found = [(["weight"], ["bias"])]  # of a weight in several pieces there is none of this name
    if any(parameters.get(name) is None for weights, _ in found for name in weights):
        return []
    if not getattr(layer, "apply_bias", True) or getattr(layer, "gemm_bias_unfused_add", False):
        found[0] = (found[0][0], [])  # it is added by somebody else
    return [(weights, [name for name in biases if parameters.get(name) is not None]) for weights, biases in found]


def can_split(layer: nn.Module) -> bool:
    """Whether a layer of Transformer Engine can be expected to run split."""
    weights = [layer._parameters[name] for names, _ in parts(layer) for name in names]
    return bool(weights) and all(weight is not None and weight.requires_grad for weight in weights)


def delays(layer: nn.Module) -> bool:
    """Whether it is a layer of Transformer Engine that was built with `delay_wgrad_compute`."""
    needs = getattr(layer, "need_backward_dw", None) or getattr(
        getattr(layer, "wgrad_store", None), "delay_wgrad_compute", None
    )
    return callable(needs) and callable(getattr(layer, "backward_dw", None)) and bool(needs())


class _Kept:
    """What a layer has kept for W, and the function that computes gradients from it: once, for all of its parameters."""

    def __init__(self, tensors: Sequence[Any], compute: Callable[..., Any]) -> None:
        self._tensors, self._compute = tensors, compute
        self._found: tuple[Sequence[Any], Sequence[Any]] | None = None
        self.watched: list[Tensor] = []
        for item in tensors[:2]:  # inputs and gradients of outputs; what may follow is written to
            several = item if isinstance(item, list | tuple) else [item]
            self.watched += [tensor for tensor in several if isinstance(tensor, Tensor)]

    def gradients(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """Of the weights and of the biases."""
        if self._found is None:
            with torch.no_grad():
                result = self._compute(*self._tensors)
            grouped = len(self._tensors) > 2  # such a layer gives what its weights' gradients are written to
            self._found = (self._tensors[2], result[1]) if grouped else (result[:1], result[1:2])
        return self._found


@dataclass(frozen=True, slots=True, eq=False)
class _Use:
    """The use of one parameter in one call, for W.

    Attributes:
        handed: what the layer has handed to autograd in I.
        place: in what `kept` computes: of weights (0) or biases (1), and which.
        fused: the gradient is added to `main_grad`, and `handed` is what hooks may see of it.
    """

    parameter: nn.Parameter
    handed: Tensor | None
    kept: _Kept | None
    place: tuple[int, int]
    fused: bool

    @property
    def watched(self) -> Sequence[Tensor]:
        return () if self.kept is None else self.kept.watched

    def gradient(self) -> Tensor | None:
        kind, index = self.place
        found = None if self.kept is None else self.kept.gradients()[kind]
        if self.fused:
            if hasattr(self.parameter, "grad_added_to_main_grad"):
                self.parameter.grad_added_to_main_grad = True
            return None if self.handed is None else self.handed.detach()
        if kind == 1 and self.handed is not None:
            return self.handed  # quantising the output's gradient has summed it up
        gradient = found[index] if found else self.handed
        if gradient is None:
            raise UnsupportedError(
                "a layer of Transformer Engine computes no gradient of a parameter apart from the rest of its backward: "
                'set "adaptra": {"split_backward": false}'
            )
        return gradient.to(self.parameter.dtype)


class _Placeholders:
    """What hooks see of gradients that are added to `main_grad`. One of its kind serves all: some layers make one of the size of
    a weight in every backward, which would lie until W; before 2.8 some make none if they delay."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Tensor] = {}

    def get(self, parameter: nn.Parameter, handed: Tensor | None) -> Tensor | None:
        """Of a parameter whose gradient has been handed to autograd as `handed`; None: hooks see nothing, as in stock."""
        if not hasattr(parameter, "grad_added_to_main_grad"):
            return None
        zeros = bool(getattr(parameter, "zero_out_wgrad", False))
        kind = (parameter.shape, parameter.dtype, parameter.device, zeros)
        if handed is None and kind not in self._found:
            make = torch.zeros if zeros else torch.empty
            handed = make(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        return self._found.setdefault(kind, handed)


class _Call:
    """One call of a layer that runs split. Knows neither the stand-ins nor the store, which lead to it."""

    def __init__(
        self, queue: WeightGradStore, placeholders: _Placeholders, layer: nn.Module, found: list[Part], delayed: bool
    ) -> None:
        self.kept: list[_Kept] = []
        self.names: list[str] = []
        self._queue, self._placeholders = queue, placeholders
        self._parts = len(found)
        self._fused = bool(getattr(layer, "fuse_wgrad_accumulation", False))
        self._places: list[tuple[int | None, tuple[int, int]]] = []
        for number, part in enumerate(found):
            for kind, names in enumerate(part):
                for index, name in enumerate(names):
                    self._add(layer, name, number, (kind, index))
        if delayed:
            # a bias that is added elsewhere: nobody runs its hooks before W, so that it has to wait like the rest
            for name, parameter in layer._parameters.items():
                if name not in self.names and getattr(parameter, "skip_backward_post_hook", False):
                    self._add(layer, name, None, (1, 0))
        self.parameters: list[Any] = [layer._parameters[name] for name in self.names]

    def _add(self, layer: nn.Module, name: str, number: int | None, place: tuple[int, int]) -> None:
        parameter = layer._parameters[name]
        if parameter is not None and parameter.requires_grad:
            self.names.append(name)
            self._places.append((number, place))

    def leave(self, handed: Sequence[Tensor | None]) -> None:
        """The backward of the layer is over: its weight gradients go to the queue."""
        kept, self.kept = self.kept, []
        if len(kept) not in (0, self._parts):  # none: it has computed them, for a reason of its own
            raise RuntimeError(
                f"a layer of Transformer Engine has kept {len(kept)} computations of weight gradients, not {self._parts}"
            )
        for parameter, (number, place), gradient in zip(self.parameters, self._places, handed, strict=True):
            left = kept[number] if kept and number is not None else None
            fused = self._fused and place[0] == 0
            if fused:
                gradient = self._placeholders.get(parameter, gradient)
            if number is not None or gradient is not None:
                self._queue.defer(parameter, _Use(parameter, gradient, left, place, fused))


class _Store:
    """What a layer finds in place of its `WeightGradStore`.

    Args:
        call: where it leaves what is kept.
        stand_ins: which Transformer Engine refers to weakly, and needs in its backward.
    """

    def __init__(self, call: _Call, stand_ins: Sequence[Tensor]) -> None:
        self._call, self._stand_ins = call, stand_ins

    def delay_wgrad_compute(self) -> bool:
        return True

    def put(self, tensors: Sequence[Any], compute: Callable[..., Any]) -> None:
        self._call.kept.append(_Kept(tensors, compute))


class _StandIns(torch.autograd.Function):
    """Stand-ins of the parameters of a call. `anchor` requires grad, so that they do."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        return tuple(parameter.detach() for parameter in call.parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None]:
        ctx.call.leave([None if grad is None else grad.detach() for grad in grads])
        return None, None


class TransformerEngineLayers:
    """The layers of Transformer Engine in each model chunk of a rank. The model is not kept alive."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._delaying = [[weakref.ref(layer) for layer in chunk.modules() if delays(layer)] for chunk in chunks]
        modules = itertools.chain(*(chunk.modules() for chunk in chunks))
        self._layers = [(weakref.ref(layer), found) for layer in modules if (found := parts(layer))]
        self._placeholders = _Placeholders()
        self._recording = False

    @contextmanager
    def recording(self, split: SplitLayers, taker: Callable[[], Any]) -> Iterator[None]:
        """Layers that are called inside run split, if `taker` says so then: the thread may be another."""
        if self._recording or _debugged():
            yield
            return
        before: list[tuple[nn.Module, Any]] = []
        self._recording = True
        try:
            for reference, found in self._layers:
                layer = reference()
                if layer is not None:
                    before.append((layer, vars(layer).get("forward")))
                    vars(layer)["forward"] = functools.partial(self._forward, split, taker, layer, found, layer.forward)
            yield
        finally:
            self._recording = False
            for layer, forward in before:
                if forward is None:
                    del vars(layer)["forward"]
                else:
                    vars(layer)["forward"] = forward

    def _forward(
        self,
        split: SplitLayers,
        taker: Callable[[], Any],
        layer: Any,
        found: list[Part],
        stock: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A call of a layer while a forward records."""
        parameters = layer._parameters
        weights = [parameters[name] for weights, _ in found for name in weights]
        if (
            not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or taker() is not split
            or not all(weight.requires_grad and not hasattr(weight, "__fsdp_param__") for weight in weights)
        ):
            return stock(*args, **kwargs)
        delayed = delays(layer)
        call = _Call(split.queue, self._placeholders, layer, found, delayed)
        if not delayed:
            states = [split.census.state(parameter) for parameter in call.parameters]
            if None in states or State.FUSED in states:
                return stock(*args, **kwargs)
            if State.OBSERVED in states:
                y = stock(*args, **kwargs)
                x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), weights[0])
                for parameter, state in zip(call.parameters, states, strict=True):
                    if state is State.OBSERVED:
                        split.census.observe(parameter, x, y[0] if isinstance(y, tuple) else y)
                return y
        stand_ins = _StandIns.apply(split.anchor(weights[0]), call)
        for stand_in, parameter in zip(stand_ins, call.parameters, strict=True):
            stand_in.__dict__.update(parameter.__dict__)
        own = layer.wgrad_store
        parameters.update(zip(call.names, stand_ins, strict=True))
        layer.wgrad_store = _Store(call, stand_ins)
        try:
            return stock(*args, **kwargs)
        finally:
            layer.wgrad_store = own
            parameters.update(zip(call.names, call.parameters, strict=True))

    def run(self, chunk: int) -> None:
        """After a backward, and after W: computes what layers have kept in stores of their own, and runs the hooks that the
        data-parallel wrapper has left with them."""
        for reference in reversed(self._delaying[chunk]):
            layer: Any = reference()
            context = getattr(getattr(layer, "wgrad_store", None), "context", None)
            while isinstance(context, Queue) and not context.empty():
                layer.backward_dw()
            hooks = getattr(layer, "wgrad_accumulation_and_reduce_hooks", ())
            if hooks and any(p is not None and p.grad is not None for p in layer._parameters.values()):
                for hook in hooks:
                    hook()

    def discard(self) -> None:
        """Forgets what is kept in stores of the layers (after a failed iteration)."""
        for reference in itertools.chain(*self._delaying):
            context = getattr(getattr(reference(), "wgrad_store", None), "context", None)
            if isinstance(context, Queue):
                context.queue.clear()


def _debugged() -> bool:
    """Whether Transformer Engine's debugging looks at its layers: it takes no delayed weight gradients."""
    state = getattr(sys.modules.get("transformer_engine.debug.pytorch.debug_state"), "TEDebugState", None)
    return bool(getattr(state, "debug_enabled", False))
