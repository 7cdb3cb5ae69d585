"""Megatron-core: schedules that run Adaptra's plans.

Both pipelined schedules of `megatron.core.pipeline_parallel.schedules` are replaced by one: a plan says which action of which
model chunk runs next, Megatron's own `forward_step` and `backward_step` run it, and tensors travel through the session's
channels. They carry their shapes with them, so that variable sequence lengths and adjusted shapes need nothing more.

Gradients are reduced after the last action: while the schedule runs, buckets of data-parallel gradients only accumulate
(`no_sync`), because a plan that changes would change the order in which they become ready.

A job that cannot bear another order has the stock schedule as it is, with its transfers delegated (`megatron_following`).
"""

from __future__ import annotations

import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_type
from torch import Tensor, nn

from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.patches import megatron_foreign as foreign
from adaptra_plugin.patches import megatron_support as support
from adaptra_plugin.patches.hosts import HOSTS
from adaptra_plugin.patches.megatron_call import Call
from adaptra_plugin.patches.megatron_draws import Draws, draws
from adaptra_plugin.patches.megatron_following import delegated
from adaptra_plugin.patches.megatron_rules import reasons_of_config
from adaptra_plugin.patches.megatron_split import MegatronSplit
from adaptra_plugin.patches.megatron_te import TransformerEngineLayers
from adaptra_plugin.runtime.following import Following
from adaptra_plugin.runtime.iteration import Iteration
from adaptra_plugin.runtime.rendezvous import Rendezvous, patience_s
from adaptra_plugin.runtime.session import Session, told_by_all
from adaptra_plugin.runtime.stepping import SCHEDULES
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.actions import Action, Kind
from adaptra_plugin.support import Level, refuse_what_must_be

logger = logging.getLogger("adaptra")
HOST = HOSTS["megatron"]
_numbers = itertools.count()


class Pipeline:
    """A model whose schedules run through an Adaptra session."""

    def __init__(self, config: AdaptraConfig, call: Call, meeting: Rendezvous) -> None:
        store = torch.distributed.distributed_c10d._get_default_store()
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = torch.distributed.get_process_group_ranks(call.pipeline_group())
        self.agreed = False
        self.topology = Topology.of(rank, meeting.pipelines(world_size, mine), len(call.chunks))
        self.te_layers = TransformerEngineLayers(call.chunks)
        drawing = meeting.gather("draws", draws(call.chunks, call.config), world_size)
        self.draws = Draws() if any(drawing.values()) else None
        self.session = Session(
            config,
            self.topology,
            store,
            lambda queue: MegatronSplit(call.chunks, self.te_layers, queue),
            _device_of(call.chunks),
            call.num_microbatches,
            wandb_rank=HOST.wandb_rank % world_size,
        )
        weakref.finalize(call.chunks[0], self.session.close)

    def agree(self, reasons: list[str]) -> None:
        """Once: the stock schedule itself runs what cannot bear another order, with whatever else belongs to it."""
        if reasons:
            self.draws = None
        self.session.agrees((), reasons)
        self.agreed = True

    def count(self, call: Call, stock: Callable[..., Any]) -> Any:
        """The first training iteration of a job that draws random numbers: by the stock schedule."""
        assert self.draws is not None
        with self.session.inside(), self.draws.counting(call.chunks):
            results = stock(**call.arguments)
        self.agree(self.draws.reasons)
        return results

    def follow(self, call: Call, stock: Callable[..., Any]) -> Any:
        """Runs the stock schedule as it is, with its transfers delegated."""
        session = self.session
        with session.inside():
            begin = session.begin if call.training else session.begin_evaluation
            iteration = begin(call.num_microbatches)
            assert isinstance(iteration, Following)
            with delegated(iteration, call.pipeline_group(), call.chunks):
                results = stock(**call.arguments)
            session.end(iteration)
        return results

    def run(self, call: Call) -> list[Any]:
        """What the stock schedule does and returns."""
        session, timers = self.session, call.config.timers
        with session.inside():
            if timers is not None:
                timers("forward-backward", log_level=1).start(barrier=call.config.barrier_with_L1_time)
            begin = session.begin if call.training else session.begin_evaluation
            iteration = begin(call.num_microbatches)
            try:
                results = _Execution(self, iteration, call).run()
            except BaseException:
                session.queue.clear()
                self.te_layers.discard()
                raise
            if timers is not None:
                timers("forward-backward").stop()
            session.end(iteration)
        return results


class _Execution:
    """One call of a schedule on this rank."""

    def __init__(self, pipeline: Pipeline, iteration: Iteration, call: Call) -> None:
        self.pipeline = pipeline
        self.session = pipeline.session
        self.topology = pipeline.topology
        self.config = call.config
        self.iteration = iteration
        self.call = call
        self.groups = call.groups()
        self.results: list[Any] = []
        self.tokens = torch.zeros([], dtype=torch.int, device=self.session.device)
        drawn = pipeline.draws if call.training else None
        self._turns = None if drawn is None else drawn.iteration(self.config, call.num_microbatches)
        self._inputs: dict[tuple[int, int], Tensor | None] = {}
        self._outputs: dict[tuple[int, int], Any] = {}
        self._synchronised = 0  # chunks whose parameters have been asked for

    def run(self) -> list[Any]:
        steps = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD_INPUT: self._backward,
            Kind.FULL_BACKWARD: self._backward,
            Kind.BACKWARD_WEIGHT: self._weight,
        }
        watched = self.call.training and self.iteration.index < SCHEDULES
        unstepped = self._unstepped = foreign.unstepped(self.call.chunks) if watched else None
        with self._no_sync():
            for action in self.iteration.dispatch():
                steps[action.kind](action)
        if self._turns is not None:
            self._turns.end()
        if unstepped is not None:
            unstepped.check()
        if self.call.training:
            self._finish()
        return self.results

    # --- actions

    def _forward(self, action: Action) -> None:
        chunk, microbatch, iteration, call = self._place(action), action.microbatch, self.iteration, self.call
        tensor: Tensor | None = None
        if iteration.receives(action):
            (tensor,), _ = iteration.receive(action)
            tensor.requires_grad_(tensor.is_floating_point())
        self._synchronise_parameters(chunk)
        first = call.first_val_step is None or call.training or bool(call.first_val_step)
        watched = nullcontext() if self._unstepped is None else self._unstepped.forward()
        drawing = nullcontext() if self._turns is None else self._turns.forward(chunk, microbatch)
        with watched, iteration.compute(action), self.session.recording(iteration), drawing:
            output, tokens = schedules.forward_step(
                call.forward_step_func,
                call.iterators[chunk],
                call.chunks[chunk],
                call.num_microbatches,
                tensor,
                self.results,
                self.config,
                self.groups.cp.size(),
                call.collect_non_loss_data or False,
                None,
                is_first_microbatch=first and microbatch == 0,
                current_microbatch=microbatch,
                vp_stage=chunk if self.topology.chunks > 1 else None,
                is_last_stage=self.topology.is_last(action.stage),
            )
        self.tokens += tokens
        if iteration.sends(action):
            if not isinstance(output, Tensor):
                raise UnsupportedError(
                    f"stage {action.stage} returns a {type(output).__name__}: between two stages one tensor can travel"
                )
            iteration.send(action, (output,))
        if call.training:
            self._inputs[chunk, microbatch] = tensor
            self._outputs[chunk, microbatch] = output
            if iteration.sends(action) or self.topology.chunks == 1:  # as in stock: with several chunks the loss stays
                schedules.deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)

    def _backward(self, action: Action) -> None:
        chunk, iteration = self._place(action), self.iteration
        gradient: Tensor | None = None
        if iteration.receives(action):
            (gradient,), _ = iteration.receive(action)
        tensor = self._inputs.pop((chunk, action.microbatch))
        output = self._outputs.pop((chunk, action.microbatch))
        split = action.kind is Kind.BACKWARD_INPUT
        with iteration.compute(action):
            key = (chunk, action.microbatch)
            with self.session.backward_input(iteration, key) if split else nullcontext():
                towards = _backward_step(tensor, output, gradient, self.call)
            self.pipeline.te_layers.run(chunk)
        if iteration.sends(action):
            if towards is None:
                raise RuntimeError(
                    f"the input of stage {action.stage} has no gradient: a stage must use what the stage before it returns"
                )
            iteration.send(action, (towards,))

    def _weight(self, action: Action) -> None:
        chunk = self._place(action)
        with self.iteration.compute(action):
            self.session.queue.run((chunk, action.microbatch))
            self.pipeline.te_layers.run(chunk)

    def _place(self, action: Action) -> int:
        return self.topology.chunk(action.stage)

    # --- data parallelism

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        """Gradients only accumulate inside."""
        functions = self.config.no_sync_func if self.call.training else None
        if functions is None:
            functions = []
        with ExitStack() as stack:
            for function in functions if isinstance(functions, list | tuple) else [functions]:
                stack.enter_context(function())
            yield

    def _synchronise_parameters(self, chunk: int) -> None:
        """Starts the gathering of parameters that the optimizer has left spread, a chunk ahead."""
        functions = self.config.param_sync_func
        if functions is None or not self.call.training or self.topology.chunks == 1:
            return
        while self._synchronised < min(chunk + 2, len(self.call.chunks)):
            number = self._synchronised
            function = functions[number] if isinstance(functions, list | tuple) else functions
            function(self.call.chunks[number].parameters())
            self._synchronised += 1

    def _finish(self) -> None:
        """Reduces the gradients of all microbatches."""
        call, config = self.call, self.config
        functions = config.grad_sync_func
        for number, chunk in enumerate(call.chunks):
            if support.finalizing_starts(chunk):
                continue
            if call.force_all_reduce and support.overlaps(chunk):
                for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                    group.start_grad_sync(force_all_reduce=True)
            elif functions is not None:
                (functions[number] if isinstance(functions, list | tuple) else functions)(chunk.parameters())
            elif support.overlaps(chunk):
                chunk.start_grad_sync()
        if config.finalize_model_grads_func is None:
            return
        more = {call.groups_name: self.groups}
        if _FORCES:
            more["force_all_reduce"] = call.force_all_reduce or False
        tokens = self.tokens if config.calculate_per_token_loss else None
        config.finalize_model_grads_func(call.chunks, tokens, **more)


_FORCES = "force_all_reduce" in inspect.signature(schedules.forward_backward_pipelining_without_interleaving).parameters
_OLD_BACKWARD = "model_type" in inspect.signature(schedules.backward_step).parameters


def _backward_step(tensor: Any, output: Any, gradient: Any, call: Call) -> Any:
    """Megatron's `backward_step`; before 0.19 it takes the type of the model."""
    more = (get_model_type(call.chunks[0]), call.config) if _OLD_BACKWARD else (call.config,)
    return schedules.backward_step(tensor, output, gradient, *more)


def _device_of(chunks: list[nn.Module]) -> torch.device:
    for chunk in chunks:
        for parameter in chunk.parameters():
            return parameter.device
    return torch.device("cpu")


_pipelines: weakref.WeakKeyDictionary[nn.Module, Pipeline | None] = weakref.WeakKeyDictionary()
"""None: runs as without the plug-in."""


def run(stock: Callable[..., Any], config: AdaptraConfig, arguments: Mapping[str, Any]) -> Any:
    """One call of a schedule, for a job with the plug-in active; `stock` runs what needs no pipeline.

    Raises:
        UnsupportedError: the job cannot run with Adaptra, or something has been replaced after its first iteration.
    """
    call = Call.of(arguments)
    if call.pipeline_group().size() == 1:
        refuse_what_must_be(support.reasons_alone(call.config), support.OTHERWISE)
        return stock(**arguments)
    model = call.chunks[0]
    found = foreign.reasons_for_stock(call.p2p_communicator, call.arguments.get(call.groups_name))
    found += [str(it) for it in reasons_of_config(call.config, len(call.chunks)) if it.level is Level.STOCK]
    pipeline = _pipelines.get(model)
    if model not in _pipelines or (pipeline is not None and pipeline.session.closed):
        pipeline = _pipelines[model] = _start(config, call, stock, found)
    elif pipeline is not None and (late := found or _late_order(pipeline, call, stock)):
        raise UnsupportedError(
            f"replaced after training with Adaptra had begun: {'; '.join(late)}. Replace it before the first iteration, and "
            "the job runs with it"
        )
    if pipeline is None:
        return stock(**arguments)
    if call.training and not pipeline.agreed:
        return pipeline.count(call, stock)
    if pipeline.session.follows:
        return pipeline.follow(call, stock)
    if changed := call.reasons():
        raise UnsupportedError(
            f"changed after training with plans had begun: {'; '.join(map(str, changed))}. With the first call already like "
            "that, the job keeps the stock order"
        )
    return pipeline.run(call)


def _late_order(pipeline: Pipeline, call: Call, stock: Callable[..., Any]) -> list[str]:
    """What has been put there since the first call that a plan would go around; a schedule that is followed has it anyway."""
    return [] if pipeline.session.follows else foreign.reasons_for_own_order(stock, call.chunks)


def _start(config: AdaptraConfig, call: Call, stock: Callable[..., Any], found: list[str]) -> Pipeline | None:
    """The pipeline of a model; None if a rank has found a reason why Adaptra must not touch it. All ranks decide alike.

    Raises:
        UnsupportedError: the job would be computed wrongly; one line per reason.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    meeting = Rendezvous(store, f"megatron-{next(_numbers)}", rank, patience_s(config.transport.connect_deadline_s))
    if told_by_all(meeting.gather("reasons", found, world_size), rank):
        return None
    reasons = [
        *reasons_of_config(call.config, len(call.chunks)),
        *support.reasons_of_model(call.chunks, call.config),
        *call.reasons(),
    ]
    refuse_what_must_be(reasons, support.OTHERWISE)
    pipeline = Pipeline(config, call, meeting)
    found = [*foreign.reasons_for_own_order(stock, call.chunks), *map(str, reasons)]
    if pipeline.draws is None or any(meeting.gather("order", bool(found), world_size).values()):
        pipeline.agree(found)
    return pipeline


def forget() -> None:
    """The plug-in is inactive: sessions are closed, and models that live on get new ones when it is active again."""
    _pipelines.clear()
