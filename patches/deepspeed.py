"""DeepSpeed: a pipeline engine that runs Adaptra's plans.

`deepspeed.PipelineEngine`, the global that `deepspeed.initialize` builds engines from, is a subclass while an engine with the
block is built. No stock class is changed: the subclass replaces the schedule in `_exec_schedule` and, while a plan runs, has an
instruction map of its own, whose entries time the computations, keep what several microbatches in flight need, and move tensors through the
session's channels.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule as stock
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.utils import PartitionedTensor

from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.patches import deepspeed_following as following
from adaptra_plugin.patches import deepspeed_foreign as foreign
from adaptra_plugin.patches import deepspeed_support as support
from adaptra_plugin.patches.deepspeed_schedule import BackwardInput, BackwardWeight, PlanSchedule
from adaptra_plugin.patches.deepspeed_split import PipelineSplit
from adaptra_plugin.patches.hosts import HOSTS
from adaptra_plugin.patches.registry import Patch
from adaptra_plugin.runtime.following import Following
from adaptra_plugin.runtime.iteration import Iteration
from adaptra_plugin.runtime.session import Session
from adaptra_plugin.runtime.stepping import SCHEDULES, Unstepped
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.actions import Action

logger = logging.getLogger("adaptra")
HOST = HOSTS["deepspeed"]
DEPTH = "_backward_active_depth"
"""By which optimizers of newer versions know whether a backward is running."""


def engine_patch(model: Any, host_config: Mapping[str, Any]) -> Patch:
    """What makes `deepspeed.initialize` build `AdaptraPipelineEngine`s, for a job that is supported.

    Raises:
        UnsupportedError: the model, or a combination of settings is refused.
    """
    support.check_model(model, PipelineModule)
    support.check_config(host_config)
    dual = getattr(deepspeed, "DualPipeVModule", None)  # older versions have none
    name = "DualPipeVEngine" if dual is not None and isinstance(model, dual) else "PipelineEngine"
    return Patch(
        id="deepspeed.engine",
        target=f"deepspeed:{name}",
        host=HOST.distribution,
        versions=HOST.versions,
        reason="runs slack-adaptive plans and moves activations and gradients through the proxy",
        replace=engine_class,
    )


def engine_class(engine: Any) -> Any:
    """The class to build instead of what is built now: Adaptra's, on top of a subclass that DeepSpeed or somebody else has put there."""
    if engine is PipelineEngine:
        return AdaptraPipelineEngine
    if isinstance(engine, type) and issubclass(engine, PipelineEngine):
        return type(f"Adaptra{engine.__name__}", (AdaptraPipelineEngine, engine), {})
    logger.warning("deepspeed.PipelineEngine is %s, which is no subclass of it: this job runs as in stock", engine)
    return engine


class AdaptraPipelineEngine(PipelineEngine):
    """A `PipelineEngine` whose training and evaluation schedules run through an Adaptra session."""

    _session: Session | None = None
    _running: Iteration | None = None
    _decided = False  # whether this job runs by plans
    _warned = False  # of a schedule that is not known
    _INSTRUCTION_MAP: dict[type, Callable[..., None]]
    _stock_instructions: dict[type, Callable[..., None]]
    """What executes instructions without Adaptra: DeepSpeed's own functions, or those that users have put there."""
    _unstepped: Unstepped | None = None
    grad_layer: Any
    loss: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = support.effective_config(self._config._param_dict)
        if not (self.is_pipe_parallel and config.enabled):
            return  # one stage has nothing to schedule and nothing to send
        self._losses: dict[int, Any] = {}
        store = torch.distributed.distributed_c10d._get_default_store()
        self._session = Session(
            config,
            Topology.of(self.global_rank, self._pipelines()),
            store,
            functools.partial(PipelineSplit, self.module),
            torch.device(self.device),
            self.micro_batches,
            wandb_rank=HOST.wandb_rank,
        )
        weakref.finalize(self, self._session.close)

    def _pipelines(self) -> list[list[int]]:
        """World ranks of the stages of every pipeline."""
        return [list(ranks) for ranks in self.grid._topo.get_axis_comm_lists("pipe")]

    @property
    def adaptra(self) -> Session | None:
        """The session of this engine; None with one stage or after `adaptra_plugin.deactivate()`."""
        session = self._session
        return None if session is None or session.closed else session

    def destroy(self) -> None:
        """Ends the session too; so does the end of the engine's life."""
        if self._session is not None:
            self._session.close()
        super().destroy()

    def train_batch(self, *args: Any, **kwargs: Any) -> Any:
        return self._inside(super().train_batch, *args, **kwargs)

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        return self._inside(super().eval_batch, *args, **kwargs)

    def _inside(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        session = self.adaptra
        if session is None:
            return call(*args, **kwargs)
        with session.inside():
            return call(*args, **kwargs)

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        session = self._session_for(pipe_schedule)
        if session is None:
            super()._exec_schedule(pipe_schedule)
            return
        # a schedule of somebody else's may be no PipeSchedule
        microbatches = int(getattr(pipe_schedule, "micro_batches", None) or self.micro_batches)
        training = torch.is_grad_enabled()
        iteration = session.begin(microbatches) if training else session.begin_evaluation(microbatches)
        if isinstance(iteration, Following):
            with (
                self._instructions(following.instructions(iteration, self._INSTRUCTION_MAP)),
                following.delegated(iteration),
            ):
                super()._exec_schedule(pipe_schedule)
            if iteration.flushed:
                self._let_go()
            session.end(iteration)
            return
        # in the stock order, whoever steps inside a schedule steps where stock does
        watched = training and iteration.index < SCHEDULES and not session.kept
        self._unstepped = Unstepped(self.module.named_parameters()) if watched else None
        before_step = self._unstepped.check if self._unstepped is not None else nothing
        plan = PlanSchedule(iteration, microbatches, pipe_schedule.stages, pipe_schedule.stage_id, before_step)
        self._running = iteration
        try:
            with self._instructions({**self._INSTRUCTION_MAP, **self._INSTRUCTIONS}):
                super()._exec_schedule(plan)
        finally:
            self._running = None
            self._losses.clear()
            self._let_go()
            session.queue.clear()
        session.end(iteration)

    def _let_go(self) -> None:
        """Nothing of a schedule stays alive: graphs hold DeepSpeed's hooks, and they the engine, which would never go."""
        self.grad_layer = None
        if isinstance(self.loss, torch.Tensor):
            self.loss = self.loss.detach()
        for slots in self.pipe_buffers.values():
            slots[:] = [None] * len(slots)  # another plan may have fewer slots

    @contextmanager
    def _instructions(self, instructions: dict[type, Callable[..., None]]) -> Iterator[None]:
        """Inside, they are this engine's."""
        users = vars(self).get("_INSTRUCTION_MAP")  # somebody's, of this engine alone
        self._stock_instructions = self._INSTRUCTION_MAP
        self._INSTRUCTION_MAP = instructions
        try:
            yield
        finally:
            del self._INSTRUCTION_MAP
            if users is not None:
                self._INSTRUCTION_MAP = users

    def _session_for(self, schedule: Any) -> Session | None:
        """The session, if it takes part in the schedule.

        Raises:
            UnsupportedError: something has been replaced after training had begun.
        """
        session = self.adaptra
        if session is None:
            return None
        base = next(cls for cls in type(self).__mro__ if issubclass(cls, PipelineEngine) and not _is_ours(cls))
        found = foreign.reasons_for_stock(self, base)
        own_order = foreign.reasons_for_own_order(self, schedule)
        in_order = foreign.reasons_for_stock_order(self)
        if not self._decided:
            if type(schedule) not in foreign.KNOWN and not torch.is_grad_enabled():
                return None  # an evaluation: what training has is not known yet
            takes_part = session.agrees(found, own_order, in_order)
            self._decided = True
            return session if takes_part else None
        if found:
            raise _too_late("replaced after training with Adaptra had begun", found, "runs as in stock")
        if own_order and not session.follows:
            if type(schedule) not in foreign.KNOWN:
                if not self._warned:
                    self._warned = True
                    logger.warning("%s: it runs as DeepSpeed runs it", own_order[0])
                return None
            raise _too_late("replaced after training with Adaptra had begun", own_order, "keeps its own schedule")
        if in_order and not session.kept:
            raise _too_late("changed after training with plans had begun", in_order, "keeps the stock order")
        return session

    # --- computations

    def _adaptra_forward(self, buffer_id: int, action: Action) -> None:
        iteration, session = self._running, self._session
        assert iteration is not None and session is not None
        watched = nullcontext() if self._unstepped is None or not iteration.training else self._unstepped.forward()
        with watched, iteration.compute(action), session.recording(iteration):
            self._stock_instructions[stock.ForwardPass](self, buffer_id)
        if iteration.training and self.is_last_stage():
            # the stock engine has one slot for the loss; here several forwards may run before the first backward
            self._losses[buffer_id] = self.loss

    def _adaptra_backward(self, buffer_id: int, action: Action) -> None:
        iteration = self._running
        assert iteration is not None
        with iteration.compute(action):
            self._stock_backward(buffer_id)

    def _adaptra_backward_input(self, buffer_id: int, action: Action) -> None:
        iteration, session = self._running, self._session
        assert iteration is not None and session is not None
        with iteration.compute(action), session.backward_input(iteration, action.microbatch):
            self._stock_backward(buffer_id)

    def _stock_backward(self, buffer_id: int) -> None:
        if self.is_last_stage():
            self.loss = self._losses.pop(buffer_id)
        self._stock_instructions[stock.BackwardPass](self, buffer_id)

    def _adaptra_backward_weight(self, buffer_id: int, action: Action) -> None:
        iteration, session = self._running, self._session
        assert iteration is not None and session is not None
        with iteration.compute(action):
            # BF16_Optimizer adds low-precision gradients to its fp32 copies after each backward of the engine; W is
            # one more. With immediate_grad_update hooks on the parameters add them, and older versions leave them there.
            if self.using_bf16_optimizer:
                self.optimizer.clear_lp_grads()
            before = getattr(self, "_running_engine_backward", False)
            depth = getattr(self.optimizer, DEPTH, None)
            self._running_engine_backward = True  # tells DeepSpeed's hooks that this is no stray tensor.backward()
            try:
                session.queue.run(action.microbatch)
            finally:
                self._running_engine_backward = before
                if depth is not None:
                    setattr(self.optimizer, DEPTH, depth)  # hooks have begun a backward, and nobody ends it
            if self.using_bf16_optimizer:
                self.optimizer.update_hp_grads(clear_lp_grads=False)  # does nothing where hooks do it

    # --- transfers

    def _adaptra_send_activations(self, buffer_id: int, action: Action) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        self._send(action, outputs)

    def _adaptra_receive_activations(self, buffer_id: int, action: Action) -> None:
        tensors, is_tuple = self._receive(action)
        if is_tuple and (self.has_attention_mask or self.has_bool_tensors):
            assert self._running is not None
            tensors = support.with_bool_mask(tensors, self._running.training)
        for tensor in tensors:
            tensor.requires_grad_(tensor.is_floating_point())
        self.pipe_buffers["inputs"][buffer_id] = tensors if is_tuple else tensors[0]

    def _adaptra_send_grads(self, buffer_id: int, action: Action) -> None:
        inputs = self.pipe_buffers["inputs"][buffer_id]
        is_tuple = isinstance(inputs, tuple)
        gradients = []
        for index, tensor in enumerate(inputs if is_tuple else (inputs,)):
            if tensor.is_floating_point():
                if tensor.grad is None:
                    raise RuntimeError(
                        f"input {index} of stage {self.stage_id} has no gradient: a stage must use every "
                        "floating-point tensor that the stage before it returns"
                    )
                gradients.append(tensor.grad)
        if self.is_grad_partitioned:
            # each rank of a tensor group sends its part, and the receiver gathers the parts, as in stock
            part = PartitionedTensor(tensor=gradients[0], group=self.grid.get_slice_parallel_group())
            gradients[:1] = [part.to_meta(), part.data()]
            is_tuple = True
        self._send(action, tuple(gradients) if is_tuple else gradients[0])
        self.pipe_buffers["inputs"][buffer_id] = None

    def _adaptra_receive_grads(self, buffer_id: int, action: Action) -> None:
        tensors, is_tuple = self._receive(action)
        if self.is_pipe_partitioned and not self.is_grad_partitioned:
            # as in stock: the backward of a whole gradient finds the whole output, in place of its part
            meta, part, *others = self.pipe_buffers["outputs"][buffer_id]
            whole = PartitionedTensor.from_meta(meta, part, self.grid.get_slice_parallel_group()).full()
            self.pipe_buffers["outputs"][buffer_id] = (whole, *others)
            is_tuple = True
        self.grad_layer = list(tensors) if is_tuple else tensors[0]

    def _send(self, action: Action, value: Any) -> None:
        assert self._running is not None
        is_tuple = isinstance(value, tuple)
        self._running.send(action, value if is_tuple else (value,), is_tuple=is_tuple)

    def _receive(self, action: Action) -> tuple[tuple[torch.Tensor, ...], bool]:
        assert self._running is not None
        return self._running.receive(action)

    _INSTRUCTIONS: ClassVar[dict[type, Callable[..., None]]] = {
        stock.ForwardPass: _adaptra_forward,
        stock.BackwardPass: _adaptra_backward,
        BackwardInput: _adaptra_backward_input,
        BackwardWeight: _adaptra_backward_weight,
        stock.SendActivation: _adaptra_send_activations,
        stock.RecvActivation: _adaptra_receive_activations,
        stock.SendGrad: _adaptra_send_grads,
        stock.RecvGrad: _adaptra_receive_grads,
    }


def _too_late(what: str, reasons: Sequence[object], then: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what}: {'; '.join(map(str, reasons))}. Do it before the first batch, and the job {then}; "
        'or set "adaptra": {"enabled": false}'
    )


def nothing() -> None:
    pass


if hasattr(DeepSpeedEngine, "curriculum_enabled_legacy"):
    # versions that pass the length of a sequence to `forward`, but for a class of this name
    AdaptraPipelineEngine.__name__ = PipelineEngine.__name__


def _is_ours(cls: type) -> bool:
    return issubclass(cls, AdaptraPipelineEngine)
