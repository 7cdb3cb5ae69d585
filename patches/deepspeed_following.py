"""DeepSpeed runs a schedule that is not Adaptra's (users' own, DualPipeV): its transfers go through the session's channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe import schedule as stock

from adaptra_plugin.bindings import replaced
from adaptra_plugin.runtime.following import Following
from adaptra_plugin.schedule.actions import Kind

TIMED = {"ForwardPass": Kind.FORWARD, "BackwardPass": Kind.FULL_BACKWARD}
"""By name: users have instructions of their own that are called so."""
COMMIT = getattr(stock, "CommitP2P", None)
"""DualPipeV's instruction that runs the transfers which have been queued; older versions have none."""


def instructions(
    iteration: Following, of_the_host: Mapping[type, Callable[..., None]]
) -> dict[type, Callable[..., None]]:
    """The host's instructions with computations timed."""
    found = {
        kind: iteration.timed(TIMED[kind.__name__], function)
        for kind, function in of_the_host.items()
        if kind.__name__ in TIMED
    }
    if COMMIT is not None and COMMIT in of_the_host:
        found[COMMIT] = lambda engine: _commit(iteration, engine)
    return {**of_the_host, **found}


@contextmanager
def delegated(iteration: Following) -> Iterator[None]:
    """Inside, DeepSpeed's transfers between neighbours are the iteration's."""
    before = p2p.send, p2p.recv

    def send(tensor: torch.Tensor, dest_stage: int, async_op: bool = False) -> Any:
        if iteration.is_neighbour(dest_stage):
            return iteration.send_to(dest_stage, tensor)
        return before[0](tensor, dest_stage, async_op)

    def recv(tensor: torch.Tensor, src_stage: int, async_op: bool = False) -> Any:
        if iteration.is_neighbour(src_stage):
            return iteration.receive_from(src_stage, tensor)
        return before[1](tensor, src_stage, async_op)

    with replaced(p2p, "send", send), replaced(p2p, "recv", recv):
        yield


def _commit(iteration: Following, engine: Any) -> None:
    """Transfers that DualPipeV has queued, all at once: receives are posted before sends may block."""
    queued, engine._p2p_ops = engine._p2p_ops, []
    place = iteration.topology.place
    expected = [(iteration.expect(place(it.peer)[1]), it.tensor) for it in queued if it.op == "irecv"]
    for it in queued:
        if it.op == "isend":
            iteration.send_to(place(it.peer)[1], it.tensor)
    iteration.fill(expected)
