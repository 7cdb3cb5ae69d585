"""A small byte-level GPT as a list of pipeline layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.utils import set_random_seed
from torch import Tensor, nn

VOCABULARY = 256


@dataclass(frozen=True)
class GptSize:
    """Width, heads, blocks, sequence length (bytes) and dropout of the model."""

    width: int = 128
    heads: int = 8
    blocks: int = 4
    sequence: int = 32
    dropout: float = 0.1


class Embedding(nn.Module):
    """Bytes and positions: int64 (batch, sequence) -> float (batch, sequence, width)."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, size.width)
        self.position = nn.Embedding(size.sequence, size.width)
        self.drop = nn.Dropout(size.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.drop(self.byte(tokens) + self.position(places))


class Block(nn.Module):
    """Pre-norm transformer block: (batch, sequence, width) -> the same."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_attention = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.norm_mlp = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)
        self.drop = nn.Dropout(size.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, sequence, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, sequence, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_mlp(x)))))


class Head(nn.Module):
    """Logits of the next byte: (batch, sequence, width) -> (batch, sequence, 256)."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.width)
        self.logits = nn.Linear(size.width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.norm(x))


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), labels.reshape(-1))


def _seed(seed: int) -> None:
    # DeepSpeed passes a numpy integer with this partition method, which Python's own generator refuses
    set_random_seed(int(seed))


def build_pipeline(size: GptSize, stages: int, seed: int) -> PipelineModule:
    """The GPT as a DeepSpeed `PipelineModule`; stages of about equal numbers of parameters."""
    layers = [LayerSpec(Embedding, size), *(LayerSpec(Block, size) for _ in range(size.blocks)), LayerSpec(Head, size)]
    return PipelineModule(
        layers=layers,
        num_stages=stages,
        loss_fn=loss_fn,
        partition_method="parameters",
        seed_layers=True,
        base_seed=seed,
        seed_fn=_seed,
    )
