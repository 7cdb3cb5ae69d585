"""Megatron-core: schedules that run Adaptra's plans.

Both pipelined schedules of `megatron.core.pipeline_parallel.schedules` are replaced by one: a plan says which action of which
model chunk runs next, Megatron's own `forward_step` and `backward_step` run it, and tensors travel through the session's
channels. They carry their shapes with them, so that variable sequence lengths and adjusted shapes need nothing more.

Gradients are reduced after the last action: while the schedule runs, buckets of data-parallel gradients only accumulate
(`no_sync`), because a plan that changes would change the order in which they become ready.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, process_groups_config
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config, get_model_type
from torch import Tensor, nn

from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.patches import megatron_foreign as foreign
from adaptra_plugin.patches import megatron_support as support
from adaptra_plugin.patches.hosts import HOSTS
from adaptra_plugin.patches.megatron_split import MegatronSplit
from adaptra_plugin.patches.megatron_te import TransformerEngineLayers
from adaptra_plugin.runtime.iteration import Iteration
from adaptra_plugin.runtime.rendezvous import Rendezvous, patience_s
from adaptra_plugin.runtime.session import Session, told_by_all
from adaptra_plugin.runtime.stepping import SCHEDULES
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.actions import Action, Kind

logger = logging.getLogger("adaptra")
HOST = HOSTS["megatron"]
_numbers = itertools.count()

GROUPS = ("pg_collection", "grad_finalize_pgs")
"""What the process groups of a call are called in newer versions, and in 0.14."""
KNOWN = (
    "forward_step_func",
    "data_iterator",
    "model",
    "num_microbatches",
    "seq_length",
    "micro_batch_size",
    "decoder_seq_length",
    "forward_only",
    "collect_non_loss_data",
    "first_val_step",
    "adjust_tensor_shapes_fn",
    "p2p_communicator",
    "force_all_reduce",
    *GROUPS,
)
"""Arguments of the schedules, over all supported versions."""


@dataclass(frozen=True)
class Call:
    """One call of a schedule."""

    arguments: Mapping[str, Any]
    chunks: list[nn.Module]
    iterators: list[Any]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Call:
        """Raises UnsupportedError for what Adaptra cannot run."""
        model, iterators = arguments["model"], arguments["data_iterator"]
        chunks = list(model) if isinstance(model, list | tuple) else [model]
        support.check_call(arguments, KNOWN, len(chunks))
        if not isinstance(iterators, list | tuple):
            iterators = [iterators] * len(chunks)
        if len(iterators) != len(chunks):
            raise UnsupportedError(
                f"{len(iterators)} data iterators came for {len(chunks)} model chunks: give one for each chunk"
            )
        return cls(arguments, chunks, list(iterators))

    def __getattr__(self, name: str) -> Any:
        if name in KNOWN:
            return self.arguments.get(name)
        raise AttributeError(name)

    @property
    def config(self) -> Any:
        """Megatron's, of the model. Not to be kept: it leads to the model."""
        return get_model_config(self.chunks[0])

    @property
    def training(self) -> bool:
        return not self.arguments.get("forward_only")

    @property
    def groups_name(self) -> str:
        """What the installed version calls the argument with the process groups."""
        return GROUPS[0] if hasattr(process_groups_config, "ProcessGroupCollection") else GROUPS[1]

    def groups(self) -> Any:
        """The process groups of the call, or those of `parallel_state`."""
        given = self.arguments.get(self.groups_name)
        return _default_groups() if given is None else given

    def pipeline_group(self) -> Any:
        communicator = self.p2p_communicator
        if communicator is not None:
            return communicator.pp_group
        return parallel_state.get_pipeline_model_parallel_group()


class Pipeline:
    """A model whose schedules run through an Adaptra session.

    Raises:
        UnsupportedError: the job cannot run with Adaptra; one line per reason.
    """

    def __init__(self, config: AdaptraConfig, call: Call, meeting: Rendezvous) -> None:
        support.check_config(call.config, len(call.chunks))
        support.check_model(call.chunks, call.config)
        store = torch.distributed.distributed_c10d._get_default_store()
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = torch.distributed.get_process_group_ranks(call.pipeline_group())
        self.topology = Topology.of(rank, meeting.pipelines(world_size, mine), len(call.chunks))
        self.te_layers = TransformerEngineLayers(call.chunks)
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
        with watched, iteration.compute(action), self.session.recording(iteration):
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


def _default_groups() -> Any:
    """The process groups of `parallel_state`, as the stock schedules collect them."""
    if hasattr(schedules, "_build_default_pg_collection"):
        return schedules._build_default_pg_collection()
    kind = getattr(process_groups_config, "ProcessGroupCollection", None)
    groups = (process_groups_config.GradFinalizeProcessGroups if kind is None else kind)()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return groups


def _check_shapes(call: Call) -> None:
    if call.adjust_tensor_shapes_fn is None:
        return
    groups = call.groups()
    shapes = partial(
        schedules.get_tensor_shapes,
        seq_length=call.seq_length,
        micro_batch_size=call.micro_batch_size,
        decoder_seq_length=call.decoder_seq_length,
        config=call.config,
        tp_group=groups.tp,
        cp_group=groups.cp,
    )
    support.check_shapes(*call.adjust_tensor_shapes_fn(shapes(), shapes()))


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
        support.check_alone(call.config)
        return stock(**arguments)
    _check_shapes(call)
    model = call.chunks[0]
    found = foreign.reasons(stock, call.chunks, call.p2p_communicator)
    pipeline = _pipelines.get(model)
    if model not in _pipelines or (pipeline is not None and pipeline.session.closed):
        pipeline = _pipelines[model] = _start(config, call, found)
    elif pipeline is not None and found:
        raise UnsupportedError(
            f"replaced after training with Adaptra had begun: {'; '.join(found)}. Replace it before the first iteration, and "
            "the job runs as without Adaptra"
        )
    return stock(**arguments) if pipeline is None else pipeline.run(call)


def _start(config: AdaptraConfig, call: Call, found: list[str]) -> Pipeline | None:
    """The pipeline of a model; None if a rank has found a reason why plans must not run it. All ranks decide alike."""
    store = torch.distributed.distributed_c10d._get_default_store()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    meeting = Rendezvous(store, f"megatron-{next(_numbers)}", rank, patience_s(config.transport.connect_deadline_s))
    told = told_by_all(meeting.gather("reasons", found, world_size), rank)
    return None if told else Pipeline(config, call, meeting)


def forget() -> None:
    """The plug-in is inactive: sessions are closed, and models that live on get new ones when it is active again."""
    _pipelines.clear()
