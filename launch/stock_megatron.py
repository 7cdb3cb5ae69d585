"""The slow links and paced compute of `adaptra.simulate`, for runs of Megatron's stock schedules: what benchmarks compare with.

Nothing of Adaptra's runtime takes part. What goes over a slow link sets out after the delay; whether the sender waits for that
is Megatron's own choice: it does without virtual stages, and does not with `overlap_p2p_comm`, where transfers overlap.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel import p2p_communication, schedules

from adaptra_plugin.config import SimulateConfig
from adaptra_plugin.errors import TransferTimeout
from adaptra_plugin.runtime.compute_throttle import ComputeThrottle
from adaptra_plugin.schedule.actions import Kind

DEADLINE_S = 120.0


class _Later:
    """A send that has not set out yet, as a request."""

    def __init__(self, due: float, tensor: Any, destination: int, group: Any) -> None:
        self.due, self.tensor, self.destination, self.group = due, tensor, destination, group
        self.sent = threading.Event()

    def wait(self) -> None:
        if not self.sent.wait(DEADLINE_S):
            raise TransferTimeout(f"rank {self.destination} has not taken a transfer within {DEADLINE_S:.0f} s")


class MegatronSimulation:
    """Slow links and paced compute of the stock schedules in this process."""

    def __init__(self, config: SimulateConfig) -> None:
        self._links = config.links
        self._iteration = 0
        self._lines: dict[int, queue.SimpleQueue[_Later]] = {}
        self._stock: Callable[..., dict[str, Any]] = p2p_communication._p2p_ops
        p2p_communication._p2p_ops = self._p2p_ops
        p2p_communication._batched_p2p_ops = lambda **arguments: list(self._p2p_ops(**arguments).values())
        throttle = ComputeThrottle(config.compute)
        schedules.forward_step = _paced(schedules.forward_step, throttle, Kind.FORWARD)
        schedules.backward_step = _paced(schedules.backward_step, throttle, Kind.FULL_BACKWARD)

    def set_iteration(self, iteration: int) -> None:
        self._iteration = iteration

    def _p2p_ops(self, *, tensor_send_prev: Any, tensor_send_next: Any, group: Any, **rest: Any) -> dict[str, Any]:
        here, size = group.rank(), group.size()
        ways = {
            "send_prev": (tensor_send_prev, (here - 1) % size, rest["prev_pipeline_rank"]),
            "send_next": (tensor_send_next, (here + 1) % size, rest["next_pipeline_rank"]),
        }
        late = {
            name: (tensor, latency, rank)
            for name, (tensor, there, rank) in ways.items()
            if tensor is not None and (latency := self._latency_s(here, there))
        }
        requests = self._stock(
            tensor_send_prev=None if "send_prev" in late else tensor_send_prev,
            tensor_send_next=None if "send_next" in late else tensor_send_next,
            group=group,
            **rest,
        )
        # of two ranks, Megatron lets the odd one send through the group of all
        over = group if size != 2 or here % 2 == 0 else torch.distributed.group.WORLD
        for name, (tensor, latency, rank) in late.items():
            requests[name] = self._send_later(_Later(time.monotonic() + latency, tensor, rank, over))
        return requests

    def _latency_s(self, here: int, there: int) -> float:
        for link in self._links:
            if {link.src, link.dst} == {here, there} and link.active(self._iteration):
                return link.latency_ms / 1e3
        return 0.0

    def _send_later(self, item: _Later) -> _Later:
        line = self._lines.get(item.destination)
        if line is None:
            line = self._lines[item.destination] = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(line,), name="slow-link", daemon=True).start()
        line.put(item)
        return item


def _serve(line: queue.SimpleQueue[_Later]) -> None:
    """Transfers to one rank leave in their order, each when it is due."""
    while True:
        item = line.get()
        time.sleep(max(0.0, item.due - time.monotonic()))
        torch.distributed.send(item.tensor, item.destination, group=item.group)
        item.sent.set()


def _paced(function: Callable[..., Any], throttle: ComputeThrottle, kind: Kind) -> Callable[..., Any]:
    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        with throttle.pace(kind):
            return function(*args, **kwargs)

    return step
