"""The faults and paced compute of `adaptra.simulate`, for runs of the stock engine: what the demo and benchmarks compare with.

Nothing of Adaptra's runtime takes part. A transfer over a slow link occupies it for the whole delay and blocks both
ends, as NCCL's send and receive do: the sender waits out the delay, then the rendezvous send runs, and the receiver waits for it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from adaptra_plugin.config import SimulateConfig
from adaptra_plugin.runtime.compute_throttle import ComputeThrottle
from adaptra_plugin.schedule.actions import Kind


class StockSimulation:
    """Slow links and paced compute on one stock `PipelineEngine`."""

    def __init__(self, engine: Any, config: SimulateConfig) -> None:
        from deepspeed.runtime.pipe import schedule

        self._links = config.links
        self._stage = engine.stage_id
        self._iteration = 0
        throttle = ComputeThrottle(config.compute)
        instructions = dict(engine._INSTRUCTION_MAP)
        kinds = {schedule.ForwardPass: Kind.FORWARD, schedule.BackwardPass: Kind.FULL_BACKWARD}
        peers = {schedule.SendActivation: self._stage + 1, schedule.SendGrad: self._stage - 1}
        for command, kind in kinds.items():
            instructions[command] = _paced(instructions[command], throttle, kind)
        for command, peer in peers.items():
            instructions[command] = self._over(peer, instructions[command])
        engine._INSTRUCTION_MAP = instructions

    def set_iteration(self, iteration: int) -> None:
        self._iteration = iteration

    def _over(self, peer: int, send: Callable[..., None]) -> Callable[..., None]:
        """The delay counts once for a transfer, whatever number of tensors it has."""
        ends = {self._stage, peer}

        @functools.wraps(send)
        def instruction(engine: Any, **kwargs: Any) -> None:
            for link in self._links:
                if {link.src, link.dst} == ends and link.active(self._iteration):
                    time.sleep(link.latency_ms / 1e3)
            send(engine, **kwargs)

        return instruction


def _paced(function: Callable[..., None], throttle: ComputeThrottle, kind: Kind) -> Callable[..., None]:
    @functools.wraps(function)
    def instruction(engine: Any, **kwargs: Any) -> None:
        with throttle.pace(kind):
            function(engine, **kwargs)

    return instruction
