"""DeepSpeed's view of a plan: its schedule, and the two instructions that stock has not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deepspeed.runtime.pipe import schedule as stock

from adaptra_plugin.runtime.iteration import Iteration
from adaptra_plugin.schedule.actions import Action, Kind


class BackwardInput(stock.BufferOpInstruction):
    """The backward pass with respect to the stage's input (action I)."""


class BackwardWeight(stock.BufferOpInstruction):
    """The deferred weight gradients of a microbatch (action W)."""


class PlanSchedule(stock.PipeSchedule):
    """DeepSpeed's view of a plan: each action becomes one step of instructions."""

    def __init__(
        self, iteration: Iteration, micro_batches: int, stages: int, stage_id: int, before_step: Callable[[], None]
    ) -> None:
        super().__init__(micro_batches=micro_batches, stages=stages, stage_id=stage_id)
        self.iteration = iteration
        self.before_step = before_step

    def num_pipe_buffers(self) -> int:
        return self.iteration.buffers

    def steps(self) -> Iterator[list[stock.PipeInstruction]]:
        for action in self.iteration.dispatch():
            yield self._instructions(action)
        if self.iteration.training:
            self.before_step()
            yield [stock.ReduceTiedGrads(), stock.ReduceGrads(), stock.OptimizerStep()]

    def _instructions(self, action: Action) -> list[stock.PipeInstruction]:
        at = {"buffer_id": action.microbatch % self.num_pipe_buffers(), "action": action}
        commands: list[stock.PipeInstruction] = []
        if action.kind is Kind.BACKWARD_WEIGHT:
            return [BackwardWeight(**at)]
        if action.kind is Kind.FORWARD:
            # data first, as users' schedules and DeepSpeed's own for evaluation have it: loading may talk to the other end
            # of the pipeline, which would wait for an activation meanwhile
            if self.is_first_stage or self.is_last_stage:
                commands.append(stock.LoadMicroBatch(at["buffer_id"]))
            if not self.is_first_stage:
                commands.append(stock.RecvActivation(**at))
            commands.append(stock.ForwardPass(**at))
            if not self.is_last_stage:
                commands.append(stock.SendActivation(**at))
            return commands
        if not self.is_last_stage:
            commands.append(stock.RecvGrad(**at))
        commands.append(BackwardInput(**at) if action.kind is Kind.BACKWARD_INPUT else stock.BackwardPass(**at))
        if not self.is_first_stage:
            commands.append(stock.SendGrad(**at))
        return commands
