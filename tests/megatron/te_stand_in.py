"""A stand-in for Transformer Engine, which needs CUDA: its layers as far as their interface tells, computed by torch.

The protocol is that of Transformer Engine 2.3 to 2.18: `WeightGradStore`, `delay_wgrad_compute`, `backward_dw`,
`fuse_wgrad_accumulation` with `main_grad` and `grad_added_to_main_grad`, `register_wgrad_accumulation_and_reduce_hooks`. The
kernels, fp8 and communication are not there. `Quantised` stands for inputs that are saved in an object which is no tensor.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


class WeightGradStore:
    """Where a backward leaves what weight gradients need: first in, first out."""

    def __init__(self, delay_wgrad_compute: bool = False, ub_bulk_wgrad: bool = False) -> None:
        assert not (delay_wgrad_compute and ub_bulk_wgrad)
        self.context: queue.Queue[Any] | None = queue.Queue() if delay_wgrad_compute else None
        self.enabled = delay_wgrad_compute

    def delay_wgrad_compute(self) -> bool:
        return self.enabled

    def put(self, tensor_list: list[Any], func: Callable[..., Any]) -> None:
        assert self.enabled and self.context is not None
        self.context.put([tensor_list, func])

    def pop(self) -> Any:
        assert self.enabled and self.context is not None
        tensor_list, func = self.context.get_nowait()
        return func(*tensor_list), tensor_list


class Quantised:
    """A matrix in 8 bits."""

    def __init__(self, x: Tensor) -> None:
        self._scale = x.abs().amax().float() / 127 + 1e-12
        self._data = (x / self._scale).round().to(torch.int8)
        self._dtype = x.dtype

    def dequantize(self) -> Tensor:
        return (self._data * self._scale).to(self._dtype)


def _whole(x: Any) -> Tensor:
    return x.dequantize() if isinstance(x, Quantised) else x


class _Saved:
    """What the Functions save of a weight: as of 2.18, the object itself is referred to weakly."""

    def __init__(self, weight: Tensor, fused: bool, first: bool | None = None) -> None:
        self.needed, self.fused = weight.requires_grad, fused
        self.overwrites = bool(first)
        self.reference = weakref.ref(weight)

    def origin(self) -> Any:
        weight = self.reference()
        assert weight is not None, "weight was removed while fuse_wgrad_accumulation=True"
        return weight


def _placeholder(weight: Any) -> Tensor | None:
    """What autograd gets for a gradient that has been or will be added to `main_grad`: nothing that may be used."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    value = 0.0 if getattr(weight, "zero_out_wgrad", False) else float("nan")
    return torch.full(weight.main_grad.shape, value, dtype=weight.dtype, device=weight.device)


def _weight_gradient(
    store: Any, saved: _Saved, x: Any, dy: Any, with_bias: bool, bias_gradient: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of the weight, of the bias) for autograd. That of the bias is computed together with the weight's if it has not
    come with the quantisation of the output's gradient."""
    if not saved.needed:
        return None, bias_gradient
    main_grad = saved.origin().main_grad if saved.fused else None
    together = with_bias and bias_gradient is None

    @torch.no_grad()
    def gemm(x: Any, dy: Any) -> tuple[Tensor, Tensor | None]:
        dy = _whole(dy)
        dw = dy.t() @ _whole(x)
        if main_grad is not None:
            _ = main_grad.copy_(dw) if saved.overwrites else main_grad.add_(dw)
        return dw, dy.sum(0) if together else None

    dw: Tensor | None = None
    if store is not None and store.delay_wgrad_compute():
        store.put([x, dy], gemm)
    else:
        dw, computed = gemm(x, dy)
        bias_gradient = computed if together else bias_gradient
    return _placeholder(saved.origin()) if saved.fused else dw, bias_gradient


class _LayerNormLinear(torch.autograd.Function):
    """With `norm` None: without the norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Any,
        gamma: Any,
        beta: Any,
        layer: Any,
        store: Any,
        first: bool | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.shape, ctx.bias, ctx.store, ctx.quantised = x.shape, bias is not None, store, layer.quantised
        ctx.saved, ctx.norm = _Saved(weight, layer.fuse_wgrad_accumulation, first), gamma is not None
        mean = rstd = None
        normed = flat
        if gamma is not None:
            normed, mean, rstd = torch.native_layer_norm(flat, flat.shape[-1:], gamma, beta, EPS)
        ctx.kept = Quantised(normed) if layer.quantised else None
        ctx.save_for_backward(
            weight, None if layer.quantised else normed, flat if ctx.norm else None, mean, rstd, gamma, beta
        )
        y = F.linear(_whole(normed if ctx.kept is None else ctx.kept), weight, bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, normed, flat, mean, rstd, gamma, beta = ctx.saved_tensors
        dy: Any = grads[0].reshape(-1, grads[0].shape[-1])
        dx: Tensor = dy @ weight
        from_norm = (None, None)
        bias_gradient = None
        if ctx.quantised:
            bias_gradient = dy.sum(0) if ctx.bias else None
            dy, normed = Quantised(dy), ctx.kept
        if ctx.norm:
            dx, *from_norm = torch.ops.aten.native_layer_norm_backward(
                dx, flat, flat.shape[-1:], mean, rstd, gamma, beta, [True, True, True]
            )
        wgrad, bgrad = _weight_gradient(ctx.store, ctx.saved, normed, dy, ctx.bias, bias_gradient)
        return dx.view(ctx.shape) if ctx.needs_input_grad[0] else None, wgrad, bgrad, *from_norm, None, None, None


class _LayerNormMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Any, beta: Any, w1: Any, b1: Any, w2: Any, b2: Any, layer: Any, store: Any
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.shape, ctx.biases, ctx.store = x.shape, (b1 is not None, b2 is not None), store
        ctx.saved = [_Saved(weight, layer.fuse_wgrad_accumulation) for weight in (w1, w2)]
        normed, mean, rstd = torch.native_layer_norm(flat, flat.shape[-1:], gamma, beta, EPS)
        inner = F.linear(normed, w1, b1)
        active = F.gelu(inner)
        ctx.save_for_backward(flat, mean, rstd, gamma, beta, normed, inner, active, w1, w2)
        return F.linear(active, w2, b2).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        flat, mean, rstd, gamma, beta, normed, inner, active, w1, w2 = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        second = _weight_gradient(ctx.store, ctx.saved[1], active, dy, ctx.biases[1])
        d_inner = torch.ops.aten.gelu_backward(dy @ w2, inner)
        first = _weight_gradient(ctx.store, ctx.saved[0], normed, d_inner, ctx.biases[0])
        dx, *from_norm = torch.ops.aten.native_layer_norm_backward(
            d_inner @ w1, flat, flat.shape[-1:], mean, rstd, gamma, beta, [True, True, True]
        )
        return dx.view(ctx.shape) if ctx.needs_input_grad[0] else None, *from_norm, *first, *second, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, splits: list[int], layer: Any, store: Any, *tensors: Tensor) -> Tensor:
        weights, biases = tensors[: len(splits)], tensors[len(splits) :]
        ctx.splits, ctx.store, ctx.bias, ctx.older = splits, store, bool(biases), layer.older
        ctx.saved = [_Saved(weight, layer.fuse_wgrad_accumulation) for weight in weights]
        ctx.save_for_backward(x, *weights)
        parts = zip(x.split(splits), weights, biases or [None] * len(splits), strict=True)
        return torch.cat([F.linear(part, weight, bias) for part, weight, bias in parts])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        dys = list(grads[0].split(ctx.splits))
        dx = torch.cat([dy @ weight for dy, weight in zip(dys, weights, strict=True)])
        fused = ctx.saved[0].fused
        origins = [saved.origin() for saved in ctx.saved]
        # uninitialised as long as it is delayed, and returned as it is
        wgrads = [w.main_grad if fused else torch.full_like(w, float("nan")) for w in origins]

        @torch.no_grad()
        def gemm(xs: list[Tensor], dys: list[Tensor], out: list[Tensor]) -> tuple[Any, list[Any], None]:
            for part, dy, to in zip(xs, dys, out, strict=True):
                dw = dy.t() @ part
                _ = to.add_(dw) if fused else to.copy_(dw)
            return out, [dy.sum(0) if ctx.bias else None for dy in dys], None

        biases: list[Any] = [None] * len(dys)
        if ctx.store is not None and ctx.store.delay_wgrad_compute():
            ctx.store.put([list(x.split(ctx.splits)), dys, wgrads], gemm)
        else:
            _, biases, _ = gemm(list(x.split(ctx.splits)), dys, wgrads)
        given: list[Any] = [_placeholder(w) for w in origins] if fused else wgrads
        if ctx.older and ctx.store.delay_wgrad_compute():
            given = [None] * len(dys)
        return dx, None, None, None, *given, *(biases if ctx.bias else [])


class _Layer(nn.Module):
    """What all layers have in common."""

    names: tuple[str, ...] = ("weight", "bias")

    def __init__(self, fuse: bool, delay: bool, return_bias: bool, quantised: bool, ub_bulk_wgrad: bool) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation, self.quantised = fuse, quantised
        self.return_bias, self.apply_bias = return_bias, not return_bias
        self.gemm_bias_unfused_add = False
        self.ub_bulk_wgrad = ub_bulk_wgrad
        self.wgrad_store = WeightGradStore(delay, ub_bulk_wgrad)
        self.wgrad_accumulation_and_reduce_hooks: list[Callable[[], None]] = []

    def _own(self, name: str, *shape: int, dtype: torch.dtype, value: Callable[[Tensor], Any] | float = 0.0) -> None:
        parameter = nn.Parameter(torch.empty(*shape, dtype=dtype))
        (value if callable(value) else lambda tensor: nn.init.constant_(tensor, value))(parameter)
        self.register_parameter(name, parameter)
        if self.wgrad_store.delay_wgrad_compute() and name in self.names:
            parameter.skip_backward_post_hook = True

    def need_backward_dw(self) -> bool:
        return self.wgrad_store is not None and self.wgrad_store.delay_wgrad_compute()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        self.wgrad_accumulation_and_reduce_hooks.append(hook)

    def _take(self, weights: list[str], biases: list[str], dws: Any, dbs: Any) -> None:
        parameters: Any = self._parameters
        for name, dw in zip(weights, dws, strict=True):
            if not self.fuse_wgrad_accumulation:
                parameters[name].grad = dw
        for name, db in zip(biases, dbs, strict=True):
            if parameters.get(name) is not None and parameters[name].grad is None:
                parameters[name].grad = db

    def backward_dw(self) -> None:
        if self.need_backward_dw():
            (dw, db), _ = self.wgrad_store.pop()
            self._take(["weight"], ["bias"], [dw], [db])
            self._run_hooks()

    def _run_hooks(self) -> None:
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()


class Linear(_Layer):
    """`te.pytorch.Linear`; with `norm`: `LayerNormLinear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        norm: bool = False,
        return_bias: bool = False,
        params_dtype: torch.dtype = torch.float32,
        init_method: Callable[[Tensor], Any] = nn.init.xavier_normal_,
        fuse_wgrad_accumulation: bool = False,
        delay_wgrad_compute: bool = False,
        ub_bulk_wgrad: bool = False,
        quantised: bool = False,
    ) -> None:
        super().__init__(fuse_wgrad_accumulation, delay_wgrad_compute, return_bias, quantised, ub_bulk_wgrad)
        self.norm = norm
        if norm:
            self._own("layer_norm_weight", in_features, dtype=params_dtype, value=1.0)
            self._own("layer_norm_bias", in_features, dtype=params_dtype)
        self._own("weight", out_features, in_features, dtype=params_dtype, value=init_method)
        if bias:
            self._own("bias", out_features, dtype=params_dtype)
        else:
            self.bias = torch.empty(0)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        bias = self.bias if self.bias.numel() else None
        inside = bias if self.apply_bias else None
        norm = (self.layer_norm_weight, self.layer_norm_bias) if self.norm else (None, None)
        # as of 2.18: a store that delays nothing is no store
        store = self.wgrad_store if self.wgrad_store.delay_wgrad_compute() else None
        y = _LayerNormLinear.apply(x, self.weight, inside, *norm, self, store, is_first_microbatch)
        return (y, bias) if self.return_bias else y


class LayerNormMLP(_Layer):
    """`te.pytorch.LayerNormMLP`."""

    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        return_bias: bool = False,
        params_dtype: torch.dtype = torch.float32,
        init_method: Callable[[Tensor], Any] = nn.init.xavier_normal_,
        fuse_wgrad_accumulation: bool = False,
        delay_wgrad_compute: bool = False,
    ) -> None:
        super().__init__(fuse_wgrad_accumulation, delay_wgrad_compute, return_bias, False, False)
        self._own("layer_norm_weight", hidden_size, dtype=params_dtype, value=1.0)
        self._own("layer_norm_bias", hidden_size, dtype=params_dtype)
        self._own("fc1_weight", ffn_hidden_size, hidden_size, dtype=params_dtype, value=init_method)
        self._own("fc1_bias", ffn_hidden_size, dtype=params_dtype)
        self._own("fc2_weight", hidden_size, ffn_hidden_size, dtype=params_dtype, value=init_method)
        self._own("fc2_bias", hidden_size, dtype=params_dtype)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        last = self.fc2_bias if self.apply_bias else None
        tensors = (self.layer_norm_weight, self.layer_norm_bias, self.fc1_weight, self.fc1_bias, self.fc2_weight, last)
        y = _LayerNormMLP.apply(x, *tensors, self, self.wgrad_store)
        return (y, self.fc2_bias) if self.return_bias else y

    def backward_dw(self) -> None:
        if self.need_backward_dw():
            for name in ("fc2", "fc1"):
                (dw, db), _ = self.wgrad_store.pop()
                self._take([f"{name}_weight"], [f"{name}_bias"], [dw], [db])
            self._run_hooks()


class GroupedLinear(_Layer):
    """`te.pytorch.GroupedLinear`; `older`: as before 2.8, it hands autograd nothing if it delays."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        params_dtype: torch.dtype = torch.float32,
        init_method: Callable[[Tensor], Any] = nn.init.xavier_normal_,
        fuse_wgrad_accumulation: bool = False,
        delay_wgrad_compute: bool = False,
        older: bool = False,
    ) -> None:
        self.names = tuple(f"{name}{n}" for name in ("weight", "bias") for n in range(num_gemms))
        super().__init__(fuse_wgrad_accumulation, delay_wgrad_compute, False, False, False)
        self.num_gemms, self.older = num_gemms, older
        self.use_bias = bias
        for n in range(num_gemms):
            self._own(f"weight{n}", out_features, in_features, dtype=params_dtype, value=init_method)
        for n in range(num_gemms if bias else 0):
            self._own(f"bias{n}", out_features, dtype=params_dtype)

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Any:
        tensors = [self._parameters[name] for name in self.names if name in self._parameters]
        return _GroupedLinear.apply(x, m_splits, self, self.wgrad_store, *tensors)

    def backward_dw(self) -> None:
        if self.need_backward_dw():
            (_, dbs, _), tensors = self.wgrad_store.pop()
            numbers = range(self.num_gemms)
            self._take([f"weight{n}" for n in numbers], [f"bias{n}" for n in numbers], tensors[2], dbs)
            self._run_hooks()
