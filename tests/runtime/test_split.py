"""The split backward gives the bits of the fused one, fires the same hooks, and can be taken out again."""

from __future__ import annotations

import contextlib
import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.runtime.split import SplitLinears
from adaptra_plugin.runtime.weight_grad_store import WeightGradStore


def run_fused(module, batches):
    module.zero_grad(set_to_none=True)
    inputs = []
    for x, g in batches:
        x = x.clone().requires_grad_(x.is_floating_point())
        module(x).backward(g)
        inputs.append(x.grad)
    return inputs, [p.grad.clone() for p in module.parameters()]


def prepared(module, *inputs):
    """A split of a module whose first iteration, in which weights are observed, is over."""
    queue = WeightGradStore()
    split = SplitLinears(module, queue)
    rng = torch.get_rng_state()
    for m, x in enumerate(inputs):
        with split.recording():
            y = module(x.clone().requires_grad_(x.is_floating_point()))
        with split.recording(), queue.collect(m):
            y.sum().abs().backward()
        queue.run(m)
    split.finalize()
    torch.set_rng_state(rng)
    module.zero_grad(set_to_none=True)
    return queue, split


def run_split(module, batches, order=None):
    """All I first, then all W in order: the extreme case of deferral."""
    module.zero_grad(set_to_none=True)
    queue, split = prepared(module, batches[0][0])
    inputs = []
    for m, (x, g) in enumerate(batches):
        x = x.clone().requires_grad_(x.is_floating_point())
        with split.recording():
            y = module(x)
        with split.recording(), queue.collect(m):
            y.backward(g)
        inputs.append(x.grad)
    for m in order or range(len(batches)):
        queue.run(m)
    grads = [p.grad.clone() for p in module.parameters()]
    report = split.report
    split.remove()
    return inputs, grads, report


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
    assert SplitLinears(module, WeightGradStore()).report.split == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_weights_also_used_elsewhere_are_found_in_the_first_iteration_and_every_bit_is_right(caplog, late, functional):
    def run(split):
        torch.manual_seed(4)
        module, queue = Tied(functional=functional, late=late), WeightGradStore()
        layers = SplitLinears(module, queue)
        for m in range(6):
            with layers.recording() if split else contextlib.nullcontext():
                y = module(torch.randint(0, 11, (5,)))
            with queue.collect(m):
                y.backward(torch.rand_like(y))
            assert queue._waiting[m] == [], "in the first iteration everything is as in stock, and later this weight is"
            queue.run(m)
            if m % 2:
                layers.finalize()
        return [p.grad for p in module.parameters()]

    assert same(run(split=True), run(split=False))
    assert "their backward is not split" in caplog.text


def test_a_weight_that_is_used_elsewhere_later_is_not_split_from_the_next_iteration_on(caplog):
    module = nn.Linear(4, 4)
    queue, split = prepared(module, torch.randn(2, 4))
    assert split.report.split == 1

    def step(m, more):
        with split.recording():
            y = module(torch.randn(3, 4)).sum() + (module.weight.square().sum() if more else 0.0)
        with queue.collect(m):
            y.backward()
        waiting = len(queue._waiting[m])
        queue.run(m)
        return waiting

    assert step(0, more=False) == step(1, more=True) == 1
    split.finalize()
    assert step(2, more=False) == 0 and split.report.split == 0
    assert "1 weights are used by a linear layer and elsewhere" in caplog.text


def test_hooks_fire_once_a_microbatch_in_w():
    module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    fired = []
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    queue, split = prepared(module, torch.randn(3, 8))
    fired.clear()
    with split.recording():
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
    split_inputs, split_grads, report = run_split(module, batches)
    assert report.split == 2
    assert same(inputs, split_inputs) and same(grads, split_grads)


def test_checkpoints_without_reentrance_recompute_once():
    runs = []

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            runs.append(1)
            return self.b(torch.tanh(self.a(x)))

    module = Inner()
    queue, split = prepared(module, torch.randn(3, 8))
    runs.clear()
    with split.recording():
        y = checkpoint(module, torch.randn(3, 8), use_reentrant=False)
    with split.recording(), queue.collect(0):
        y.sum().backward()
    assert len(queue._waiting[0]) == 2
    queue.run(0)
    assert len(runs) == 2


def test_offloaded_activations_stay_where_they_are_put():
    """`saved_tensors_hooks` of the user see the tensors of stock, and nothing else keeps the input alive."""
    packed = []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    module = nn.Linear(8, 8)
    queue, split = prepared(module, torch.randn(2, 3, 8))
    kept = []
    for context in (contextlib.nullcontext(), split.recording()):
        packed.clear()
        x = torch.randn(2, 3, 8, requires_grad=True) + 1.0
        storage = StorageWeakRef(x.untyped_storage())
        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = module(x)
        kept.append(list(packed))
        del x
        assert storage.expired()
        with queue.collect(0):
            y.sum().backward()
        queue.run(0)
    assert kept[0] == kept[1]


def test_autocast_and_frozen_weights_fall_back():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module[0].weight.requires_grad_(False)
    queue, split = prepared(module, torch.randn(2, 8))
    with split.recording(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(torch.randn(2, 8))
    with queue.collect(0):
        y.float().sum().backward()
    assert queue._waiting[0] == [] and module[1].weight.grad is not None
    queue.run(0)
    with split.recording():
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
        module, queue = Two(), WeightGradStore()
        layers = SplitLinears(module, queue)
        for m in range(4):
            x = torch.randn(5, 8)
            with layers.recording() if split else contextlib.nullcontext():
                first, second = module(x)
            with queue.collect(m):
                first.backward(torch.ones(5, 8), retain_graph=True)
                second.backward(torch.full((5, 8), 0.3))
            assert len(queue._waiting[m]) == (3 if split and m else 0)
            queue.run(m)
            layers.finalize()
        return [p.grad for p in module.parameters()]

    assert same(run(split=False), run(split=True))


def test_complex_layers():
    module = nn.Linear(4, 4, dtype=torch.complex64)
    batches = [(torch.randn(3, 4, dtype=torch.complex64), torch.randn(3, 4, dtype=torch.complex64))]
    _, grads = run_fused(module, batches)
    _, split_grads, _ = run_split(module, batches)
    assert same(grads, split_grads)


class Penalised(nn.Module):
    """Differentiates inside its own forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.penalty = nn.Linear(4, 4), nn.Linear(4, 1), True

    def forward(self, x):
        y = self.b(torch.tanh(self.a(x)))
        if self.penalty:
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            y = y + slope.square().sum()
        return y


def test_layers_that_are_differentiated_inside_the_forward_run_as_in_stock():
    def run(split):
        torch.manual_seed(9)
        module, queue = Penalised(), WeightGradStore()
        layers = SplitLinears(module, queue)
        for m in range(4):
            with layers.recording() if split else contextlib.nullcontext():
                y = module(torch.randn(3, 4).requires_grad_())
            with queue.collect(m):
                y.sum().backward()
            queue.run(m)
            layers.finalize()
        return [p.grad for p in module.parameters()]

    assert same(run(split=True), run(split=False))


def test_differentiating_inside_the_forward_later_is_an_error_with_a_remedy():
    module = Penalised()
    module.penalty = False
    _, split = prepared(module, torch.randn(3, 4))
    module.penalty = True
    with split.recording(), pytest.raises(UnsupportedError, match='"split_backward": false'):
        module(torch.randn(3, 4, requires_grad=True))


def test_modules_are_left_alone():
    """What users do with layers that we have touched: nothing of ours is in them."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = {name: dict(vars(layer)) for name, layer in module.named_modules()}
    _, split = prepared(module, torch.randn(2, 8))
    assert {name: dict(vars(layer)) for name, layer in module.named_modules()} == before
    copied = copy.deepcopy(module)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.fill_(1.0)
        averaged.update_parameters(copied)
    x = torch.ones(1, 8)
    with split.recording():
        assert copied(x).unique().tolist() == [73.0], "(8 + 1) * 8 + 1"
    assert torch.equal(averaged(x), nn.Sequential(*copied.children())(x) * 0 + averaged.module(x))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert same(torch.load(buffer, weights_only=False).parameters(), module.parameters())
    module[0].forward = lambda x: x
    split.remove()
    assert "forward" in vars(module[0]), "what the user has wrapped stays"


def test_removal_leaves_no_hook():
    module = nn.Linear(8, 8)
    _, split = prepared(module, torch.randn(2, 8))
    assert module.weight._backward_hooks
    split.remove()
    assert not module.weight._post_accumulate_grad_hooks and not module.weight._backward_hooks


def test_the_name_is_bound_only_while_a_forward_records():
    module = nn.Linear(8, 8)
    stock = nn.functional.linear
    _, split = prepared(module, torch.randn(2, 8))
    with split.recording():
        assert nn.functional.linear is not stock
        with split.recording():
            pass
        assert nn.functional.linear is not stock
        assert torch.equal(nn.functional.linear(torch.ones(8), torch.eye(8)), torch.ones(8)), "of somebody else"
        seen = []
        thread = threading.Thread(target=lambda: seen.append(type(module(torch.ones(2, 8)).grad_fn).__name__))
        thread.start()
        thread.join(30)
        assert seen == ["AddmmBackward0"], "another thread's calls are its own"
    assert nn.functional.linear is stock


def test_somebody_elses_function_stays_in_place(monkeypatch):
    calls, stock = [], nn.functional.linear

    def theirs(*args):
        calls.append(args)
        return stock(*args)

    module = nn.Linear(8, 8)
    queue, split = prepared(module, torch.randn(2, 8))
    monkeypatch.setattr(nn.functional, "linear", theirs)
    with split.recording():
        y = module(torch.randn(2, 8))
    with queue.collect(0):
        y.sum().backward()
    assert len(calls) == 1 and queue._waiting[0] == [] and nn.functional.linear is theirs


class Own(nn.Module):
    """No `nn.Linear`, and a name of the function of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return linear(x, self.table)


def test_layers_of_any_class():
    module = Own()
    batches = [(torch.randn(3, 8), torch.randn(3, 6)) for _ in range(3)]
    inputs, grads = run_fused(module, batches)
    split_inputs, split_grads, report = run_split(module, batches)
    assert report.split == 1 and report.fused == {}
    assert same(inputs, split_inputs) and same(grads, split_grads)


def test_the_first_stage_needs_no_input_gradient():
    torch.manual_seed(7)
    module = nn.Linear(8, 8)
    queue, split = prepared(module, torch.randn(2, 8))
    with split.recording():
        y = module(torch.randn(2, 8))
    with queue.collect(0):
        y.sum().backward()
    assert module.weight.grad is None
    queue.run(0)
    assert module.weight.grad is not None


def test_misuse_is_an_error():
    queue = WeightGradStore()
    with queue.collect(0):
        pass
    with pytest.raises(RuntimeError, match="microbatch 0 already waits"), queue.collect(0):
        pass


class Stop(torch.autograd.Function):
    """Hands no gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None


class Chain(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x):
        return self.b(self.between(torch.tanh(self.a(x))))


def test_no_gradient_is_none_and_not_zeros():
    on = [False]
    module = Chain(lambda x: Stop.apply(x) if on[0] else x)
    queue, split = prepared(module, torch.randn(3, 4))
    on[0] = True
    for x in (torch.randn(3, 4), torch.randn(4, 3).t()):  # both ways of splitting
        with split.recording():
            y = module(x)
        with queue.collect(0):
            y.sum().backward()
        queue.run(0)
    assert module.a.weight.grad is None and module.a.bias.grad is None and module.b.weight.grad is not None


def test_a_penalty_that_begins_later_gives_the_bits_of_stock():
    """If its backward comes after the layer's; before it, autograd would already have accumulated (see docs/design/known-gaps.md)."""

    def run(split):
        torch.manual_seed(10)
        module, queue = nn.Linear(4, 4), WeightGradStore()
        layers = SplitLinears(module, queue)
        for m in range(8):
            with layers.recording() if split else contextlib.nullcontext():
                penalty = module.weight.square().sum() if m >= 4 else 0.0
                y = module(torch.randn(5, 4)).square().sum() + penalty
            with queue.collect(m):
                y.backward()
            if m % 2:
                queue.run(m - 1)
                queue.run(m)
                layers.finalize()
        return [p.grad for p in module.parameters()]

    assert same(run(split=True), run(split=False))


def test_hooks_on_modules_find_the_gradients_of_stock():
    def run(split):
        torch.manual_seed(11)
        module, queue, seen = Chain(lambda x: x), WeightGradStore(), []
        layers = SplitLinears(module, queue)
        module.a.register_full_backward_hook(lambda m, gi, go: seen.append(module.b.weight.grad.clone()))
        for m in range(6):
            layers.begin()
            with layers.recording() if split else contextlib.nullcontext():
                y = module(torch.randn(5, 4))
            with queue.collect(m):
                y.sum().backward()
            queue.run(m)
            layers.finalize()
        return seen

    assert same(run(split=True), run(split=False))


def test_parameters_can_be_swapped_replaced_and_differentiated_forwards():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    _, split = prepared(module, torch.randn(2, 4))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    module[0].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    assert split.report.split + sum(split.report.fused.values()) == 2
    x = torch.randn(2, 4, dtype=torch.float64)
    with split.recording(), torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with split.recording(), torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        module(torch.randn(4, 2, dtype=torch.float64).t())
