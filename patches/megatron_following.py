"""Megatron runs its own schedule: the transfers between stages go through the session's channels.

All versions move tensors with one of two functions of `p2p_communication`, looked up by their global names at each transfer, and
shapes with a method. The schedules look up what they compute with in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import combined_1f1b, p2p_communication, schedules
from torch import Tensor, nn

from adaptra_plugin.bindings import replaced
from adaptra_plugin.runtime.following import Following
from adaptra_plugin.schedule.actions import Kind
from adaptra_plugin.transport import Direction, Key


@dataclass
class Received:
    """What Megatron waits for."""

    iteration: Following
    expected: list[tuple[Key, Tensor]]

    def wait(self) -> None:
        """Fills the tensors; once."""
        expected, self.expected = self.expected, []
        self.iteration.fill(expected)


@dataclass
class Transfers:
    """The two functions, for the pipeline of one model; transfers of other groups are Megatron's."""

    iteration: Following
    group: Any

    def apart(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """`_p2p_ops`: a work for each transfer, by its name."""

        def transfer(**arguments: Any) -> Any:
            if arguments["group"] is not self.group:
                return stock(**arguments)
            return {
                name: Received(self.iteration, [] if found is None else [found])
                for name, found in self._run(**arguments).items()
            }

        return transfer

    def batched(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """`_batched_p2p_ops`: a list of works for all of them."""

        def transfer(**arguments: Any) -> Any:
            if arguments["group"] is not self.group:
                return stock(**arguments)
            expected = [found for found in self._run(**arguments).values() if found is not None]
            return [Received(self.iteration, expected)]

        return transfer

    def shapes(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """`_communicate_shapes`: the shapes of the tensors that come next, as lists; [0, 0, 0] for none."""

        def communicate(
            communicator: Any, send_next: Tensor | None, send_prev: Tensor | None, recv_prev: bool, recv_next: bool
        ) -> Any:
            if communicator.pp_group is not self.group:
                return stock(communicator, send_next, send_prev, recv_prev, recv_next)
            sent = [None if it is None else torch.tensor(it.size(), dtype=torch.int64) for it in (send_next, send_prev)]
            came = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
            works = self._run(
                tensor_send_next=sent[0],
                tensor_send_prev=sent[1],
                tensor_recv_prev=came[0] if recv_prev else None,
                tensor_recv_next=came[1] if recv_next else None,
            )
            self.iteration.fill([found for found in works.values() if found is not None])
            return came[0].tolist(), came[1].tolist()

        return communicate

    def _run(
        self,
        *,
        tensor_send_prev: Tensor | None,
        tensor_recv_prev: Tensor | None,
        tensor_send_next: Tensor | None,
        tensor_recv_next: Tensor | None,
        **_: Any,
    ) -> dict[str, tuple[Key, Tensor] | None]:
        """Receives are posted before sends may block. None: a send, which nobody waits for."""
        found: dict[str, tuple[Key, Tensor] | None] = {}
        for name, direction, tensor in (
            ("recv_prev", Direction.ACTIVATION, tensor_recv_prev),
            ("recv_next", Direction.GRADIENT, tensor_recv_next),
        ):
            if tensor is not None:
                found[name] = self.iteration.expect_along(direction), tensor
        for name, direction, tensor in (
            ("send_next", Direction.ACTIVATION, tensor_send_next),
            ("send_prev", Direction.GRADIENT, tensor_send_prev),
        ):
            if tensor is not None:
                self.iteration.send_along(direction, tensor)
                found[name] = None
        return found


@dataclass
class Computations:
    """Megatron's steps, timed."""

    iteration: Following
    chunks: list[nn.Module]

    def forward(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def step(forward_step_func: Any, data_iterator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self.iteration.computing(Kind.FORWARD, self._chunk(model)):
                result = stock(forward_step_func, data_iterator, model, *args, **kwargs)
            if self.iteration.training:
                self._made[id(_first(result[0]))] = self._chunk(model)
            return result

        return step

    def backward(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def step(input_tensor: Any, output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
            with self.iteration.computing(Kind.FULL_BACKWARD, self._made.pop(id(_first(output_tensor)), 0)):
                return stock(input_tensor, output_tensor, *args, **kwargs)

        return step

    def combined(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """A forward merged with the backward of another microbatch counts as a backward."""

        def step(
            forward_step_func: Any,
            data_iterator: Any,
            f_model: nn.Module | None,
            num_microbatches: int,
            input_tensor: Any,
            forward_data_store: Any,
            b_model: nn.Module | None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            model = f_model if b_model is None else b_model
            kind = Kind.FORWARD if b_model is None else Kind.FULL_BACKWARD
            with self.iteration.computing(kind, self._chunk(model)):
                return stock(
                    forward_step_func,
                    data_iterator,
                    f_model,
                    num_microbatches,
                    input_tensor,
                    forward_data_store,
                    b_model,
                    *args,
                    **kwargs,
                )

        return step

    def __post_init__(self) -> None:
        self._made: dict[int, int] = {}  # chunk of each output that is still to go backwards

    def _chunk(self, model: nn.Module | None) -> int:
        return next((number for number, chunk in enumerate(self.chunks) if chunk is model), 0)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, list | tuple) else output


@contextmanager
def delegated(iteration: Following, group: Any, chunks: list[nn.Module]) -> Iterator[None]:
    """Inside, what Megatron's schedules move over the pipeline's group, the iteration moves, and what they compute, it times.

    Args:
        iteration: of the schedule that is run inside.
        group: process group of the pipeline.
        chunks: the model of this rank.
    """
    transfers, computations = Transfers(iteration, group), Computations(iteration, chunks)
    replacements: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (p2p_communication, "_p2p_ops", transfers.apart),
        (p2p_communication, "_batched_p2p_ops", transfers.batched),
        (p2p_communication.P2PCommunicator, "_communicate_shapes", transfers.shapes),
        (schedules, "forward_step", computations.forward),
        (schedules, "backward_step", computations.backward),
        (combined_1f1b, "combined_forward_backward_step", computations.combined),
    ]
    with ExitStack() as stack:
        for owner, name, replace in replacements:
            stack.enter_context(replaced(owner, name, replace(getattr(owner, name))))
        yield
