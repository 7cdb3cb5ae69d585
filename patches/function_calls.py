"""What stands in for the autograd Function of linear layers while a forward records: Megatron's, and Megatron-DeepSpeed's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from adaptra_plugin.runtime.census import State
from adaptra_plugin.runtime.split import Rebinding, autocasts


class FunctionCalls(ABC):
    """Stands in for a Function, of which layers use nothing but `apply`.

    Attributes:
        rebinding: says who records.
    """

    rebinding: Rebinding

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def apply(self, x: Tensor, weight: Tensor, *more: Any) -> Tensor:
        """Arguments as of the stock Function."""
        taker = self.rebinding.taker if torch.is_grad_enabled() else None
        if (
            taker is None
            or (state := taker.census.state(weight)) in (None, State.FUSED)
            or autocasts()
            or not self.can_split(weight, *more)
        ):
            y: Tensor = self.stock.apply(x, weight, *more)
            return y
        if state is State.OBSERVED:
            y = self.stock.apply(x, weight, *more)
            taker.census.observe(weight, x, y)
            return y
        # it requires grad, as in stock: at::matmul goes another way, to other last bits, where nothing does
        return self.split(taker, x, weight, weight.detach().requires_grad_(), *more)

    @abstractmethod
    def can_split(self, weight: Tensor, *more: Any) -> bool:
        """Whether a call with these arguments can leave out the gradient of its weight."""

    @abstractmethod
    def split(self, taker: Any, x: Tensor, weight: Tensor, detached: Tensor, *more: Any) -> Tensor:
        """The call without the gradient of its weight, which goes to the taker's queue. `detached`: what to compute with."""
