"""Training runs of real Megatron-core layers on forked CPU ranks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import adaptra_plugin
from adaptra_plugin.launch.megatron_cpu import install
from adaptra_plugin.launch.megatron_gpt import VOCABULARY, GptJob, GptTrainer
from tests.forked import import_what_optimizers_import, run_ranks, spare_the_ranks
from tests.switching import CAUSED, FIRST, plans_follow

import_what_optimizers_import()
QUIET = {"report": {"directory": None, "wandb": "off"}, "transport": {"bind": "127.0.0.1"}}
STEPS = (8, 8, 6, 8)
"""Microbatches of each iteration."""
SLOW = {"simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 10, "from_iteration": 3}]}}
"""A link that turns slow in the middle."""


def microbatches(job: GptJob, count: int, seed: int, lengths: tuple[int, ...]) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    for _, length in zip(range(count), itertools.cycle(lengths or (job.sequence,)), strict=False):
        text = torch.randint(0, VOCABULARY, (job.micro_batch, length + 1), generator=generator)
        yield text[:, :-1].contiguous(), text[:, 1:].contiguous()


def run(
    rank: int,
    job: GptJob,
    block: dict[str, Any] | None,
    steps: tuple[int, ...],
    *,
    evaluate_after: tuple[int, ...] = (),
    evaluation: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    lengths: tuple[int, ...] = (),
    during: Callable[[GptTrainer, int], None] | None = None,
    plans_after: tuple[int, ...] = (),
) -> dict[str, Any]:
    """One rank. `block`: Adaptra's configuration; None: stock. `plans_after`: iterations that a new plan comes from."""
    install()
    wait = plans_follow(block, plans_after) if block and plans_after else None
    dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    trainer = GptTrainer(job)
    if block is not None:
        adaptra_plugin.activate({**QUIET, **block})
    from megatron.core import parallel_state

    replica = parallel_state.get_data_parallel_rank()
    losses, norms, skipped, evaluations = [], [], [], []
    for step, count in enumerate(steps):
        torch.manual_seed(1000 + step)
        seed = 100 * step + replica

        def data(count: int = count, seed: int = seed) -> Iterator[Any]:
            return microbatches(job, count, seed, lengths)

        found = trainer.step(data, count, **(arguments or {}))
        losses.append(found["losses"])
        norms.append(found["norm"])
        skipped.append(found["skipped"])
        if step in evaluate_after:
            evaluations.append(trainer.evaluate(data, count, **(evaluation or {})))
        for act in (wait, during):
            if act is not None:
                act(trainer, step)
    result = {
        "losses": losses,
        "norms": norms,
        "skipped": skipped,
        "evaluations": evaluations,
        "parameters": trainer.hash_parameters(),
        "buffers": trainer.hash_buffers(),
        "logged": logged(),
        "status": adaptra_plugin.status(),
    }
    adaptra_plugin.deactivate()
    dist.barrier()
    dist.destroy_process_group()
    return result


def logged() -> dict[str, Any]:
    """What Megatron logs of the losses of routers (by layer) and of further tokens, summed up since training has begun."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    found = {**get_moe_layer_wise_logging_tracker(), "further tokens": MTPLossLoggingHelper.tracker}
    return {name: entry["values"].tolist() for name, entry in found.items() if "values" in entry}


def both(
    job: GptJob, world: int, block: dict[str, Any] | None = None, steps: tuple[int, ...] = STEPS, **more: Any
) -> Any:
    """(stock, ours): what each rank returns."""
    stock = run_ranks(run, world, job, None, steps, **more)
    ours = run_ranks(run, world, job, block or {}, steps, **more)
    return stock, ours


def assert_same(stock: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    """To the bit on every rank: losses, gradient norms, evaluations, parameters, buffers, and
    what Megatron logs of auxiliary losses."""
    for rank, (a, b) in enumerate(zip(stock, ours, strict=True)):
        assert b["status"]["active"] and not a["status"]["active"], rank
        for name in ("losses", "norms", "skipped", "evaluations", "parameters", "buffers", "logged"):
            assert a[name] == b[name], f"rank {rank}: {name}"
    last = [losses for result in stock for losses in result["losses"] if losses]
    assert last, "some rank has losses"


def assert_same_while_a_link_turns_slow(job: GptJob, world: int, microbatches: int = 8, iterations: int = 9) -> None:
    """Plans change twice in the middle: they come from measured times at first, then for the slow link."""
    block = {
        **CAUSED,
        "simulate": {
            "links": [{"src": 0, "dst": 1, "latency_ms": 25, "from_iteration": 5}],
            "compute": {"forward_ms": 2, "backward_input_ms": 2, "backward_weight_ms": 1},
        },
    }
    stock, ours = both(job, world, block, steps=(microbatches,) * iterations, plans_after=(FIRST, 5))
    assert_same(stock, ours)
    versions = {result["status"]["sessions"][0]["plan_version"] for result in ours}
    assert len(versions) == 1 and versions.pop() >= 2


def more_in_matrix(cases: Iterable[Any], *more: Any) -> list[Any]:
    """Parameters of a test, of which `more` run with the matrix only."""
    marks = {True: [pytest.mark.matrix], False: []}
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks[case in more]) for case in cases]


def loaded() -> None:
    """In the parent, before ranks are forked: everything that a rank imports, and the planner's compiled parts."""
    import adaptra_plugin.patches.megatron  # noqa: F401
    from adaptra_plugin.schedule.prepare import prepare

    prepare()
    spare_the_ranks()
