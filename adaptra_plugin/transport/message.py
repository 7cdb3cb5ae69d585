"""What a receive returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from adaptra_plugin.transport.pauses import Pauses


@dataclass(frozen=True, slots=True)
class Message:
    """What arrived: fresh, writable tensors that belong to the caller."""

    tensors: tuple[torch.Tensor, ...]
    tag: int
    """The number that the sender gave to `send`."""
    delay_ms: float
    """From the moment the whole message lay in the sender's ring to complete arrival at the receiver's proxy (ms, >= 0),
    without the difference of clocks. Waiting for room in the sender's ring and copying into it do not count; waiting there
    behind other messages does."""
    came_s: float = 0.0
    """When it had arrived (s, clock of the receiver's endpoint)."""
    pauses: Pauses | None = field(default=None, repr=False, compare=False)
    """Says which of a link's delays were disturbed; None: nobody knows."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Message:
        """The same message with its tensors on `device`."""
        return replace(self, tensors=tuple(t.to(device, non_blocking=non_blocking) for t in self.tensors))
