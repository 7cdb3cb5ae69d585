"""Text that is on every machine: the source of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

MAX_BYTES = 4 << 20


def read_corpus(max_bytes: int = MAX_BYTES) -> Tensor:
    """The modules of the standard library in alphabetical order, cut at `max_bytes`; uint8, shape (bytes,)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    size = 0
    for path in sorted(root.glob("*.py")) + sorted(root.glob("asyncio/*.py")) + sorted(root.glob("email/*.py")):
        data = path.read_bytes()
        parts.append(data)
        size += len(data)
        if size >= max_bytes:
            break
    text = b"".join(parts)[:max_bytes]
    if len(text) < 100_000:
        raise FileNotFoundError(f"only {len(text)} bytes of Python source in {root}: is the standard library zipped?")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Windows:
    """Endless microbatches of byte windows and their next bytes, the same for the same seed.

    Each item is (inputs, labels), both int64 of shape (micro_batch, sequence).
    """

    def __init__(self, corpus: Tensor, micro_batch: int, sequence: int, seed: int) -> None:
        self._corpus = corpus
        self._shape = (micro_batch, sequence)
        # an own generator: the model's dropout draws from the global one
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Windows:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        micro_batch, sequence = self._shape
        starts = torch.randint(0, len(self._corpus) - sequence - 1, (micro_batch,), generator=self._generator)
        rows = torch.stack([self._corpus[start : start + sequence + 1] for start in starts.tolist()]).long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
