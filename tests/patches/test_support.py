"""What has all of Adaptra, what keeps the stock order, what is refused, and what follows the version or a flag of the engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaptra_plugin
from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.support import Level
from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import BASE_CONFIG, HIDDEN, QUIET, batches, loss_fn

import_deepspeed()
import deepspeed  # noqa: E402
from deepspeed.pipe import LayerSpec, PipelineModule  # noqa: E402

from adaptra_plugin.patches import deepspeed_support as support  # noqa: E402


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "offload_optimizer": {"device": "none"}},
        {"stage": 1, "offload_optimizer": {}},
        {"stage": 1, "offload_optimizer": None},
        {"stage": 1, "cpu_offload": True},  # the old form of `offload_optimizer`
        {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        True,  # the old form of stage 1
        {"stage": "auto"},  # not for us to judge
    ],
    ids=str,
)
def test_optimizers_that_are_not_offloaded_or_on_the_cpu_have_everything(zero):
    assert support.reasons_of_config({"zero_optimization": zero}) == []


@pytest.mark.parametrize(
    "zero",
    [
        {"offload_optimizer": {"device": "nvme", "nvme_path": "/local"}},
        {"zenflow": {"topk_ratio": 0.1}},
    ],
    ids=str,
)
def test_optimizers_offloaded_otherwise_keep_the_stock_order(zero):
    (reason,) = support.reasons_of_config({"zero_optimization": {"stage": 1, **zero}})
    assert reason.level is Level.STOCK_ORDER and 'without "zenflow"' in reason.remedy


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 0.1}}}, "1-bit optimizers"),
        ({"activation_checkpointing": {"contiguous_memory_optimization": True}}, "contiguous activation checkpoints"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "offloaded whole"),
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


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"fp16": {"enabled": True}},
        {"bf16": {"enabled": True}},
        {"activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True}},
    ],
    ids=str,
)
def test_what_has_everything(config):
    assert support.reasons_of_config(config) == []


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
