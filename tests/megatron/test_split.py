"""The split backward of Megatron's linear layers, in one process."""

from __future__ import annotations

import os

import pytest
import torch

from tests.forked import run_ranks
from tests.megatron.runs import loaded

loaded()
pytestmark = pytest.mark.multiprocess

KEY = (0, 3)


def start(rank):
    """One rank with Megatron's groups of one; returns its layers module with the switch in place, and what puts it back."""
    from adaptra_plugin.launch.megatron_cpu import install

    install()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    from adaptra_plugin.patches.megatron_split import Switch

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=torch.distributed.get_world_size())
    stock = layers.LinearWithGradAccumulationAndAsyncCommunication
    layers.LinearWithGradAccumulationAndAsyncCommunication = Switch(stock)
    torch.manual_seed(3)
    return layers, stock


class Kernels:
    """What apex's extension does, without a GPU."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x, grad_y, main_grad):
        main_grad += grad_y.t().float() @ x.float()

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def weight_of(x_dtype=torch.float32):
    weight = torch.nn.Parameter(torch.randn(6, 4, dtype=x_dtype))
    weight.main_grad = torch.zeros(6, 4)
    weight.grad_added_to_main_grad = False
    fired = []
    weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad_added_to_main_grad))
    return weight, fired


def once(layers, weight, bias, x, grad, fusion, split):
    """One forward and backward; the gradients of x and bias, and what had been fired before W."""
    from megatron.core import parallel_state

    from adaptra_plugin.patches.megatron_split import recording
    from adaptra_plugin.runtime.split import WeightQueue

    x = x.clone().requires_grad_()
    queue, group = WeightQueue(), parallel_state.get_tensor_model_parallel_group()
    arguments = (x, weight, bias, fusion, False, False, None, None, group)
    function = layers.LinearWithGradAccumulationAndAsyncCommunication
    if not split:
        function.apply(*arguments).backward(grad)
        return x.grad, bias.grad
    with recording(queue):
        y = function.apply(*arguments)
    with queue.collect(KEY):
        y.backward(grad)
    assert weight.grad is None and not weight.main_grad.any(), "nothing before W"
    queue.run(KEY)
    assert queue.microbatches == ()
    return x.grad, bias.grad


def compare(rank, fusion):
    layers, _ = start(rank)
    layers.fused_weight_gradient_mlp_cuda = Kernels
    x, grad = torch.randn(5, 3, 4), torch.randn(5, 3, 6)
    found = []
    for split in (False, True):
        torch.manual_seed(4)
        weight, fired = weight_of()
        bias = torch.nn.Parameter(torch.randn(6))
        grads = once(layers, weight, bias, x, grad, fusion, split)
        found.append((*grads, weight.main_grad.clone() if fusion else weight.grad, fired))
    stock, ours = found
    assert all(torch.equal(a, b) for a, b in zip(stock[:3], ours[:3], strict=True))
    assert stock[3] == ours[3] == [fusion]


@pytest.mark.parametrize("fusion", [False, True], ids=["plain", "gradient-accumulation-fusion"])
def test_gradients_are_those_of_stock_and_hooks_fire_once(fusion):
    run_ranks(compare, 1, fusion)


def without_a_flag(rank):
    """`gradient_accumulation_fusion` on a parameter that no data-parallel wrapper waits for: no hook fires, as in stock."""
    layers, _ = start(rank)
    layers.fused_weight_gradient_mlp_cuda = Kernels
    weight, fired = weight_of()
    del weight.grad_added_to_main_grad
    bias = torch.nn.Parameter(torch.randn(6))
    once(layers, weight, bias, torch.randn(5, 3, 4), torch.randn(5, 3, 6), True, True)
    assert weight.grad is None and weight.main_grad.any() and fired == []


def test_fused_gradients_that_nobody_waits_for():
    run_ranks(without_a_flag, 1)


def falls_back(rank):
    from megatron.core import parallel_state

    from adaptra_plugin.patches.megatron_split import recording
    from adaptra_plugin.runtime.split import WeightQueue

    layers, stock = start(rank)
    group = parallel_state.get_tensor_model_parallel_group()
    switch = layers.LinearWithGradAccumulationAndAsyncCommunication
    assert switch.forward is stock.forward, "whatever else somebody looks for is the stock Function's"
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def apply(*arguments):
            calls.append(arguments)
            return stock.apply(*arguments)

    switch.stock = Counted
    weight, _ = weight_of()
    x, queue = torch.randn(5, 4), WeightQueue()

    def call(weight=weight, buffer=None, more=()):
        return switch.apply(x, weight, None, False, False, False, buffer, 0, group, *more)

    call()  # not recording
    with recording(queue):
        call(buffer=[])  # deferred by Megatron itself
        call(weight=weight.detach())  # no parameter
        call(weight=torch.nn.Parameter(torch.randn(6, 4), requires_grad=False))  # frozen
        with torch.no_grad():
            call()
        assert len(calls) == 5
        call()
        assert len(calls) == 5
    assert not queue.active


def test_whatever_is_not_known_runs_as_in_stock():
    run_ranks(falls_back, 1)


def linear(delays):
    from tests.megatron.layers import DelayedLinear

    config = type("Config", (), {"params_dtype": torch.float32, "delay_wgrad_compute": delays})
    return DelayedLinear(4, 4, config=config, init_method=torch.nn.init.zeros_)


def counts(rank):
    from adaptra_plugin.patches.megatron_split import Delayed, MegatronSplit

    old = linear(True)  # before Transformer Engine 2.4 the store alone says so
    old.need_backward_dw = None
    chunks = [
        torch.nn.ModuleList([linear(True), linear(False), torch.nn.LayerNorm(4)]),
        torch.nn.ModuleList([old]),
    ]
    delayed = Delayed(chunks)
    report = MegatronSplit(chunks, delayed).report
    assert len(delayed) == 2 and report.split == 2 and report.fused == {"DelayedLinear": 1, "LayerNorm": 1}
    stores = [layer.wgrad_store.context for layer in (chunks[0][0], old)]
    for store in stores:
        store.put((torch.ones(2, 1, 4), torch.ones(2, 1, 4)))
    delayed.run(0)
    assert [store.qsize() for store in stores] == [0, 1] and chunks[0][0].weight.grad.eq(2).all()
    delayed.discard()
    assert stores[1].empty(), "nothing of a failed iteration stays"


def test_layers_that_delay_by_themselves_are_asked_for_their_gradients_and_others_are_counted():
    run_ranks(counts, 1)
