"""Layers that compute the gradients of their weights themselves, as those of Megatron-DeepSpeed do, run split."""

from __future__ import annotations

import os

import pytest
import torch

from adaptra_plugin.patches.deepspeed_split import PipelineSplit
from adaptra_plugin.runtime.split import SplitReport
from adaptra_plugin.runtime.weight_grad_store import WeightGradStore
from tests.forked import run_ranks
from tests.patches import parallel_layers

NAME = "LinearWithGradAccumulationAndAsyncCommunication"
CASES = {
    "bias": {"bias": True, "allreduce": False, "spread": False},
    "no bias": {"bias": False, "allreduce": False, "spread": False},
    "the input's gradient is summed": {"bias": True, "allreduce": True, "spread": False},
    "sequence parallel": {"bias": True, "allreduce": False, "spread": True},
}


def train(rank, case, dtype, split):
    """Gradients after three microbatches, of the inputs and of the parameters; before W, and at the end."""
    torch.manual_seed(5 + rank)
    model = torch.nn.Sequential(
        parallel_layers.ColumnParallelLinear(8, 6, dtype=dtype, **case),
        torch.nn.GELU(),
        torch.nn.Linear(6, 8, dtype=dtype),
    )
    queue = WeightGradStore()
    layers = PipelineSplit(model, queue) if split else None
    inputs = [torch.randn(4, 3, 8, dtype=dtype) for _ in range(3)]
    found = []
    for number, x in enumerate(inputs):
        x.requires_grad_()
        if layers is None:
            model(x).float().square().sum().backward()
        else:
            layers.begin()
            with layers.recording():
                y = model(x)
            with queue.collect(number):
                y.float().square().sum().backward()
            assert number == 0 or all(p.grad is None for p in (model[0].weight, model[2].weight)), "before W"
            queue.run(number)
            layers.finalize()
        found += [x.grad, *(p.grad.clone() for p in model.parameters())]
        model.zero_grad()
    if layers is not None:
        assert layers.report == SplitReport(2, {})
        layers.remove()
    return found


def compare(rank):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    for name, case in CASES.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            stock, ours = (train(rank, case, dtype, split) for split in (False, True))
            assert len(stock) == len(ours), name
            assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True)), f"{name}, {dtype}"


def test_gradients_are_those_of_the_function():
    run_ranks(compare, 2)


def test_they_are_expected_to_run_split_and_the_name_is_put_back():
    model = parallel_layers.ColumnParallelLinear(8, 6, dtype=torch.float32, **CASES["bias"])
    stock = getattr(parallel_layers, NAME)
    layers = PipelineSplit(model, WeightGradStore())
    assert layers.report == SplitReport(1, {})
    with layers.recording():
        assert getattr(parallel_layers, NAME) is not stock
        assert getattr(parallel_layers, NAME).forward is stock.forward
    assert getattr(parallel_layers, NAME) is stock


def test_what_somebody_else_has_put_there_stays(monkeypatch: pytest.MonkeyPatch):
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *arguments):
            return x

    monkeypatch.setattr(parallel_layers, NAME, Other)
    model = parallel_layers.ColumnParallelLinear(8, 6, dtype=torch.float32, **CASES["bias"])
    layers = PipelineSplit(model, WeightGradStore())
    with layers.recording():
        assert getattr(parallel_layers, NAME) is Other
    assert layers.report == SplitReport(0, {"ColumnParallelLinear": 1})


def test_a_weight_with_a_main_gradient_runs_fused():
    """The Function may add to `main_grad` by itself."""
    model = parallel_layers.ColumnParallelLinear(8, 6, dtype=torch.float32, **CASES["bias"])
    model.weight.main_grad = torch.zeros(6, 8)
    queue = WeightGradStore()
    layers = PipelineSplit(model, queue)
    for number in range(2):
        model.zero_grad()
        with layers.recording():
            y = model(torch.randn(2, 8))
        with queue.collect(number):
            y.sum().backward()
        assert model.weight.grad is not None, "before W"
        queue.run(number)
        layers.finalize()
