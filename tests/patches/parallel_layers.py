"""Linear layers that compute the gradients of their weights themselves, with the names that those of Megatron-DeepSpeed have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def get_tensor_model_parallel_group() -> Any:
    return torch.distributed.group.WORLD


def _gathered(x: Tensor) -> Tensor:
    group = get_tensor_model_parallel_group()
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


class LinearWithGradAccumulationAndAsyncCommunication(torch.autograd.Function):
    """`x @ weight.t() + bias`; dimension 0 of x is spread over the ranks with `sequence_parallel`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        async_grad_allreduce: bool,
        sequence_parallel: bool,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.settings = bias is not None, async_grad_allreduce, sequence_parallel
        y = torch.matmul(_gathered(input) if sequence_parallel else input, weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with_bias, allreduce, spread = ctx.settings
        grad_y = grads[0]
        grad_x = grad_y.matmul(weight)
        whole = _gathered(x) if spread else x
        grad_y = grad_y.contiguous().view(-1, grad_y.shape[-1])
        if allreduce:
            torch.distributed.all_reduce(grad_x)
        if spread:
            part = torch.empty_like(x)
            torch.distributed.reduce_scatter_tensor(part, grad_x)
            grad_x = part
        grad_weight = grad_y.t().matmul(whole.reshape(-1, whole.shape[-1]))
        return grad_x, grad_weight, grad_y.sum(dim=0) if with_bias else None, None, None, None


class ColumnParallelLinear(nn.Module):
    """A rank's columns."""

    def __init__(
        self, size: int, outputs: int, *, bias: bool, allreduce: bool, spread: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, size, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(outputs, dtype=dtype)) if bias else None
        self.allreduce, self.spread = allreduce, spread

    def forward(self, x: Tensor) -> Tensor:
        function = LinearWithGradAccumulationAndAsyncCommunication
        return function.apply(x, self.weight, self.bias, True, self.allreduce, self.spread)
