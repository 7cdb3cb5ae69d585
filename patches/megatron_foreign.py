"""What somebody else has put into Megatron's pipeline that a plan would go around: such a job runs with what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.pipeline_parallel import p2p_communication, schedules
from torch import nn

from adaptra_plugin.patches.genuine import is_genuine, name_of
from adaptra_plugin.runtime.stepping import Unstepped, foreign_hooks

FUNCTIONS = ("_p2p_ops", "_batched_p2p_ops", "_communicate", "_communicate_shapes")


def reasons(stock: Callable[..., Any], chunks: Sequence[nn.Module]) -> list[str]:
    """Why a model runs without plans, one line each; none: it runs by plans.

    Args:
        stock: the schedule that has been replaced by Adaptra's.
        chunks: the model.
    """
    found = []
    if not is_genuine(stock, schedules.__name__):
        found.append(f"the schedule is {name_of(stock)}")
    communicator = getattr(p2p_communication, "P2PCommunicator", None)
    parts = {name: getattr(p2p_communication, name, None) for name in FUNCTIONS}
    parts |= {name: value for name, value in vars(communicator or object).items() if callable(value) and name[0] != "_"}
    found += [
        f"p2p_communication's {name} is {name_of(part)}"
        for name, part in parts.items()
        if part is not None and not is_genuine(part, p2p_communication.__name__)
    ]
    hooks = foreign_hooks(parameter for chunk in chunks for parameter in chunk.parameters())
    if hooks:
        found.append(f"{', '.join(hooks)} runs as soon as a gradient has been accumulated, and may step there")
    return found


def unstepped(chunks: Sequence[nn.Module]) -> Unstepped | None:
    """The parameters before the first iteration; None if they are gathered while it runs, so that they may change."""
    if any(getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False) for chunk in chunks):
        return None
    return Unstepped(
        (f"{number}.{name}", p) for number, chunk in enumerate(chunks) for name, p in chunk.named_parameters()
    )
