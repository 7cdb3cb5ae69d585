"""Layers of tensor-parallel models as users write them: `F.linear` between autograd functions that reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HIDDEN = 32
_groups: list[Any] = []


def topology(stages: int, tensor: int) -> Any:
    """Of all ranks: `stages` x `tensor` x what is left for replicas. Makes the groups of the layers."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    world = torch.distributed.get_world_size()
    made = PipeModelDataParallelTopology(num_pp=stages, num_mp=tensor, num_dp=world // (stages * tensor))
    _groups.clear()
    for ranks in made.get_axis_comm_lists("model"):
        group = torch.distributed.new_group(ranks)
        if torch.distributed.get_rank() in ranks:
            _groups.append(group)
    return made


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous().clone()
        torch.distributed.all_reduce(grad, group=_groups[0])
        return grad


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous().clone()
        torch.distributed.all_reduce(x, group=_groups[0])
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def _parallel(*shape: int) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(*shape) / 8)
    weight.model_parallel = True  # how DeepSpeed knows what to count once in norms
    return weight


class Column(nn.Module):
    """(..., HIDDEN) -> (..., outputs / ranks)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        outputs //= torch.distributed.get_world_size(_groups[0])
        self.weight, self.bias = _parallel(outputs, HIDDEN), _parallel(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(_Copy.apply(x), self.weight, self.bias)


class Row(nn.Module):
    """(..., inputs / ranks) -> (..., HIDDEN)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = _parallel(HIDDEN, inputs // torch.distributed.get_world_size(_groups[0]))
        self.bias = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Reduce.apply(nn.functional.linear(x, self.weight)) + self.bias


class TensorBlock(nn.Module):
    """Attention and a perceptron, both spread over the tensor group; dropout that all of its ranks draw alike."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = Column(3 * HIDDEN), Row(HIDDEN)
        self.up, self.down = Column(2 * HIDDEN), Row(2 * HIDDEN)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.drop(self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norms[1](x)))))
