"""Tensors as bytes: which dtypes travel, how a message is laid out, and the copies into and out of a ring."""

from __future__ import annotations

import bisect
import functools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.memory import Memory
from adaptra_plugin.transport.slabs import SLAB_FROM, Slabs

ALIGNMENT = 64
"""Every block of a message starts at a multiple of this: whole cache lines, and any dtype may be viewed in place."""
MAX_TENSORS = 4096
MAX_DIMENSIONS = 64
MAX_META_BYTES = 1 << 20
"""Longest description of the tensors of one message."""

# The numbers travel in messages: append, never renumber. Names that this torch does not have are left out.
_DTYPE_NAMES = (
    (1, "float32"),
    (2, "float64"),
    (3, "float16"),
    (4, "bfloat16"),
    (5, "uint8"),
    (6, "int8"),
    (7, "int16"),
    (8, "int32"),
    (9, "int64"),
    (10, "bool"),
    (11, "complex64"),
    (12, "complex128"),
    (13, "float8_e4m3fn"),
    (14, "float8_e5m2"),
    (15, "float8_e4m3fnuz"),
    (16, "float8_e5m2fnuz"),
    (17, "float8_e8m0fnu"),
    (18, "uint16"),
    (19, "uint32"),
    (20, "uint64"),
    (21, "complex32"),
)
_DTYPES: dict[int, torch.dtype] = {code: getattr(torch, name) for code, name in _DTYPE_NAMES if hasattr(torch, name)}
_CODES: dict[torch.dtype, int] = {dtype: code for code, dtype in _DTYPES.items()}

_SHORT_META = 1024  # bytes; descriptions that are remembered
_SPEC = struct.Struct("<BB6x")  # dtype, number of dimensions; the dimensions follow as u64


class BadLayout(ValueError):
    """The description of the tensors in a message makes no sense."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of a message; `start` counts from the beginning of the payload (bytes)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def describe(tensors: Sequence[torch.Tensor]) -> tuple[bytes, int]:
    """The description that travels in the message (padded), and the length of the payload (bytes).

    Raises:
        TransportError: for what cannot travel: sparse, quantized or meta tensors, unknown dtypes, too many tensors.
    """
    if len(tensors) > MAX_TENSORS:
        raise TransportError(f"{len(tensors)} tensors in one message: at most {MAX_TENSORS} are possible, pack them")
    parts = []
    payload = 0
    for index, tensor in enumerate(tensors):
        code = _CODES.get(tensor.dtype)
        if code is None or tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise TransportError(f"tensor {index} ({kind}) cannot be sent: make it a dense tensor of a plain dtype")
        parts.append(_spec(code, tensor.shape))
        payload += aligned(tensor.nbytes)
    meta = b"".join(parts)
    if aligned(len(meta)) > MAX_META_BYTES:
        raise TransportError(
            f"{len(tensors)} tensors need {len(meta)} bytes of description, more than {MAX_META_BYTES}: pack them"
        )
    return meta.ljust(aligned(len(meta)), b"\0"), payload


@functools.lru_cache(maxsize=256)  # a job sends few shapes
def _spec(code: int, shape: torch.Size) -> bytes:
    return _SPEC.pack(code, len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)


def understand(meta: bytes, count: int, payload: int) -> tuple[Spec, ...]:
    """The inverse of `describe`, for bytes that are not trusted.

    Raises:
        BadLayout: if they do not describe exactly `count` tensors in `payload` bytes.
    """
    return (_understood if len(meta) <= _SHORT_META else _understood.__wrapped__)(meta, count, payload)


@functools.lru_cache(maxsize=256)
def _understood(meta: bytes, count: int, payload: int) -> tuple[Spec, ...]:
    specs = []
    at = start = 0
    for index in range(count):
        if at + _SPEC.size > len(meta):
            raise BadLayout(f"description of tensor {index} is cut off")
        code, dimensions = _SPEC.unpack_from(meta, at)
        at += _SPEC.size
        dtype = _DTYPES.get(code)
        if dtype is None:
            raise BadLayout(f"tensor {index} has unknown dtype code {code}")
        if dimensions > MAX_DIMENSIONS or at + 8 * dimensions > len(meta):
            raise BadLayout(f"tensor {index} has {dimensions} dimensions, more than its description holds")
        shape = struct.unpack_from(f"<{dimensions}Q", meta, at)
        at += 8 * dimensions
        if math.prod(max(size, 1) for size in shape) >= 1 << 60:
            raise BadLayout(f"tensor {index} has the impossible shape {shape}")
        nbytes = math.prod(shape) * dtype.itemsize
        specs.append(Spec(dtype, shape, start, nbytes))
        start += aligned(nbytes)
    if start != payload or len(meta) != aligned(at):
        raise BadLayout(f"{count} tensors of {start} bytes are described, the message carries {payload}")
    return tuple(specs)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat uint8 view of the tensor's data; of a copy where the data is not contiguous, or lazily conjugated."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return flat(tensor)


class Stretch(Protocol):
    """Where the bytes of a tensor lie in the payload."""

    @property
    def start(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


def overlaps(tensors: Sequence[Stretch], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Which tensors have bytes between two places of the payload: (index, from, to) in the tensor (bytes)."""
    index = max(0, bisect.bisect_right(tensors, start, key=lambda tensor: tensor.start) - 1) if start else 0
    while index < len(tensors) and tensors[index].start < stop:
        tensor = tensors[index]
        first, last = max(start, tensor.start), min(stop, tensor.start + tensor.nbytes)
        if first < last:
            yield index, first - tensor.start, last - tensor.start
        index += 1


class Assembly:
    """Tensors of their own in host memory, filled from a ring part by part.

    Args:
        empty: makes each; None: plain memory.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        slabs: Slabs,
        empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
    ) -> None:
        self.specs = specs
        self.tensors = tuple(self._empty(spec, slabs, empty) for spec in specs)

    @staticmethod
    def _empty(
        spec: Spec, slabs: Slabs, empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None
    ) -> torch.Tensor:
        if empty is not None:
            return empty(spec.shape, spec.dtype)
        if spec.nbytes >= SLAB_FROM:
            return slabs.empty(spec.shape, spec.dtype)
        # the device is said because the caller may have changed torch's default device
        return torch.empty(spec.shape, dtype=spec.dtype, device="cpu")

    def fill(self, memory: Memory, position: int, at: int, nbytes: int) -> None:
        """Copies bytes `at` to `at + nbytes` of the payload, which lie at `position` of a ring."""
        for index, first, last in overlaps(self.specs, at, at + nbytes):
            spec, tensor = self.specs[index], self.tensors[index]
            if last - first < spec.nbytes:
                tensor = flat(tensor)[first:last]
            memory.copy_out(position + spec.start + first - at, tensor)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)
