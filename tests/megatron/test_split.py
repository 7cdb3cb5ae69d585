"""The split backward of Megatron's linear layers, in one process."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

from tests.forked import run_ranks
from tests.megatron.layers import Kernels
from tests.megatron.runs import loaded

loaded()
pytestmark = pytest.mark.multiprocess

KEY = (0, 3)


def start(rank):
    """One rank with Megatron's groups of one; returns its layers module."""
    from adaptra_plugin.launch.megatron_cpu import install

    install()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=torch.distributed.get_world_size())
    torch.manual_seed(3)
    return layers


def split_of(weight, run):
    """A split of a model of one weight, which has been observed in `run()`, called while it records."""
    from adaptra_plugin.patches.megatron_split import MegatronSplit
    from adaptra_plugin.patches.megatron_te import TransformerEngineLayers
    from adaptra_plugin.runtime.weight_grad_store import WeightGradStore

    queue, chunk = WeightGradStore(), torch.nn.Module()
    chunk.weight = weight
    split = MegatronSplit([chunk], TransformerEngineLayers([chunk]), queue)
    with split.recording():
        y = run()
    with queue.collect("observed"):
        y.sum().backward()
    queue.run("observed")
    split.finalize()
    weight.grad = None
    split.model = chunk  # which nothing else keeps
    return queue, split


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

    group = parallel_state.get_tensor_model_parallel_group()

    def call(x):
        function = layers.LinearWithGradAccumulationAndAsyncCommunication
        return function.apply(x, weight, bias, fusion, False, False, None, None, group)

    x = x.clone().requires_grad_()
    if not split:
        call(x).backward(grad)
        return x.grad, bias.grad
    queue, layer = split_of(weight, lambda: call(x.detach()))
    weight.main_grad, bias.grad = torch.zeros(6, 4), None
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = False
    with layer.recording():
        y = call(x)
    with queue.collect(KEY):
        y.backward(grad)
    assert weight.grad is None and not weight.main_grad.any(), "nothing before W"
    queue.run(KEY)
    assert queue.microbatches == ()
    return x.grad, bias.grad


def compare(rank, fusion):
    layers = start(rank)
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
    assert stock[3] == [fusion] and ours[3] == [fusion] * 2, "once a microbatch; ours has been observed before"


@pytest.mark.parametrize("fusion", [False, True], ids=["plain", "gradient-accumulation-fusion"])
def test_gradients_are_those_of_stock_and_hooks_fire_once(fusion):
    run_ranks(compare, 1, fusion)


def without_a_flag(rank):
    layers = start(rank)
    layers.fused_weight_gradient_mlp_cuda = Kernels
    x, grad, found = torch.randn(5, 3, 4), torch.randn(5, 3, 6), []
    for split in (False, True):
        torch.manual_seed(4)
        weight, _ = weight_of()
        del weight.grad_added_to_main_grad
        weight._post_accumulate_grad_hooks.clear()
        fired = []
        weight.register_post_accumulate_grad_hook(lambda p, fired=fired: fired.append(p.grad))
        bias = torch.nn.Parameter(torch.randn(6))
        once(layers, weight, bias, x, grad, True, split)
        found.append((weight.main_grad, weight.grad, fired))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] is found[1][1] is None
    assert found[0][2] == [None] and found[1][2] == [None] * 2, "once a microbatch; ours has been observed before"


def test_fused_gradients_that_no_data_parallel_wrapper_waits_for():
    """`gradient_accumulation_fusion` on a parameter without a flag: hooks fire and find nothing, as in stock."""
    run_ranks(without_a_flag, 1)


def falls_back(rank):
    from megatron.core import parallel_state

    layers = start(rank)
    group = parallel_state.get_tensor_model_parallel_group()
    stock = layers.LinearWithGradAccumulationAndAsyncCommunication
    weight, _ = weight_of()
    x, known = torch.randn(5, 4), [0]

    def call(weight=weight, buffer=None, more=()):
        function = layers.LinearWithGradAccumulationAndAsyncCommunication
        return function.apply(x, weight, None, False, False, False, buffer, 0, group, *more)

    _, split = split_of(weight, call)

    def splits(**arguments):
        y = call(**arguments)
        return y.grad_fn is not None and "Split" in y.grad_fn.name()

    assert not splits(), "not recording"
    with split.recording():
        stand_in = layers.LinearWithGradAccumulationAndAsyncCommunication
        assert stand_in.forward is stock.forward, "whatever else somebody looks for is the stock Function's"
        assert not splits(buffer=[]), "deferred by Megatron itself"
        assert not splits(weight=weight.detach()), "no parameter"
        assert not splits(weight=torch.nn.Parameter(torch.randn(6, 4))), "not of the model"
        with torch.no_grad():
            assert not splits()
        assert splits()
    assert layers.LinearWithGradAccumulationAndAsyncCommunication is stock

    class Theirs(stock):  # a subclass, put in place by another package after the plug-in
        @staticmethod
        def forward(ctx, *arguments):
            known[0] += 1
            return stock.forward(ctx, *arguments)

    layers.LinearWithGradAccumulationAndAsyncCommunication = Theirs
    with split.recording():
        assert not splits() and known == [1], "theirs is called, whole"
    assert layers.LinearWithGradAccumulationAndAsyncCommunication is Theirs


def test_whatever_is_not_known_runs_as_in_stock():
    run_ranks(falls_back, 1)


def layouts(rank):
    """Inputs and gradients of all layouts, with and without bias, in one process; one iteration is observed, one is split."""
    import random

    from megatron.core import parallel_state

    from benchmarks.fuzz_layers import LAYOUTS, laid_out

    layers = start(rank)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.set_num_threads(1)

    def call(x, weight, bias):
        function = layers.LinearWithGradAccumulationAndAsyncCommunication
        return function.apply(x, weight, bias, False, False, False, None, None, group)

    def run(number, split):
        from adaptra_plugin.patches.megatron_split import MegatronSplit
        from adaptra_plugin.patches.megatron_te import TransformerEngineLayers
        from adaptra_plugin.runtime.weight_grad_store import WeightGradStore

        choose = random.Random(number)
        torch.manual_seed(number)
        dtype = choose.choice([torch.float32, torch.bfloat16, torch.float64])
        size = [choose.choice([1, 2, 3, 5, 8, 16]) for _ in range(4)]
        chunk, queue = torch.nn.Module(), WeightGradStore()
        chunk.weight = torch.nn.Parameter(torch.randn(size[3], size[2], dtype=dtype))
        chunk.bias = torch.nn.Parameter(torch.randn(size[3], dtype=dtype)) if choose.random() < 0.5 else None
        model = MegatronSplit([chunk], TransformerEngineLayers([chunk]), queue)
        seen = []
        for m in range(6):
            shape = size[: choose.choice([1, 2])]
            x = laid_out((*shape, size[2]), choose.choice(LAYOUTS), dtype, choose).detach().requires_grad_()
            grad = laid_out((*shape, size[3]), choose.choice(LAYOUTS), dtype, choose)
            with model.recording() if split else contextlib.nullcontext():
                y = call(x, chunk.weight, chunk.bias)
            with queue.collect(m):
                y.backward(grad)
            assert len(queue._waiting[m]) == (1 if split and m >= 2 else 0)
            if m % 2:
                queue.run(m - 1)
                queue.run(m)
                model.finalize()
            seen += [y.detach(), x.grad]
        model.remove()
        return [*seen, *(p.grad for p in chunk.parameters())]

    for number in range(150):
        stock, ours = run(number, False), run(number, True)
        differ = [index for index, (a, b) in enumerate(zip(stock, ours, strict=True)) if not torch.equal(a, b)]
        assert not differ, f"number {number}: {differ} of y and the gradients of x, six times, and of weight and bias"


def test_every_layout_gives_the_bits_of_stock():
    run_ranks(layouts, 1)
