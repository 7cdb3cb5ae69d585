"""Differential fuzzing of single layers: split against stock, in one process, every bit compared.

    python -m benchmarks.fuzz_layers --cases 1000000 --seed 1

A case is one forward and backward of a layer, with all that is drawn for it: shape (1-D to 5-D, empty dimensions too), memory
layout (permuted, sliced, strided, expanded, offset), what is around it (activation checkpoints with and without reentrance,
autocast, hooks on saved tensors), operations in place on the output, layout of the output's gradient. A layer has a dtype, a
layout of its weight, perhaps a bias and hooks, and its weight may be used twice or elsewhere; it goes through several
iterations of cases, as in stock and split. Outputs, gradients with their strides and what hooks have seen must be equal to
the bit. The number that is printed reproduces a layer: `--kind N`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from adaptra_plugin.runtime.split import SplitLinears
from adaptra_plugin.runtime.weight_grad_store import WeightGradStore

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 16, 33)
USES = ("once", "once", "once", "once", "twice", "chained", "embedding", "product", "sliced", "penalty")
AROUND = (*["plain"] * 12, "checkpoint", "reentrant", "autocast", "offload")
AFTER = ("nothing", "nothing", "relu_", "add_", "view", "transpose", "slice")
GRADIENTS = ("dense", "dense", "expanded", "permuted", "sliced", "sum")
LAYOUTS = ("contiguous", "permuted", "sliced", "strided", "expanded", "offset", "flipped")
ITERATIONS = (2, 8, 8, 8, 8, 8)
"""Microbatches of each iteration; in the first one weights are observed."""


@dataclass(frozen=True)
class Case:
    """One forward and backward of a layer."""

    leading: tuple[int, ...]
    layout: str
    around: str
    after: str
    gradient: str
    needs_grad: bool

    @classmethod
    def draw(cls, choose: random.Random) -> Case:
        leading = tuple(choose.choice(SIZES) for _ in range(choose.choice((0, 1, 1, 2, 2, 2, 3, 3, 4))))
        if leading and choose.random() < 0.03:
            at = choose.randrange(len(leading))
            leading = (*leading[:at], 0, *leading[at + 1 :])
        return cls(
            leading,
            choose.choice(LAYOUTS),
            choose.choice(AROUND),
            choose.choice(AFTER),
            choose.choice(GRADIENTS),
            choose.random() < 0.8,
        )


@dataclass(frozen=True)
class Kind:
    """A layer, and the cases it goes through. `number` gives everything else."""

    number: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    bias: bool
    weight: str
    use: str
    hooks: bool

    @classmethod
    def draw(cls, number: int) -> Kind:
        choose = random.Random(number)
        inputs, outputs = (0 if choose.random() < 0.01 else choose.choice(SIZES) for _ in range(2))
        weight = choose.choice(("contiguous", "contiguous", "transposed", "strided"))
        use = choose.choice(USES)
        return cls(
            number,
            inputs,
            inputs if use == "chained" else outputs,
            choose.choice(DTYPES),
            choose.random() < 0.5,
            weight,
            use,
            choose.random() < 0.5,
        )


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, choose: random.Random) -> Tensor:
    """Random numbers of a shape, in a layout."""
    count = len(shape)
    if layout == "permuted" and count > 1:
        order = choose.sample(range(count), count)
        made = torch.randn([shape[i] for i in order], dtype=dtype)
        return made.permute([order.index(i) for i in range(count)])
    if layout == "sliced":
        at = choose.randrange(count)
        made = torch.randn([n + 2 if i == at else n for i, n in enumerate(shape)], dtype=dtype)
        return made.narrow(at, 1, shape[at])
    if layout == "strided":
        at = choose.randrange(count)
        made = torch.randn([2 * n if i == at else n for i, n in enumerate(shape)], dtype=dtype)
        return made[tuple(slice(None, None, 2) if i == at else slice(None) for i in range(count))]
    if layout == "expanded":
        at = choose.randrange(count)
        return torch.randn([1 if i == at else n for i, n in enumerate(shape)], dtype=dtype).expand(shape)
    if layout == "offset":
        size = int(torch.Size(shape).numel())
        return torch.randn(size + 3, dtype=dtype)[3:].view(shape)
    if layout == "flipped" and count > 1:
        return torch.randn(shape[::-1], dtype=dtype).permute(list(range(count))[::-1])
    return torch.randn(shape, dtype=dtype)


class Layer(nn.Module):
    """The layer of a kind, with whatever else uses its weight."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.use = kind.use
        values = torch.randn(kind.outputs, kind.inputs, dtype=kind.dtype)
        if kind.weight == "transposed":
            values = values.t().contiguous().t()
        elif kind.weight == "strided":
            values = torch.randn(kind.outputs, 2 * kind.inputs, dtype=kind.dtype)[:, ::2]
        self.weight = nn.Parameter(values)
        self.bias = nn.Parameter(torch.randn(kind.outputs, dtype=kind.dtype)) if kind.bias else None

    def forward(self, x: Tensor) -> Tensor:
        use = self.use
        y = functional.linear(x, self.weight, self.bias)
        if use == "twice":
            y = y + functional.linear(x * 0.5, self.weight)
        elif use == "chained":
            y = functional.linear(torch.tanh(y), self.weight, self.bias)
        elif use == "embedding":
            y = y + functional.embedding(torch.arange(self.weight.shape[0]), self.weight).sum()
        elif use == "product":
            y = y + torch.matmul(x, self.weight.t())
        elif use == "sliced":
            y = y + functional.linear(x, self.weight[:1]).sum()
        elif use == "penalty":
            y = y + self.weight.square().sum()
        return y


def wrapped(case: Case) -> Callable[[Layer, Tensor], Tensor]:
    if case.around == "checkpoint":
        return lambda layer, x: checkpoint(layer, x, use_reentrant=False)
    if case.around == "reentrant":
        return lambda layer, x: checkpoint(layer, x, use_reentrant=True)
    if case.around == "autocast":

        def cast(layer: Layer, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return layer(x)

        return cast
    if case.around == "offload":

        def offload(layer: Layer, x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.contiguous()):
                return layer(x)

        return offload
    return lambda layer, x: layer(x)


def afterwards(case: Case, y: Tensor) -> Tensor:
    if case.after == "relu_":
        return y.relu_()
    if case.after == "add_":
        return y.add_(1.0)
    if case.after == "view":
        return y.reshape(-1)
    if case.after == "transpose":
        return y.transpose(0, -1)
    if case.after == "slice":
        return y[..., :1]
    return y


def towards(case: Case, y: Tensor, choose: random.Random) -> Tensor | None:
    """The gradient of y; None: y is summed."""
    if case.gradient == "sum" or y.dim() == 0:
        return None
    layout = {"dense": "contiguous"}.get(case.gradient, case.gradient)
    return laid_out(tuple(y.shape), layout, y.dtype, choose)


class Run:
    """A kind of layer, trained as in stock or split; `seen` is all that can be seen of it."""

    def __init__(self, kind: Kind, *, split: bool) -> None:
        torch.manual_seed(kind.number % 2**31)
        self.kind, self.split = kind, split
        self.layer = Layer(kind)
        self.seen: list[tuple[Any, Any]] = []
        self.hooked: list[Tensor] = []  # apart: W runs later than the backward it belongs to
        if kind.hooks:
            hooked = self.hooked  # not self: through the hooks of a tensor the collector does not see a circle
            self.layer.weight.register_post_accumulate_grad_hook(lambda p: hooked.append(p.grad.clone()))
            self.layer.weight.register_hook(lambda grad: hooked.append(grad.clone()))
        self.queue = WeightGradStore()
        self.layers = SplitLinears(self.layer, self.queue)

    def recording(self) -> contextlib.AbstractContextManager[None]:
        return self.layers.recording() if self.split else contextlib.nullcontext()

    def train(self) -> Run:
        choose = random.Random(self.kind.number)
        for microbatches in ITERATIONS:
            cases = [Case.draw(choose) for _ in range(microbatches)]
            for m, case in enumerate(cases):
                self.one(m, case, choose)
                if m % 3 == 2:
                    self.drain()
            self.drain()
            self.layers.finalize()
            for name, parameter in self.layer.named_parameters():
                grad = parameter.grad
                self.seen += [(name, grad), (name, None if grad is None else grad.stride())]
        self.layers.remove()
        return self

    def drain(self) -> None:
        for m in self.queue.microbatches:
            self.queue.run(m)

    def one(self, m: int, case: Case, choose: random.Random) -> None:
        x = laid_out((*case.leading, self.kind.inputs), case.layout, self.kind.dtype, choose)
        needs_grad = case.needs_grad or case.around == "reentrant"
        x = x.detach().requires_grad_(needs_grad)
        try:
            with self.recording():
                y = afterwards(case, wrapped(case)(self.layer, x.view_as(x) if needs_grad else x))
            gradient = towards(case, y, choose)
            with self.recording(), self.queue.collect(m):
                (y.sum() if gradient is None else y).backward(gradient)
            self.seen += [(case, y.detach().clone()), (case, x.grad)]
        except (RuntimeError, IndexError) as error:  # what stock cannot do, nobody can
            self.seen += [(case, type(error).__name__)] * 2


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def _bits(tensor: Tensor) -> bytes:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def difference(kind: Kind) -> str | None:
    """What is another with a split backward; None: nothing."""
    stock, ours = (Run(kind, split=split).train() for split in (False, True))
    if len(stock.hooked) != len(ours.hooked):
        return f"hooks have fired {len(stock.hooked)} times in stock, {len(ours.hooked)} in ours"
    hooked = (("hook", value) for value in stock.hooked), (("hook", value) for value in ours.hooked)
    for theirs, own in zip((*stock.seen, *hooked[0]), (*ours.seen, *hooked[1]), strict=True):
        if not same(theirs[1], own[1]):
            return f"{theirs[0]}: {theirs[1]!s:.300} in stock, {own[1]!s:.300} in ours"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1, help="number of the first kind of layer")
    parser.add_argument("--kind", type=int, help="runs the cases of this one only")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("adaptra").setLevel(logging.ERROR)
    each = sum(ITERATIONS)
    last = options.seed + (1 if options.kind is not None else -(-options.cases // each))
    numbers = range(options.seed, last) if options.kind is None else [options.kind]
    started, bad, told = time.monotonic(), 0, time.monotonic()
    for done, number in enumerate(numbers, start=1):
        kind = Kind.draw(number)
        if (what := difference(kind)) is not None:
            bad += 1
            print(f"{kind}\n  {what}", flush=True)
        if time.monotonic() > told + 30:
            told = time.monotonic()
            print(f"{done * each} cases, {bad} differ, {done * each / (told - started):.0f} a second", file=sys.stderr)
    print(f"{len(numbers) * each} cases, {bad} differ, in {time.monotonic() - started:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
