"""The split backward gives the bits of the fused one, fires the same hooks, and can be taken out again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.runtime.split import SplitLinears, WeightQueue


def run_fused(module, batches):
    module.zero_grad(set_to_none=True)
    inputs = []
    for x, g in batches:
        x = x.clone().requires_grad_(x.is_floating_point())
        module(x).backward(g)
        inputs.append(x.grad)
    return inputs, [p.grad.clone() for p in module.parameters()]


def run_split(module, batches, order=None):
    """All I first, then all W in order: the extreme case of deferral."""
    module.zero_grad(set_to_none=True)
    queue = WeightQueue()
    split = SplitLinears(module, queue)
    inputs = []
    for m, (x, g) in enumerate(batches):
        x = x.clone().requires_grad_(x.is_floating_point())
        with queue.recording():
            y = module(x)
        with queue.collect(m):
            y.backward(g)
        inputs.append(x.grad)
    for m in order or range(len(batches)):
        queue.run(m)
    grads = [p.grad.clone() for p in module.parameters()]
    split.remove()
    return inputs, grads, split.report


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 16), (2, 7, 16), (2, 3, 4, 16), (16,)])
@pytest.mark.parametrize("bias", [True, False])
def test_bits_equal_the_fused_backward(dtype, shape, bias):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(16, 24, bias=bias), nn.GELU(), nn.Linear(24, 16, bias=bias)).to(dtype)
    batches = [(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)) for _ in range(4)]
    inputs, grads = run_fused(module, batches)
    split_inputs, split_grads, report = run_split(module, batches)
    assert report.split == 2 and report.fused == {}
    assert same(inputs, split_inputs) and same(grads, split_grads)


def test_non_contiguous_inputs():
    torch.manual_seed(2)
    module = nn.Linear(8, 8)
    batches = [(torch.randn(6, 3, 8).transpose(0, 1), torch.randn(3, 6, 8)) for _ in range(3)]
    inputs, grads = run_fused(module, batches)
    split_inputs, split_grads, _ = run_split(module, batches)
    assert same(inputs, split_inputs) and same(grads, split_grads)


def test_a_layer_used_twice_in_a_microbatch():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(torch.tanh(self.a(x)))

    torch.manual_seed(3)
    module = Twice()
    batches = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(5)]
    inputs, grads = run_fused(module, batches)
    split_inputs, split_grads, report = run_split(module, batches)
    assert report.split == 1
    assert same(inputs, split_inputs) and same(grads, split_grads)


class Tied(nn.Module):
    """A head that shares its weight with an embedding of the same stage."""

    def __init__(self, functional: bool, late: bool = False):
        super().__init__()
        self.late = late
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if functional:
            self.embed.weight = nn.Parameter(torch.zeros(0))  # its own parameter is not used
            self.table = lambda: self.head.weight
        else:
            self.embed.weight = self.head.weight
            self.table = lambda: self.embed.weight

    def forward(self, tokens):
        if self.late:  # the linear layer first: its backward runs last
            return self.head(nn.functional.one_hot(tokens % 8, 8).float()) @ self.table()
        return self.head(torch.tanh(nn.functional.embedding(tokens, self.table())))


def test_weights_shared_between_modules_stay_fused():
    module = Tied(functional=False)
    assert SplitLinears(module, WeightQueue()).report.split == 0


@pytest.mark.parametrize("late", [False, True])
def test_weights_also_used_by_a_function_are_found_in_the_first_iteration(caplog, late):
    torch.manual_seed(4)
    module = Tied(functional=True, late=late)
    queue = WeightQueue()
    split = SplitLinears(module, queue)
    queue.watch(split.weights)

    def step(m):
        with queue.recording():
            y = module(torch.randint(0, 11, (5,)))
        with queue.collect(m):
            y.backward(torch.ones_like(y))
        waiting = len(queue._waiting[m])
        queue.run(m)
        return waiting

    assert step(0) == step(1) == 1, "nothing changes within an iteration"
    queue.settle()
    assert "not split any more" in caplog.text
    assert step(2) == 0, "from the second iteration on the weight runs fused"


def test_hooks_fire_once_a_microbatch_in_w():
    module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    fired = []
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    queue = WeightQueue()
    split = SplitLinears(module, queue)
    with queue.recording():
        y = module(torch.randn(3, 8))
    with queue.collect(0):
        y.sum().backward()
    assert sorted(fired) == ["0.bias", "0.weight", "1.bias"]
    assert split.report.fused == {"LayerNorm": 1}
    queue.run(0)
    assert fired[-1] == "1.weight" and len(fired) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    torch.manual_seed(5)
    inner = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 8))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    module = Checkpointed()
    batches = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3)]
    torch.manual_seed(6)
    inputs, grads = run_fused(module, batches)
    torch.manual_seed(6)
    # recomputation happens inside the backward, where recording must be on again
    split_inputs, split_grads, report = run_split_recording_in_backward(module, batches)
    assert report.split == 2
    assert same(inputs, split_inputs) and same(grads, split_grads)


def run_split_recording_in_backward(module, batches):
    module.zero_grad(set_to_none=True)
    queue = WeightQueue()
    split = SplitLinears(module, queue)
    inputs = []
    for m, (x, g) in enumerate(batches):
        x = x.clone().requires_grad_()
        with queue.recording():
            y = module(x)
        with queue.recording(), queue.collect(m):
            y.backward(g)
        assert len(queue._waiting[m]) == 2
        inputs.append(x.grad)
    for m in range(len(batches)):
        queue.run(m)
    grads = [p.grad.clone() for p in module.parameters()]
    split.remove()
    return inputs, grads, split.report


def test_autocast_and_frozen_weights_fall_back():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module[0].weight.requires_grad_(False)
    queue = WeightQueue()
    SplitLinears(module, queue)
    with queue.recording(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(torch.randn(2, 8))
    with queue.collect(0):
        y.float().sum().backward()
    assert queue._waiting[0] == [] and module[1].weight.grad is not None
    queue.run(0)
    with queue.recording():
        y = module(torch.randn(2, 8))
    with queue.collect(1):
        y.sum().backward()
    assert len(queue._waiting[1]) == 1, "the frozen weight has no W"


def test_two_outputs_that_share_a_layer_accumulate_one_by_one():
    """The host runs one backward per output: autograd accumulates twice."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x)
            return torch.tanh(y), torch.sin(self.a(y))

    def run(split):
        torch.manual_seed(8)
        module, queue = Two(), WeightQueue()
        if split:
            SplitLinears(module, queue)
        for m in range(4):
            x = torch.randn(5, 8)
            with queue.recording():
                first, second = module(x)
            with queue.collect(m):
                first.backward(torch.ones(5, 8), retain_graph=True)
                second.backward(torch.full((5, 8), 0.3))
            queue.run(m)
        return [p.grad for p in module.parameters()]

    assert same(run(split=False), run(split=True))


def test_complex_layers_run_fused():
    module = nn.Linear(4, 4, dtype=torch.complex64)
    batches = [(torch.randn(3, 4, dtype=torch.complex64), torch.randn(3, 4, dtype=torch.complex64))]
    _, grads = run_fused(module, batches)
    _, split_grads, _ = run_split(module, batches)
    assert same(grads, split_grads)


def test_differentiating_inside_the_forward_is_an_error_with_a_remedy():
    module, queue = nn.Linear(4, 1), WeightQueue()
    SplitLinears(module, queue)
    x = torch.randn(3, 4, requires_grad=True)
    with queue.recording(), pytest.raises(UnsupportedError, match='"split_backward": false'):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)


def test_remove_restores_every_layer():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    split = SplitLinears(module, WeightQueue())
    assert all("forward" in vars(layer) for layer in module)
    split.remove()
    assert not any("forward" in vars(layer) for layer in module)


def test_the_first_stage_needs_no_input_gradient():
    torch.manual_seed(7)
    module = nn.Linear(8, 8)
    queue = WeightQueue()
    SplitLinears(module, queue)
    with queue.recording():
        y = module(torch.randn(2, 8))
    with queue.collect(0):
        y.sum().backward()
    assert module.weight.grad is None
    queue.run(0)
    assert module.weight.grad is not None


def test_misuse_is_an_error():
    queue = WeightQueue()
    with queue.collect(0):
        pass
    with pytest.raises(RuntimeError, match="microbatch 0 already waits"), queue.collect(0):
        pass
