"""What has all of Adaptra, what keeps the stock order, what is refused, and what follows the version or a flag of the engine."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import adaptra_plugin
from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.support import Level
from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import BASE_CONFIG, HIDDEN, QUIET, Block, assert_same, batches, build, loss_fn, train

import_deepspeed()
import deepspeed  # noqa: E402
from deepspeed.pipe import LayerSpec, PipelineModule  # noqa: E402
from deepspeed.runtime.pipe.schedule import TrainSchedule  # noqa: E402

from adaptra_plugin.patches import deepspeed_support as support  # noqa: E402


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "offload_optimizer": {"device": "none"}},
        {"stage": 1, "offload_optimizer": {}},
        {"stage": 1, "offload_optimizer": None},
        {"stage": 1, "cpu_offload": False},
        True,  # the old form of stage 1
        {"stage": "auto"},  # not for us to judge
    ],
    ids=str,
)
def test_optimizers_that_are_not_offloaded_have_everything(zero):
    assert support.reasons_of_config({"zero_optimization": zero}) == []


@pytest.mark.parametrize(
    "zero",
    [
        {"offload_optimizer": {"device": "cpu"}},
        {"offload_optimizer": {"device": "nvme", "nvme_path": "/local"}},
        {"cpu_offload": True},
        {"zenflow": {"topk_ratio": 0.1}},
    ],
    ids=str,
)
def test_offloaded_optimizers_keep_the_stock_order(zero):
    (reason,) = support.reasons_of_config({"zero_optimization": {"stage": 1, **zero}})
    assert reason.level is Level.STOCK_ORDER and 'without "offload_optimizer"' in reason.remedy


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 0.1}}}, "1-bit optimizers"),
        ({"activation_checkpointing": {"partition_activations": True}}, "partitioned, contiguous or offloaded"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "partitioned, contiguous or offloaded"),
        ({"compile": {"deepcompile": True}}, "torch.compile"),
        ({"amp": {"enabled": True}}, "amp"),
        ({"eigenvalue": {"enabled": True}}, "eigenvalue"),
        ({"sparse_gradients": True}, "sparse"),
    ],
    ids=str,
)
def test_what_keeps_the_stock_order(config, words):
    (reason,) = support.reasons_of_config(config)
    assert reason.level is Level.STOCK_ORDER and words in reason.why and reason.remedy.startswith("plans need")
    support.check_config(config)  # it starts


@pytest.mark.parametrize("config", [{}, {"fp16": {"enabled": True}}, {"bf16": {"enabled": True}}], ids=str)
def test_what_has_everything(config):
    assert support.reasons_of_config(config) == []


class OnebitAdam(torch.optim.Adam):
    """Has the name of DeepSpeed's class, which cannot be built without its communication backend."""


class Mine(OnebitAdam):
    pass


def kept_order(rank, case):
    def prepare(engine):
        if case == "engine.compile":
            engine.compile(backend="eager")
        elif case == "module.compile":
            engine.module.compile(backend="eager")
        elif case == "a layer":
            next(layer for layer in engine.module.forward_funcs if isinstance(layer, Block)).compile(
                backend="aot_eager"
            )
        elif case == "partitioned checkpoints":
            deepspeed.checkpointing.configure(None, partition_activations=True)

    more = {"optimizer": lambda parameters: Mine(parameters, lr=0.01)} if case == "1-bit" else {}
    if case == "partitioned checkpoints":
        more["model_kwargs"] = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
    stock = train({}, None, [5, 8, 8], stages=2, evaluate_after=(1,), prepare=prepare, **more)
    ours = train({}, {}, [5, 8, 8], stages=2, evaluate_after=(1,), prepare=prepare, **more)
    assert_same(stock, ours)
    return ours["status"]["sessions"][0], {action[1] for action in ours["actions"]}


KEPT = {
    "engine.compile": "torch.compile",
    "module.compile": "torch.compile",
    "a layer": "torch.compile",
    "1-bit": "1-bit optimizers",
    "partitioned checkpoints": "partitioned, contiguous or offloaded",
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", KEPT)
def test_the_stock_order_is_kept_with_the_results_of_stock(case):
    for session, kinds in run_ranks(kept_order, 2, case):
        assert session["level"] == "stock-order" and kinds == {"F", "B"} and session["split_layers"] == 0
        assert KEPT[case] in session["reasons"][0]
        assert session["iteration"] == 3 and session["transport"], "its transfers are Adaptra's"


def compiled_later(rank):
    def during(engine, step):
        if step == 1:
            engine.compile(backend="eager")

    with pytest.raises(UnsupportedError, match="changed after training with plans had begun: torch"):
        train({}, {}, [5, 8, 8], stages=2, during=during)


@pytest.mark.multiprocess
def test_what_is_compiled_after_plans_have_begun_is_refused():
    run_ranks(compiled_later, 2)


class OwnSchedule(TrainSchedule):
    pass


def own_schedule(rank):
    seen, handler = [], logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("adaptra").addHandler(handler)
    results = []
    for adaptra in ({}, {"adaptra": QUIET}):
        adaptra_plugin.activate()
        deepspeed.init_distributed()
        model = build("tied", 2)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config={**BASE_CONFIG, **adaptra}
        )
        engine._train_schedule = lambda engine=engine: OwnSchedule(
            engine.micro_batches, engine.num_stages, engine.stage_id
        )
        torch.manual_seed(0)
        results.append([engine.train_batch(iter(batches(8, 2, seed=step))).item() for step in range(2)])
        adaptra_plugin.deactivate()
    assert type(engine).__name__ == "AdaptraPipelineEngine"
    return results[0] == results[1], [text for text in seen if "OwnSchedule is no schedule that Adaptra knows" in text]


@pytest.mark.multiprocess
def test_an_unknown_schedule_runs_as_it_is_with_one_warning():
    for same, warnings in run_ranks(own_schedule, 2):
        assert same and len(warnings) == 1


class Masked(nn.Module):
    """Returns an integer mask, and computes something else once it has become bool."""

    def __init__(self, first=False, last=False):
        super().__init__()
        self.first, self.last = first, last
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, value):
        if self.first:
            x, mask = nn.functional.one_hot(value % HIDDEN, HIDDEN).float(), (value > 2).long() * 3
        else:
            x, mask = value
        x = torch.tanh(self.linear(x) * mask.unsqueeze(-1)) * (1.0 if mask.dtype is torch.bool else 0.5)
        return x if self.last else (x, mask)


def attention_mask(rank):
    results = []
    for adaptra in ({}, {"adaptra": QUIET}):
        adaptra_plugin.activate()
        deepspeed.init_distributed()
        layers = [LayerSpec(Masked, first=i == 0, last=i == 5) for i in range(6)]
        model = PipelineModule(layers=layers, num_stages=3, loss_fn=loss_fn, partition_method="uniform", base_seed=7)
        torch.manual_seed(7)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config={**BASE_CONFIG, **adaptra}
        )
        engine.set_has_attention_mask(True)
        losses = [engine.train_batch(iter(batches(8, 2, seed=step))).item() for step in range(3)]
        losses.append(engine.eval_batch(iter(batches(8, 2, seed=9))).item())
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
        adaptra_plugin.deactivate()
    assert type(engine).__name__ == "AdaptraPipelineEngine"
    (stock, before), (ours, after) = results
    return stock == ours and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.multiprocess
def test_an_attention_mask_becomes_bool_as_in_deepspeed():
    assert run_ranks(attention_mask, 3) == [True] * 3


def test_a_floating_point_mask_is_refused_in_training():
    x, mask = torch.ones(2), torch.ones(2)
    with pytest.raises(UnsupportedError, match=r"mask .* is torch\.float32.*return it as bool"):
        support.with_bool_mask((x, mask), training=True)
    assert support.with_bool_mask((x, mask), training=False)[1].dtype is torch.bool


@pytest.mark.parametrize("value", [True, False])
def test_both_spellings_of_the_bf16_switch(value):
    assert support.immediate_grad_update(SimpleNamespace(bfloat16_immediate_grad_update=value)) is value
    section = SimpleNamespace(immediate_grad_update=value)
    assert support.immediate_grad_update(SimpleNamespace(bfloat16_config=section)) is value
