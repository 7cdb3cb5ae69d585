"""Layers of a DeepSpeed pipeline that run split: those that call `F.linear`, and those of Megatron-DeepSpeed.

Megatron-DeepSpeed has a `megatron.core` of its own. Its linear layers, its output layer too, go through one autograd
Function that computes the gradient of the weight itself. Their module looks it up by its global name at each call; while a forward
records, that name is bound to `_Calls`. The Function cannot leave out the weight's gradient, so its backward is written out here: the
same products, and the same collectives in the same places.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from adaptra_plugin.patches.function_calls import FunctionCalls
from adaptra_plugin.runtime.split import Rebinding, SplitLinears
from adaptra_plugin.runtime.weight_grad_store import Formula, Product, WeightGradStore

NAME = "LinearWithGradAccumulationAndAsyncCommunication"
ARGUMENTS = ("input", "weight", "bias", "gradient_accumulation_fusion", "async_grad_allreduce", "sequence_parallel")
"""Of the Function. Others are Megatron-LM's, of other versions."""
LAYERS = ("ColumnParallelLinear", "RowParallelLinear")


class PipelineSplit(SplitLinears):
    """The layers of a pipeline stage that run split."""

    def __init__(self, module: nn.Module, queue: WeightGradStore) -> None:
        homes = _homes(module)
        kinds = [kind for home in homes for name in LAYERS if isinstance(kind := getattr(home, name, None), type)]
        super().__init__(module, queue, (nn.Linear, *kinds))
        self._rebindings = [_rebinding(home) for home in homes]
        for rebinding in self._rebindings:
            rebinding.look()

    @contextmanager
    def recording(self) -> Iterator[None]:
        with super().recording(), ExitStack() as stack:
            if not self._hooked:
                for rebinding in self._rebindings:
                    stack.enter_context(rebinding.to(self))
            yield


def _homes(module: nn.Module) -> list[ModuleType]:
    """Modules that hold classes of layers of the model, and the Function that these call."""
    names = {type(layer).__module__ for layer in module.modules()}
    return [home for name in sorted(names) if (home := sys.modules.get(name)) is not None and _is_home(home)]


def _is_home(home: ModuleType) -> bool:
    function = getattr(home, NAME, None)
    return (
        isinstance(function, type)
        and issubclass(function, torch.autograd.Function)
        and function.__module__ == home.__name__
        and tuple(inspect.signature(getattr(home, NAME).forward).parameters)[1:] == ARGUMENTS
        and callable(getattr(home, "get_tensor_model_parallel_group", None))
    )


@functools.cache
def _rebinding(home: ModuleType) -> Rebinding:
    stock = getattr(home, NAME)
    calls = _Calls(stock, home)
    calls.rebinding = Rebinding(stock, calls, lambda: [(home, NAME)])
    return calls.rebinding


class _Calls(FunctionCalls):
    def __init__(self, stock: Any, home: Any) -> None:
        super().__init__(stock)
        self._home = home
        self._split = _split_function(stock)

    def can_split(self, weight: Tensor, *more: Any) -> bool:
        fusion = more[1]
        return not (fusion and hasattr(weight, "main_grad"))  # the Function may add to it by itself

    def split(
        self,
        taker: Any,
        x: Tensor,
        weight: Tensor,
        detached: Tensor,
        bias: Tensor | None,
        fusion: bool,
        allreduce: bool,
        sequence_parallel: bool,
    ) -> Tensor:
        box = taker.queue, weight, self._home.get_tensor_model_parallel_group()
        y: Tensor = self._split.apply(x, detached, bias, box, taker.anchor(weight), allreduce, sequence_parallel)
        return y


def _split_function(stock: Any) -> Any:
    """The stock Function without the weight's gradient, which goes to a queue."""

    class _SplitLinear(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            box: tuple[WeightGradStore, nn.Parameter, Any],
            anchor: Tensor,
            allreduce: bool,
            sequence_parallel: bool,
        ) -> Tensor:
            ctx.box, ctx.with_bias, ctx.allreduce, ctx.spread = box, bias is not None, allreduce, sequence_parallel
            y: Tensor = stock.forward(ctx, x, weight, bias, False, allreduce, sequence_parallel)
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            (grad_y,) = grads
            x, weight = ctx.saved_tensors
            queue, parameter, group = ctx.box
            grad_x = grad_y.matmul(weight)
            flat = grad_y.contiguous().view(-1, grad_y.shape[-1])
            queue.defer(parameter, Formula(x.detach(), flat.detach(), _gradient(group if ctx.spread else None)))
            if ctx.allreduce:
                torch.distributed.all_reduce(grad_x, group=group)
            if ctx.spread:
                whole, grad_x = grad_x, torch.empty(x.shape, dtype=x.dtype, device=x.device)
                torch.distributed.reduce_scatter_tensor(grad_x, whole, group=group)
            return grad_x, None, flat.sum(dim=0) if ctx.with_bias else None, None, None, None, None

    return _SplitLinear


def _gradient(gather: Any) -> Product:
    """The weight's gradient; the input is gathered from the tensor-parallel ranks `gather` if it is spread over them."""

    def gradient(x: Tensor, grad_y: Tensor) -> Tensor:
        if gather is not None:
            whole = torch.empty(x.shape[0] * gather.size(), *x.shape[1:], dtype=x.dtype, device=x.device)
            torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=gather)
            x = whole
        return grad_y.t().matmul(x.reshape(-1, x.shape[-1]))

    return gradient
