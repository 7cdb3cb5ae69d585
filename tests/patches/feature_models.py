"""Layers of jobs that have more than dense blocks: experts, adapters, sparse gradients, frozen stages."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tests.patches.models import VOCABULARY, Block, Embed, Head
from tests.patches.tensor_models import HIDDEN


def pipeline(*between: Any, first: Any = Embed, last: Any = Head) -> Any:
    """What `models.train` takes as `kind`: classes of layers, with arguments if they are partial ones."""
    from deepspeed.pipe import LayerSpec

    def spec(layer: Any) -> Any:
        return LayerSpec(layer.func, *layer.args, **layer.keywords) if isinstance(layer, partial) else LayerSpec(layer)

    return lambda stages: [spec(layer) for layer in (first, *between, last)]


BLOCKS = pipeline(Block, Block, Block, Block)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class ExpertBlock(nn.Module):
    """DeepSpeed's mixture of four experts; `counted`: hands on its loss too, as a second tensor."""

    def __init__(self, ranks: int, counted: bool = False, **kwargs: Any) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.experts = MoE(HIDDEN, Expert(), num_experts=4, ep_size=ranks, **kwargs)
        self.counted = counted

    def forward(self, value: Any) -> Any:
        x, before = value if isinstance(value, tuple) else (value, 0.0)
        y, loss, _ = self.experts(self.norm(x))
        return (x + y, (before + loss).reshape(1)) if self.counted else x + y


class CountingHead(Head):
    def forward(self, value: Any) -> Any:
        x, loss = value
        return super().forward(x), loss


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        self.down, self.up = nn.Linear(HIDDEN, 4, bias=False), nn.Linear(4, HIDDEN, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.base(x) + 2.0 * self.up(self.down(self.drop(x))))


class SparseEmbed(nn.Module):
    """Its weight has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, HIDDEN, sparse=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.word(tokens)


class SparseDescent(torch.optim.Optimizer):
    """Takes sparse gradients beside dense ones."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])


class FrozenEmbed(Embed):
    """Made to require gradients at its output, as fine-tuning with frozen embeddings does."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens).requires_grad_()


def frozen(stage: int) -> Any:
    """What `models.train` takes as `adapt`: one stage has nothing to train."""

    def adapt(model: Any) -> None:
        if model.stage_id == stage:
            model.requires_grad_(False)

    return adapt


class Edges(nn.Module):
    """Hands on a number (of no dimension) and an empty tensor beside the activations."""

    def __init__(self, first: bool = False, last: bool = False) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, value: Any) -> Any:
        if self.first:
            x = nn.functional.one_hot(value % HIDDEN, HIDDEN).to(self.linear.weight.dtype)
            number, empty = self.linear.bias.mean(), x[:, :0] * self.linear.bias
        else:
            x, number, empty = value
        x = torch.tanh(self.linear(x))
        number, empty = number + x.mean(), empty * 2
        return x + number + empty.sum() if self.last else (x, number, empty)
