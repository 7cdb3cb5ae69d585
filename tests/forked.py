"""Runs functions on several ranks, forked from a parent that has imported everything: seconds instead of minutes."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.launch.ports import free_port


@dataclass
class Outcome:
    """How a rank ended: its return value, or the text of its error, and its exit code (negative: signal)."""

    rank: int
    value: Any = None
    error: str | None = None
    exitcode: int | None = None
    seconds: float = 0.0


def import_what_optimizers_import() -> None:
    """In the parent: the first optimizer of a process imports 800 modules, which takes every forked rank some seconds."""
    import torch._dynamo  # noqa: F401


def spare_the_ranks() -> None:
    """In the parent, when all is imported, what would take every rank seconds.

    Objects of the parent are no work for a rank's garbage collector. Without a GPU torch keeps the text of the whole stack for
    every `manual_seed` and kind of device, in case that one is used later; DeepSpeed seeds before every layer.
    """
    import torch

    if not torch.cuda.is_available():
        torch.random._manual_seed_impl = lambda seed: torch.default_generator.manual_seed(int(seed))
    gc.collect()
    gc.freeze()


def import_deepspeed() -> None:
    """In the parent, before ranks are forked: what every rank imports, and the planner's compiled parts.

    Leaves out DeepSpeed's compiled shared-memory all-reduce, which takes half a minute to build.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import deepspeed

    with contextlib.suppress(ImportError):  # older versions have none
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - every BF16 optimizer does, with torch.compile

    import adaptra_plugin.patches.deepspeed  # noqa: F401
    from adaptra_plugin.schedule.prepare import prepare

    import_what_optimizers_import()
    prepare()
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    spare_the_ranks()


def start_ranks(function: Callable[..., Any], world: int, *args: Any, **kwargs: Any) -> list[Any]:
    """Forks `world` ranks that run `function(rank, *args, **kwargs)`; pass the result to `finish_ranks`."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    started = []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(sender, function, rank, world, port, args, kwargs), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver, time.monotonic()))
    return started


def finish_ranks(started: list[Any], timeout: float = 100.0) -> list[Outcome]:
    """Waits for all ranks; kills those that outlast the timeout."""
    outcomes = []
    until = time.monotonic() + timeout
    for rank, (process, receiver, begun) in enumerate(started):
        outcome = Outcome(rank)
        if receiver.poll(max(0.0, until - time.monotonic())):
            try:
                outcome.value, outcome.error = receiver.recv()
            except EOFError:
                outcome.error = "ended without a result"
        else:
            outcome.error = f"no result within {timeout} s"
        process.join(max(0.1, min(20.0, until - time.monotonic())))
        if process.is_alive():
            process.kill()
            process.join()
        outcome.exitcode = process.exitcode
        outcome.seconds = time.monotonic() - begun
        outcomes.append(outcome)
    return outcomes


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 100.0, **kwargs: Any) -> list[Any]:
    """Return values of all ranks. Fails with the first rank's traceback if one raises."""
    outcomes = finish_ranks(start_ranks(function, world, *args, **kwargs), timeout)
    errors = [f"rank {outcome.rank}: {outcome.error}" for outcome in outcomes if outcome.error is not None]
    assert not errors, "\n".join(errors)
    return [outcome.value for outcome in outcomes]


def _main(sender: Any, function: Callable[..., Any], rank: int, world: int, port: int, args: Any, kwargs: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        sender.send((function(rank, *args, **kwargs), None))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
        chain = "".join(traceback.format_exception(error))
        sender.send((None, f"{type(error).__name__}: {error}\n{chain}"))
        code = 1
    import adaptra_plugin

    adaptra_plugin.deactivate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # pytest's own exit handlers are not for the ranks
