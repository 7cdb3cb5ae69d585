"""What somebody else has put into Megatron's pipeline that a plan would go around: such a job runs with what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

from megatron.core.pipeline_parallel import p2p_communication, schedules
from torch import nn

from adaptra_plugin.patches.genuine import is_genuine, name_of
from adaptra_plugin.runtime.stepping import Unstepped, foreign_hooks

FUNCTIONS = ("_p2p_ops", "_batched_p2p_ops", "_communicate", "_communicate_shapes")
STEPS = ("forward_step", "backward_step", "custom_backward")
"""What the stock schedules compute with. Another backward may look at gradients that come later in a plan."""


def reasons_for_own_order(stock: Callable[..., Any], chunks: Sequence[nn.Module]) -> list[str]:
    """Why a schedule is followed as it is, one line each; none: plans may replace it.

    Args:
        stock: the schedule that has been replaced by Adaptra's.
        chunks: the model.
    """
    found = [
        f"schedules.{name} is {name_of(getattr(schedules, name))}"
        for name in STEPS
        if not is_genuine(getattr(schedules, name), schedules.__name__)
    ]
    if not is_genuine(stock, schedules.__name__):
        found.append(f"the schedule is {name_of(stock)}")
    hooks = foreign_hooks(parameter for chunk in chunks for parameter in chunk.parameters())
    if hooks:
        found.append(f"{', '.join(hooks)} runs as soon as a gradient has been accumulated, and may step there")
    return found


def reasons_for_stock(communicator: Any = None, groups: Any = None) -> list[str]:
    """Why transfers cannot be delegated, one line each.

    Args:
        communicator: that the caller has given, if any.
        groups: process groups that the caller has given, if any.
    """
    if any("MultiModule" in type(given).__name__ for given in (communicator, groups)):
        return ["several modules share one pipeline"]
    found = []
    kind = getattr(p2p_communication, "P2PCommunicator", None)
    if getattr(schedules, "P2PCommunicator", kind) is not kind or (
        communicator is not None and type(communicator) is not kind
    ):
        found.append("p2p goes through another class than Megatron's P2PCommunicator")
    parts = {name: getattr(p2p_communication, name, None) for name in FUNCTIONS}
    parts |= {
        name: value for name, value in vars(kind or object).items() if isinstance(value, FunctionType | staticmethod)
    }
    found += [
        f"p2p_communication's {name} is {name_of(part)}"
        for name, part in parts.items()
        if part is not None and not is_genuine(part, p2p_communication.__name__)
    ]
    return found


def unstepped(chunks: Sequence[nn.Module]) -> Unstepped | None:
    """The parameters before the first iteration; None if they are gathered while it runs, so that they may change."""
    if any(getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False) for chunk in chunks):
        return None
    return Unstepped(
        (f"{number}.{name}", p) for number, chunk in enumerate(chunks) for name, p in chunk.named_parameters()
    )
