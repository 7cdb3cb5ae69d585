"""One call of Megatron's schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import parallel_state, process_groups_config
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config
from torch import nn

from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.patches import megatron_support as support
from adaptra_plugin.support import Reason

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
        """Raises UnsupportedError: there are not as many data iterators as model chunks."""
        model, iterators = arguments["model"], arguments["data_iterator"]
        chunks = list(model) if isinstance(model, list | tuple) else [model]
        if not isinstance(iterators, list | tuple):
            iterators = [iterators] * len(chunks)
        if len(iterators) != len(chunks):
            raise UnsupportedError(
                f"{len(iterators)} data iterators came for {len(chunks)} model chunks: give one for each chunk"
            )
        return cls(arguments, chunks, list(iterators))

    def reasons(self) -> list[Reason]:
        """Why this call is left to the stock schedule."""
        return [*support.reasons_of_call(self.arguments, KNOWN, len(self.chunks)), *_reasons_of_shapes(self)]

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
        group = getattr(self.p2p_communicator, "pp_group", None)
        return group if group is not None else parallel_state.get_pipeline_model_parallel_group()


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


def _reasons_of_shapes(call: Call) -> list[Reason]:
    if call.adjust_tensor_shapes_fn is None:
        return []
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
    return support.reasons_of_shapes(*call.adjust_tensor_shapes_fn(shapes(), shapes()))
