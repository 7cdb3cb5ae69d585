"""Stand-ins for the few CUDA calls that Megatron-core makes outside of kernels, so that its layers run on CPU ranks with gloo.

For the demo trainer and for tests, in processes of their own; nothing of the plug-in needs it. Megatron asks for the current
device, makes tensors on "cuda", draws dropout from CUDA generators (here: the CPU's), and synchronises streams.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_installed: list[Any] = []


class _OnCpu(TorchFunctionMode):
    """Whatever is to be made on a CUDA device is made in host memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class _NoStream:
    """All work on a CPU is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> _NoStream:
        return self


def _sizes(tensor: Any, as_numpy: bool = False, **more: Any) -> Any:
    """What the dispatcher of tokens takes from the device to size an exchange by."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _prepare_experts() -> None:
    """Mixture of experts: the router looks for a kernel of Transformer Engine without asking whether that is installed."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        vars(moe_utils)["te_general_gemm"] = None
    vars(token_dispatcher)["maybe_move_tensor_to_cpu"] = _sizes


def install() -> None:
    """Once a process, before a model is built; does nothing where there are CUDA devices."""
    if _installed or torch.cuda.is_available():
        return
    import megatron.core.tensor_parallel.random as random

    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream = _NoStream
    cuda.current_stream = cuda.default_stream = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    name_of = torch.Tensor.type

    def type_of(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = name_of(tensor, *args, **kwargs)  # the clipping of gradients insists on "torch.cuda.FloatTensor"
        return f"torch.cuda.{found.rpartition('.')[2]}" if isinstance(found, str) else found

    torch.Tensor.type = type_of  # type: ignore[method-assign,assignment]
    for name in ("FloatTensor", "IntTensor", "LongTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(cuda, name, getattr(torch, name))
    _prepare_experts()
    mode = _OnCpu()
    mode.__enter__()
    _installed.append(mode)
