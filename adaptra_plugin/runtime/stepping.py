"""Optimizers that step while gradients are still being made.

Some release each gradient at once: a hook on the parameter steps and clears it (`gradient_release`, LOMO, torch's
`_apply_optimizer_in_backward`). What they compute depends on which microbatches have run before, so on the order of the schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.host import known_packages

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def foreign_hooks(parameters: Iterable[nn.Parameter]) -> list[str]:
    """Names of functions that run when a gradient has been accumulated and belong to none of `host.known_packages`."""
    known = known_packages()
    found: dict[str, None] = {}
    for parameter in parameters:
        if getattr(parameter, "_in_backward_optimizers", None):
            found["torch.distributed.optim._apply_optimizer_in_backward"] = None
        hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None)
        for hook in hooks.values() if hooks else ():
            home, name = _origin(hook)
            if home.split(".")[0] not in known:
                found[f"{home}.{name}"] = None
    return list(found)


def _origin(hook: Any) -> tuple[str, str]:
    while isinstance(hook, functools.partial) or hasattr(hook, "__wrapped__"):
        hook = hook.func if isinstance(hook, functools.partial) else hook.__wrapped__
    hook = getattr(hook, "__func__", hook)
    home = getattr(hook, "__globals__", {}).get("__name__") or type(hook).__module__
    return str(home), str(getattr(hook, "__qualname__", type(hook).__qualname__))


SCHEDULES = 3
"""In so many schedules at the beginning it is looked at whether parameters change; the first steps of a warm-up may do nothing."""


class Unstepped:
    """The trainable parameters at the beginning of a schedule, to see that they are the same at its end. Forwards may change them
    (`max_norm` of embeddings, values that are set by the first batch): they run in the same order in every plan.

    By their bits: whoever steps inside a schedule goes around autograd's own count of versions (`parameter.data`).
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._parameters = [(name, p) for name, p in parameters if p.requires_grad]
        self._before = self._sums()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Changes inside are the model's own."""
        self.check()
        yield
        self._before = self._sums()

    def check(self) -> None:
        """All gradients are there, and the optimizer has not stepped.

        Raises:
            UnsupportedError: somebody has.
        """
        changed = [name for (name, _), a, b in zip(self._parameters, self._before, self._sums(), strict=True) if a != b]
        if changed:
            raise UnsupportedError(
                f"{len(changed)} of {len(self._parameters)} parameters (the first: {changed[0]}) have changed while the schedule "
                "was running, before the optimizer's step: with plans, microbatches would see other parameters than in stock. "
                'Step after the backward, or set "adaptra": {"enabled": false}'
            )

    def _sums(self) -> list[int]:
        with torch.no_grad():
            sums = [_sum(parameter) for _, parameter in self._parameters]
            # one wait for the device, not one for each parameter
            return torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []


def _sum(tensor: Tensor) -> Tensor:
    words = _WORDS.get(tensor.element_size())
    flat = tensor.detach().contiguous().reshape(-1)
    return (flat if words is None else flat.view(words)).sum(dtype=torch.int64)
