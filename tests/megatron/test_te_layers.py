"""Single layers of Transformer Engine (stand-ins, see `te_stand_in`): what I leaves, and what W makes of it."""

from __future__ import annotations

import gc
import sys
import threading
import types
import weakref
from functools import partial

import pytest
import torch

from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.patches.megatron_split import MegatronSplit
from adaptra_plugin.patches.megatron_te import TransformerEngineLayers, can_split, delays, parts
from adaptra_plugin.runtime.weight_grad_store import WeightGradStore
from tests.megatron import te_stand_in as te


class Model(torch.nn.Module):
    """One layer, and a parameter in front of it."""

    def __init__(self, layer, *more):
        super().__init__()
        self.before, self.layer, self.more = torch.nn.Parameter(torch.ones(4)), layer, more

    def forward(self, x):
        y = self.layer(x * self.before, *self.more)
        return y[0] + y[1] if isinstance(y, tuple) else y


class Rank:
    """A model whose layers can run split, and the schedule's part in that."""

    def __init__(self, model, observe=True):
        self.model, self.queue = model, WeightGradStore()
        self.layers = TransformerEngineLayers([model])
        self.split = MegatronSplit([model], self.layers, self.queue)
        if observe:
            self.backward("observed", self.forward(torch.ones(8, 4)))
            self.weights("observed")
            self.split.finalize()

    def forward(self, x):
        with self.split.recording():
            return self.model(x).square()

    def backward(self, microbatch, y):
        with self.split.recording(), self.queue.collect(microbatch):
            y.sum().backward()
        self.layers.run(0)

    def weights(self, microbatch):
        self.queue.run(microbatch)
        self.layers.run(0)

    def is_as_before(self):
        layer = self.model.layer
        return (
            type(layer.wgrad_store) is te.WeightGradStore
            and "forward" not in vars(layer)
            and all(isinstance(p, torch.nn.Parameter) for p in layer._parameters.values())
        )


KINDS = {
    "Linear": lambda **more: Model(te.Linear(4, 4, **more)),
    "Linear-without-bias": lambda **more: Model(te.Linear(4, 4, bias=False, **more)),
    "Linear-bias-elsewhere": lambda **more: Model(te.Linear(4, 4, return_bias=True, **more)),
    "Linear-quantised": lambda **more: Model(te.Linear(4, 4, quantised=True, **more)),
    "LayerNormLinear": lambda **more: Model(te.Linear(4, 4, norm=True, **more)),
    "LayerNormMLP": lambda **more: Model(te.LayerNormMLP(4, 8, **more)),
    "GroupedLinear": lambda **more: Model(te.GroupedLinear(2, 4, 4, **more), [3, 5]),
    "GroupedLinear-before-2.8": lambda **more: Model(te.GroupedLinear(2, 4, 4, older=True, **more), [3, 5]),
}


def prepared(kind, fuse, flag):
    """A model, and what hooks of its parameters find: whether there is a gradient, and the flag of the data-parallel wrapper."""
    torch.manual_seed(7)
    model, found = KINDS[kind](fuse_wgrad_accumulation=fuse), {}

    def hook(name, parameter):
        found.setdefault(name, []).append((parameter.grad is None, getattr(parameter, "grad_added_to_main_grad", None)))
        if getattr(parameter, "grad_added_to_main_grad", False):
            parameter.grad = None  # a placeholder

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(hook, name))
        parameter.main_grad = torch.zeros_like(parameter) if fuse else None
    return model, found


def start(model, found, flag):
    """As in a new iteration."""
    found.clear()
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.main_grad is not None:
            parameter.main_grad.zero_()
        if flag:
            parameter.grad_added_to_main_grad = False


def results(model):
    found = {}
    for name, p in model.named_parameters():
        found[f"{name}.grad"], found[f"{name}.main_grad"] = p.grad, p.main_grad
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def assert_equal(stock, ours):
    assert stock.keys() == ours.keys()
    for name, tensor in stock.items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fuse", "flag"), [(False, False), (True, False), (True, True)], ids=["plain", "fused", "wrapped"]
)
def test_w_does_what_the_backward_of_stock_does(kind, fuse, flag):
    data = [torch.randn(8, 4) for _ in range(3)]
    model, found = prepared(kind, fuse, flag)
    start(model, found, flag)
    towards = []
    for x in data:
        x = x.clone().requires_grad_()
        model(x).square().sum().backward()
        towards.append(x.grad)
    stock, told = results(model), dict(found)

    model, found = prepared(kind, fuse, flag)
    rank = Rank(model)
    assert rank.split.report.split == 1
    start(model, found, flag)
    inputs = [x.clone().requires_grad_() for x in data]
    outputs = [rank.forward(x) for x in inputs]
    assert rank.is_as_before()
    left = [f"layer.{name}" for weights, biases in parts(model.layer) for name in [*weights, *biases]]
    for number, y in enumerate(outputs):
        rank.backward(number, y)
        assert torch.equal(inputs[number].grad, towards[number])
        assert not set(left) & set(found), "no hook before W"
        assert not any(model.get_parameter(name).main_grad.any() for name in left if fuse)
    for number in range(len(data)):
        rank.weights(number)
    assert found == told
    assert_equal(stock, results(model))


def test_microbatches_may_run_in_any_order():
    model = KINDS["Linear"]()
    rank, data = Rank(model), torch.randn(8, 4)
    for number in (0, 1):
        rank.backward(number, rank.forward(data * (number + 1)))
    model.layer.weight.grad = None
    rank.weights(1)
    later = model.layer.weight.grad.clone()
    model.layer.weight.grad = None
    rank.weights(0)
    assert torch.allclose(later, 4 * model.layer.weight.grad, rtol=0.5) and not torch.equal(
        later, model.layer.weight.grad
    )


def splits(rank):
    """Whether a recorded forward of the layer is split."""
    with rank.split.recording():
        node = rank.model.layer(torch.ones(8, 4, requires_grad=True), *rank.model.more).grad_fn
    return any(following.name() == "_StandInsBackward" for following, _ in node.next_functions if following is not None)


def test_whatever_cannot_keep_runs_as_in_stock():
    rank = Rank(KINDS["Linear"]())
    assert splits(rank)
    with torch.no_grad():
        assert rank.forward(torch.ones(8, 4)).grad_fn is None
    rank.model(torch.ones(8, 4)).sum().backward()
    assert rank.model.layer.weight.grad is not None, "not recording"
    assert not splits(Rank(KINDS["Linear"](ub_bulk_wgrad=True))), "userbuffers"
    for missing in ("wgrad_store", "weight"):
        model = KINDS["Linear"](bias=False)
        if missing == "weight":  # in pieces
            model.layer.query_weight = model.layer._parameters.pop("weight")
        else:
            model.layer.wgrad_store = None
        assert parts(model.layer) == [] and not can_split(model.layer)
    frozen = KINDS["Linear"]()
    frozen.layer.weight.requires_grad_(False)
    assert not splits(Rank(frozen))
    fixed = KINDS["Linear"]()
    fixed.layer.bias.requires_grad_(False)
    rank = Rank(fixed)
    assert splits(rank) and fixed.layer.bias.grad is None


def test_another_thread_and_debugging_run_as_in_stock(monkeypatch):
    rank, found = Rank(KINDS["Linear"]()), []
    with rank.split.recording():
        thread = threading.Thread(target=lambda: found.append(rank.model(torch.ones(8, 4))))
        thread.start()
        thread.join()
    found[0].sum().backward()
    assert rank.model.layer.weight.grad is not None
    state = types.SimpleNamespace(TEDebugState=types.SimpleNamespace(debug_enabled=True))
    monkeypatch.setitem(sys.modules, "transformer_engine.debug.pytorch.debug_state", state)
    assert not splits(rank)


def test_a_weight_that_is_used_elsewhere_too_or_differentiated_in_the_forward_is_not_split():
    model = KINDS["Linear"]()
    tied = Rank(model, observe=False)
    y = tied.forward(torch.ones(8, 4)).sum() + model.layer.weight.sum()
    tied.backward(0, y)
    tied.weights(0)
    tied.split.finalize()
    assert not splits(tied) and tied.split.report.fused["Linear"] == 1

    rank = Rank(KINDS["Linear"](), observe=False)
    x = torch.ones(8, 4, requires_grad=True)
    torch.autograd.grad(rank.forward(x).sum(), x)
    rank.backward(0, rank.forward(x))
    rank.weights(0)
    rank.split.finalize()
    assert not splits(rank)


def test_a_backward_that_no_w_would_follow_is_refused():
    rank = Rank(KINDS["Linear"]())
    with pytest.raises(UnsupportedError, match="split_backward"):
        rank.forward(torch.ones(8, 4)).sum().backward()


def test_an_input_that_is_changed_before_w_is_refused():
    rank, x = Rank(Model(te.Linear(4, 4, bias=False))), torch.ones(8, 4)
    kept = []
    rank.model.layer.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    rank.backward(0, rank.forward(x))
    with torch.no_grad():
        kept[0].add_(1)
    with pytest.raises(UnsupportedError, match="changed in place"):
        rank.weights(0)


def test_nothing_of_a_failed_iteration_stays(monkeypatch):
    rank = Rank(KINDS["LayerNormMLP"]())

    def fail(*_):
        raise ValueError("on purpose")

    y = rank.forward(torch.ones(8, 4))
    rank.backward(0, y)
    kept = weakref.ref(rank.queue._waiting[0][0].use.kept)
    x = torch.ones(8, 4, requires_grad=True)
    x.register_hook(fail)
    y = rank.forward(x)
    with pytest.raises(ValueError, match="on purpose"):
        rank.backward(1, y)
    assert rank.queue.microbatches == (0,) and not rank.queue.collecting
    rank.queue.clear()
    rank.layers.discard()
    del y
    gc.collect()
    assert kept() is None and rank.is_as_before()
    monkeypatch.setattr(te._LayerNormMLP, "forward", staticmethod(fail))
    with pytest.raises(ValueError, match="on purpose"):
        rank.forward(torch.ones(8, 4))
    assert rank.is_as_before()


def test_nothing_keeps_the_graph_of_a_microbatch_that_is_over():
    rank = Rank(KINDS["LayerNormMLP"]())
    gc.disable()
    try:
        y = rank.forward(torch.ones(8, 4))
        node = y.grad_fn.next_functions[0][0]
        store = weakref.ref(node.store)
        del node
        rank.backward(0, y)
        del y
        assert store() is None, "without a collection of garbage"
        kept = weakref.ref(rank.queue._waiting[0][0].use.kept)
        rank.weights(0)
        assert kept() is None
    finally:
        gc.enable()


def test_layers_that_delay_by_themselves_are_asked_for_their_gradients_and_others_are_counted():
    chunks = [
        torch.nn.ModuleList([te.Linear(4, 4, delay_wgrad_compute=True), te.Linear(4, 4), torch.nn.LayerNorm(4)]),
        torch.nn.ModuleList([te.Linear(4, 4, delay_wgrad_compute=True)]),
    ]
    layers = TransformerEngineLayers(chunks)
    split = MegatronSplit(chunks, layers, WeightGradStore())
    assert split.report.split == 3 and split.report.fused == {"LayerNorm": 1}
    split.finalize()
    assert split.report.split == 2 and split.report.fused == {"Linear": 1, "LayerNorm": 1}, "not even called"
    first, second = chunks[0][0], chunks[1][0]
    second.need_backward_dw = None  # before 2.10 the store alone says so
    assert delays(first) and delays(second) and not delays(chunks[0][1])
    for layer in (first, second):
        layer(torch.ones(2, 4)).sum().backward()
        assert layer.weight.grad is None
    layers.run(0)
    assert first.weight.grad.eq(2).all() and second.weight.grad is None
    layers.discard()
    assert second.wgrad_store.context.empty(), "nothing of a failed iteration stays"


def test_a_bias_of_a_delaying_layer_waits_wherever_it_is_added():
    """Nobody runs its hooks before W, and microbatches are added up one by one."""
    for use in (True, False):
        model = Model(te.Linear(4, 4, return_bias=True, delay_wgrad_compute=True))
        if not use:
            model.forward = lambda x, layer=model.layer: layer(x)[0]
        rank, added = Rank(model, observe=False), []
        model.layer.register_wgrad_accumulation_and_reduce_hooks(
            lambda bias=model.layer.bias, added=added: added.append(bias.grad)
        )
        for number in (0, 1):
            rank.backward(number, rank.forward(torch.ones(8, 4)))
        assert model.layer.weight.grad is None and model.layer.bias.grad is None and not added
        rank.weights(0)
        assert len(added) == 1 and (added[0] is not None) == use


@pytest.mark.parametrize("delayed", [False, True])
def test_with_hooks_on_a_backward_nothing_waits_for_w(delayed):
    model = Model(te.Linear(4, 4, delay_wgrad_compute=delayed))
    rank = Rank(model, observe=not delayed)
    model.zero_grad()
    handle = model.register_full_backward_hook(lambda *_: None)
    rank.split.begin()
    assert not splits(rank)
    rank.backward(0, rank.forward(torch.ones(8, 4)))
    assert model.layer.weight.grad is not None
    handle.remove()
    rank.split.begin()
    assert splits(rank)
