"""The backward of Megatron's linear layers in two parts.

The local layers (`ColumnParallelLinear`, `RowParallelLinear`, the output layer) all go through one autograd Function, which
`tensor_parallel.layers` looks up by its global name at each call. While a forward records for a split backward, that name is
bound to `_Calls`, at all other times to what it is bound to without the plug-in. If somebody else has put another Function
there, it stays, and the layers run fused.

The stock Function can leave out the weight gradient by itself (it does so for the last stage's embedding): given a list,
it appends the output's gradient instead. So everything else of it, collectives included, runs as it is in stock.

Layers of Transformer Engine bring a mechanism of their own, see `megatron_te`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.utils import prepare_input_tensors_for_wgrad_compute
from torch import Tensor, nn

from adaptra_plugin.patches.function_calls import FunctionCalls
from adaptra_plugin.patches.megatron_te import TransformerEngineLayers, can_split, delays
from adaptra_plugin.runtime.census import State
from adaptra_plugin.runtime.split import Rebinding, SplitLayers
from adaptra_plugin.runtime.weight_grad_store import Formula, Product, WeightGradStore

logger = logging.getLogger("adaptra")
NAME = "LinearWithGradAccumulationAndAsyncCommunication"
_STOCK: Any = getattr(layers, NAME)


class _Calls(FunctionCalls):
    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        self._split = _split_function(stock)

    def can_split(self, weight: Tensor, *more: Any) -> bool:
        buffer = more[4]
        return (
            buffer is None  # otherwise Megatron defers this one itself
            and not hasattr(weight, "__fsdp_param__")
            # arguments of newer versions: weights that are spread and gathered anew
            and all(value in (None, 0, 1) for value in more[7:])
        )

    def split(
        self,
        taker: Any,
        x: Tensor,
        weight: Any,
        detached: Tensor,
        bias: Tensor | None,
        fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        buffer: Any,
        limit: int,
        tp_group: Any,
        *more: Any,
    ) -> Tensor:
        gather = tp_group if sequence_parallel else None
        gradient = _fused_gradient(weight, gather) if fusion else _plain_gradient(gather)
        box, anchor = (taker.queue, weight, gradient), taker.anchor(weight)
        y: Tensor = self._split.apply(x, detached, box, anchor, allreduce_dgrad, sequence_parallel, tp_group, *more)
        return y if bias is None else _AddBias.apply(y, bias)


def _split_function(stock: Any) -> Any:
    """The stock Function without the weight's gradient, which goes to a queue."""

    class _SplitLinear(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            weight: Tensor,
            box: tuple[WeightGradStore, nn.Parameter, Product],
            anchor: Tensor,
            allreduce_dgrad: bool,
            sequence_parallel: bool,
            tp_group: Any,
            *more: Any,
        ) -> Tensor:
            ctx.box = box
            ctx.inputs = 7 + len(more)
            # fused, and with a list for the output's gradient: so it computes no gradient of the weight
            y: Tensor = stock.forward(
                ctx, x, weight, None, True, allreduce_dgrad, sequence_parallel, [], 0, tp_group, *more
            )
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            x = ctx.saved_tensors[0]
            grad_x = stock.backward(ctx, *grads)[0]
            queue, weight, gradient = ctx.box
            # detached: the queue must not keep the graph alive
            queue.defer(weight, Formula(x.detach(), ctx.grad_output_buffer.pop().detach(), gradient))
            return grad_x, *(None for _ in range(ctx.inputs - 1))

    return _SplitLinear


class _AddBias(torch.autograd.Function):
    """Adds a bias; its gradient is summed as the stock Function does: over the flattened microbatch, laid out anew."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        flat, _ = prepare_input_tensors_for_wgrad_compute(grad, grad)
        return grad, flat.sum(dim=0)


def _operands(x: Tensor, grad_y: Tensor, gather: Any) -> tuple[Tensor, Tensor]:
    """(grad_y, x), flattened to two dimensions; x gathered from the tensor-parallel ranks `gather` if it is spread over them."""
    if gather is not None:
        whole = torch.empty(x.shape[0] * gather.size(), *x.shape[1:], dtype=x.dtype, device=x.device)
        torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=gather)
        x = whole
    grad_y, x = prepare_input_tensors_for_wgrad_compute(grad_y, x)
    return grad_y, x


def _plain_gradient(gather: Any) -> Product:
    def gradient(x: Tensor, grad_y: Tensor) -> Tensor:
        grad_y, x = _operands(x, grad_y, gather)
        return grad_y.t().matmul(x)

    return gradient


def _fused_gradient(weight: nn.Parameter, gather: Any) -> Product:
    """`gradient_accumulation_fusion`: added to `main_grad` by one kernel; hooks see a tensor that they must not read."""

    def gradient(x: Tensor, grad_y: Tensor) -> Tensor | None:
        grad_y, x = _operands(x, grad_y, gather)
        main_grad: Any = weight.main_grad
        kernels = layers.fused_weight_gradient_mlp_cuda
        single = main_grad.dtype == torch.float32
        (kernels.wgrad_gemm_accum_fp32 if single else kernels.wgrad_gemm_accum_fp16)(x, grad_y, main_grad)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
        return make(main_grad.shape, dtype=x.dtype, device=x.device)

    return gradient


_calls = _Calls(_STOCK)
REBINDING = _Calls.rebinding = Rebinding(_STOCK, _calls, lambda: [(layers, NAME)])


class MegatronSplit(SplitLayers):
    """The layers of a rank's model chunks that run split: the local ones by `_Calls`, Transformer Engine's by their stores."""

    def __init__(self, chunks: Sequence[nn.Module], te_layers: TransformerEngineLayers, queue: WeightGradStore) -> None:
        super().__init__(itertools.chain(*(chunk.modules() for chunk in chunks)), queue, REBINDING, _is_likely)
        self._te_layers = te_layers
        present = getattr(layers, NAME)
        if present is not _STOCK or _STOCK.__module__ != layers.__name__:
            logger.warning(
                "megatron.core's %s is replaced by %s.%s: its layers run fused",
                NAME,
                present.__module__,
                present.__name__,
            )

    @contextmanager
    def recording(self) -> Iterator[None]:
        with super().recording():
            if REBINDING.taker is self:
                with self._te_layers.recording(self, lambda: REBINDING.taker):
                    yield
            else:
                yield

    def runs_split(self, layer: nn.Module, states: Sequence[State | None]) -> bool:
        if delays(layer):
            return can_split(layer)  # it has not been observed
        # one function computes the gradients of all its parameters
        return not (State.FUSED in states and can_split(layer)) and super().runs_split(layer, states)


def _is_likely(layer: nn.Module) -> bool:
    # a local one without a weight of its own is handed that of the embedding
    return isinstance(layer, (layers.ColumnParallelLinear, layers.RowParallelLinear)) or can_split(layer)
