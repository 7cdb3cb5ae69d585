"""The backward of Megatron's linear layers in two parts.

The local layers (`ColumnParallelLinear`, `RowParallelLinear`, the output layer) all go through one autograd Function, which
`tensor_parallel.layers` looks up by its global name at each call; that name is bound to `Switch`. While a forward
records for a split backward, calls go to `_SplitLinear`, at all other times to the stock Function.

The stock Function can leave out the weight gradient by itself (it does so for the last stage's embedding): given a list,
it appends the output's gradient instead. So everything else of it, collectives included, runs as it is in stock.

Layers of Transformer Engine bring a mechanism of their own: built with `delay_wgrad_compute`, they keep what the weight
gradient needs until `backward_dw` is called, first in, first out.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Queue
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.utils import prepare_input_tensors_for_wgrad_compute
from torch import Tensor, nn

from adaptra_plugin.runtime.split import Gradient, SplitReport, WeightQueue

_recording: list[WeightQueue] = []
"""The queue of the forward that runs now, if it records."""


@contextmanager
def recording(queue: WeightQueue) -> Iterator[None]:
    """Forwards inside run split; their weight gradients go to `queue`."""
    _recording.append(queue)
    try:
        with queue.recording():
            yield
    finally:
        _recording.pop()


class Switch:
    """Stands in for the stock Function, of which layers use nothing but `apply`."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.split = _split_function(stock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        buffer: Any,
        limit: int,
        tp_group: Any,
        *more: Any,
    ) -> Tensor:
        """Arguments as of the stock Function; `more` are those of newer versions."""
        queue = _recording[-1] if _recording else None
        if (
            queue is None
            or buffer is not None  # Megatron defers this one itself
            or not isinstance(weight, nn.Parameter)
            or not queue.defers(weight)
            or not torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or hasattr(weight, "__fsdp_param__")
            or any(value not in (None, 0, 1) for value in more)  # weights that are spread and gathered anew
        ):
            return self.stock.apply(
                x, weight, bias, fusion, allreduce_dgrad, sequence_parallel, buffer, limit, tp_group, *more
            )
        gather = tp_group if sequence_parallel else None
        gradient = _fused_gradient(weight, gather) if fusion else _plain_gradient(gather)
        anchor = torch.zeros(1, device=weight.device, requires_grad=True)  # a stage's first layer may have no other
        y = self.split.apply(
            x, weight.detach(), (queue, weight, gradient), anchor, allreduce_dgrad, sequence_parallel, tp_group, *more
        )
        return y if bias is None else _AddBias.apply(y, bias)


def _split_function(stock: Any) -> Any:
    """The stock Function without the weight's gradient, which goes to a queue."""

    class _SplitLinear(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            weight: Tensor,
            box: tuple[WeightQueue, nn.Parameter, Gradient],
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
            queue.defer(weight, x.detach(), ctx.grad_output_buffer.pop().detach(), gradient)
            return grad_x, *(None for _ in range(ctx.inputs - 1))

    return _SplitLinear


class _AddBias(torch.autograd.Function):
    """Adds a bias; its gradient is summed over the flattened microbatch, as the stock Function does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        return grad, grad.reshape(-1, grad.shape[-1]).sum(dim=0)


def _operands(x: Tensor, grad_y: Tensor, gather: Any) -> tuple[Tensor, Tensor]:
    """(grad_y, x), flattened to two dimensions; x gathered from the tensor-parallel ranks `gather` if it is spread over them."""
    if gather is not None:
        whole = torch.empty(x.shape[0] * gather.size(), *x.shape[1:], dtype=x.dtype, device=x.device)
        torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=gather)
        x = whole
    grad_y, x = prepare_input_tensors_for_wgrad_compute(grad_y, x)
    return grad_y, x


def _plain_gradient(gather: Any) -> Gradient:
    def gradient(x: Tensor, grad_y: Tensor) -> Tensor:
        grad_y, x = _operands(x, grad_y, gather)
        return grad_y.t().matmul(x)

    return gradient


def _fused_gradient(weight: nn.Parameter, gather: Any) -> Gradient:
    """`gradient_accumulation_fusion`: added to `main_grad` by one kernel; hooks see a tensor that they must not read."""

    def gradient(x: Tensor, grad_y: Tensor) -> Tensor | None:
        grad_y, x = _operands(x, grad_y, gather)
        main_grad: Any = weight.main_grad
        kernels = layers.fused_weight_gradient_mlp_cuda
        single = main_grad.dtype == torch.float32
        (kernels.wgrad_gemm_accum_fp32 if single else kernels.wgrad_gemm_accum_fp16)(x, grad_y, main_grad)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True  # type: ignore[assignment]
        make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
        return make(main_grad.shape, dtype=x.dtype, device=x.device)

    return gradient


class Delayed:
    """The layers of Transformer Engine, in each model chunk, that keep what their weight gradients need. The model is not kept alive."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._layers = [[weakref.ref(layer) for layer in chunk.modules() if delays(layer)] for chunk in chunks]

    def __len__(self) -> int:
        return sum(map(len, self._layers))

    def run(self, chunk: int) -> None:
        """The weight gradients that have been kept longest."""
        for found in reversed(self._layers[chunk]):
            layer: Any = found()
            layer.backward_dw()

    def discard(self) -> None:
        """Forgets what is kept (after a failed iteration)."""
        for found in itertools.chain(*self._layers):
            context = getattr(getattr(found(), "wgrad_store", None), "context", None)
            if isinstance(context, Queue):
                context.queue.clear()


class MegatronSplit:
    """The layers of a rank's model chunks that run split: the local ones by `Switch`, Transformer Engine's by themselves.

    Nothing is installed in the model, so there is nothing to remove from it; nor is it kept alive.
    """

    def __init__(self, chunks: Sequence[nn.Module], delayed: Delayed) -> None:
        self._layers: list[weakref.ref[nn.Module]] = []
        fused: dict[str, int] = {}
        for layer in itertools.chain(*(chunk.modules() for chunk in chunks)):
            if isinstance(layer, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
                # one without a weight of its own is handed that of the embedding
                self._layers.append(weakref.ref(layer))
            elif any(parameter is not None for parameter in layer._parameters.values()) and not delays(layer):
                fused[type(layer).__name__] = fused.get(type(layer).__name__, 0) + 1
        self.report = SplitReport(split=len(self._layers) + len(delayed), fused=fused)

    @property
    def weights(self) -> list[nn.Parameter]:
        found = [getattr(layer(), "weight", None) for layer in self._layers]
        return [weight for weight in found if isinstance(weight, nn.Parameter)]

    def remove(self) -> None:
        self._layers = []


def delays(layer: nn.Module) -> bool:
    """Whether it is a layer of Transformer Engine that was built with `delay_wgrad_compute`."""
    needs = getattr(layer, "need_backward_dw", None) or getattr(
        getattr(layer, "wgrad_store", None), "delay_wgrad_compute", None
    )
    return callable(needs) and callable(getattr(layer, "backward_dw", None)) and bool(needs())
