"""Random numbers of a rank with several model chunks.

Forwards of its chunks take turns, and each draws from where the one before has left the generators. Plans let them take turns
in another order. So each forward starts from the states of the generators that it would find in the stock order. They can be
computed if every forward of a chunk draws as much: how much that is, is counted in the first iteration, which runs by the stock
schedule, and checked after each forward from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from adaptra_plugin.bindings import replaced
from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.patches.megatron_rules import DRAWING

logger = logging.getLogger("adaptra")
PHILOX = 16
"""Bytes of the state of a CUDA generator: seed and offset."""
BLOCK, LEFT = 624, slice(8, 12)
"""Numbers that the generator of a CPU (mt19937) makes at once, and the bytes of its state that say how many of them are left."""
MOST = 2_000_000
"""Numbers that a forward may draw on the CPU, where they have to be made to be counted."""
States = dict[str, Tensor]
REMEDY = 'set "adaptra": {"enabled": false}, or train with one model chunk a rank'


def draws(chunks: Sequence[nn.Module], config: Any) -> bool:
    """Whether a rank has several model chunks, and their forwards are known to draw random numbers."""
    layers = (layer for chunk in chunks for layer in chunk.modules())
    drawing = any(getattr(config, name, None) for name in DRAWING) or any(
        isinstance(layer, _DropoutNd) and layer.p > 0 for layer in layers
    )
    return len(chunks) > 1 and drawing


class _Uncountable(Exception):
    """Why plans must not run the forwards."""


class Draws:
    """How much each model chunk of a rank draws.

    Attributes:
        reasons: why that is not the same in each forward, or not known.
    """

    def __init__(self) -> None:
        self._counts: dict[int, dict[str, int]] = {}
        self.reasons: list[str] = []

    @contextmanager
    def counting(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        """Forwards of the stock schedule run inside."""
        logger.info(
            "the first iteration runs by the stock schedule: what each of %d model chunks draws is counted", len(chunks)
        )
        stock: Any = schedules.forward_step
        found: dict[int, dict[str, int]] = {}

        @wraps(stock)
        def forward_step(function: Any, iterator: Any, model: Any, *more: Any, **named: Any) -> Any:
            before = _read()
            result = stock(function, iterator, model, *more, **named)
            number = next(index for index, chunk in enumerate(chunks) if chunk is model)
            try:
                count = _count(before, _read())
            except _Uncountable as error:
                self.reasons = [str(error)]
                return result
            if found.setdefault(number, count) != count:
                self.reasons = [
                    f"forwards of model chunk {number} draw different amounts of random numbers ({found[number]}, {count}), so "
                    "the numbers that each of them gets would depend on the plan"
                ]
            return result

        with replaced(schedules, "forward_step", forward_step):
            yield
        self._counts = found

    def iteration(self, config: Any, microbatches: int) -> Turns:
        """What the forwards of an iteration begin with, in the order of the stock schedule."""
        group = config.microbatch_group_size_per_vp_stage
        return Turns(self._counts, schedules.get_schedule_table(microbatches, len(self._counts), group))


class Turns:
    """The states of the generators before each forward of an iteration.

    Args:
        counts: what a forward draws from each generator, by model chunk.
        order: of the stock schedule, (microbatch, chunk).
    """

    def __init__(self, counts: Mapping[int, Mapping[str, int]], order: Sequence[tuple[int, int]]) -> None:
        self._starts: dict[tuple[int, int], tuple[States, States]] = {}
        states = _read()
        for microbatch, chunk in order:
            count = counts[chunk]
            after = {name: _advanced(state, count.get(name, 0)) for name, state in states.items()}
            self._starts[chunk, microbatch] = states, after
            states = after
        self._end = states

    @contextmanager
    def forward(self, chunk: int, microbatch: int) -> Iterator[None]:
        """One forward runs inside.

        Raises:
            UnsupportedError: it has drawn another amount than the others of its chunk.
        """
        before, after = self._starts.pop((chunk, microbatch))
        _write(before)
        yield
        found = _read()
        if other := [name for name in after if not torch.equal(after[name], found[name])]:
            raise UnsupportedError(
                f"the forward of microbatch {microbatch} has drawn another amount of random numbers than those of model chunk "
                f"{chunk} did in the first iteration ({', '.join(other)}), so what others get would depend on the plan: {REMEDY}"
            )

    def end(self) -> None:
        """All forwards have run: the generators are left as the stock order leaves them."""
        _write(self._end)


def _read() -> States:
    states = {"CPU": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["CUDA"] = torch.cuda.get_rng_state()
    tracked = random.get_cuda_rng_tracker().get_states()
    return states | {f"Megatron's {name}": state for name, state in tracked.items()}


def _write(states: States) -> None:
    torch.set_rng_state(states["CPU"])
    if "CUDA" in states:
        torch.cuda.set_rng_state(states["CUDA"])
    tracker = random.get_cuda_rng_tracker()
    tracker.set_states({name: states[f"Megatron's {name}"] for name in tracker.get_states()})


def _count(before: States, after: States) -> dict[str, int]:
    """How much has been drawn between two states, from generators of which anything has been. Raises _Uncountable."""
    found = {}
    for name, state in before.items():
        if not isinstance(state, Tensor):
            raise _Uncountable(f"{name} is a {type(state).__name__} whose draws cannot be counted")
        if torch.equal(state, after[name]):
            continue
        count = (_philox_count if state.numel() == PHILOX else _twister_count)(state, after[name])
        if count is None:
            raise _Uncountable(
                f"it could not be counted how much a forward draws from the generator {name} (more than {MOST} numbers, or it has "
                "been seeded anew)"
            )
        found[name] = count
    return found


def _philox_count(before: Tensor, after: Tensor) -> int | None:
    (seed, start), (other, end) = before.view(torch.int64).tolist(), after.view(torch.int64).tolist()
    return end - start if seed == other and end > start else None


def _twister_count(before: Tensor, after: Tensor) -> int | None:
    generator = torch.Generator()
    generator.set_state(before)
    # what is left of a block of numbers tells how much has been drawn but for whole blocks
    left = [int(state[LEFT].view(torch.int32)) for state in (before, after)]
    count = step = (left[0] - left[1]) % BLOCK or BLOCK
    while count <= MOST:
        _twist(generator, step)
        if torch.equal(generator.get_state(), after):
            return count
        count, step = count + BLOCK, BLOCK
    return None


def _advanced(state: Tensor, count: int) -> Tensor:
    """The state of a generator after so many draws."""
    if not count:
        return state
    if state.numel() == PHILOX:
        words = state.view(torch.int64).clone()
        words[1] += count
        return words.view(torch.uint8)
    generator = torch.Generator()
    generator.set_state(state)
    _twist(generator, count)
    return generator.get_state()


def _twist(generator: torch.Generator, count: int) -> None:
    torch.empty(count, dtype=torch.int32).random_(generator=generator)  # one number of the generator each
