"""What jobs have beyond dense blocks of one shape: results of stock, to the bit, with plans that change."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import adaptra_plugin
from tests.forked import import_deepspeed, run_ranks
from tests.patches.feature_models import (
    BLOCKS,
    Adapted,
    Block,
    Edges,
    Embed,
    FrozenEmbed,
    SparseDescent,
    SparseEmbed,
    frozen,
    pipeline,
)
from tests.patches.models import BASE_CONFIG, QUIET, batches, build, train
from tests.patches.test_experts import STEPS
from tests.patches.test_parity import SLOW, SWITCHES, both
from tests.patches.test_scaled_and_spread import DYNAMIC, ZERO, check

import_deepspeed()
import deepspeed  # noqa: E402

pytestmark = pytest.mark.multiprocess

BF16 = {"bf16": {"enabled": True}}
OFFLOADED = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
UNCLIPPED = {"gradient_clipping": 0.0}  # stock cannot clip where a stage has no gradients, or sparse ones


def same(world, config, *, stages=2, **kwargs):
    """Full support, a switch in the middle, results of stock."""
    more = {"stages": stages, "switches": SWITCHES[:2], "evaluate_after": (1,), **kwargs}
    results = run_ranks(both, world, config, SLOW, STEPS, **more)
    sessions = [result["status"]["sessions"][0] for result in results]
    assert {session["level"] for session in sessions} == {"full"} and sessions[0]["reasons"] == []
    assert {session["plan_version"] for session in sessions} == {2}
    return results


# --- optimizers


def test_muon():
    """DeepSpeed's own: matrices by Muon, the rest by Adam."""
    torch._dynamo.config.disable = True  # Muon's iteration is compiled, which takes a minute
    muon = {"type": "Muon", "params": {"lr": 0.01, "torch_adam": True}}
    check(same(2, {**ZERO, **BF16, "optimizer": muon}, kind=BLOCKS), 2)


def test_offloaded_optimizer_states():
    """Gradients are copied to the host in the reduction, after the schedule."""
    check(same(2, {**OFFLOADED, **DYNAMIC, "zero_force_ds_cpu_optimizer": False}), 2)


@pytest.mark.parametrize(
    "config",
    [
        {**OFFLOADED, "fp16": {**DYNAMIC["fp16"], "fp16_master_weights_and_grads": True}},
        {**ZERO, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    ],
    ids=["fp16", "bf16"],
)
def test_low_precision_master_weights(config, monkeypatch):
    # fp16 asks for an optimizer that takes two minutes to compile; what becomes of the gradients does not depend on it
    monkeypatch.setattr("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedCPUAdam", torch.optim.AdamW)
    adam = {"type": "Adam", "params": {"lr": 0.01, "eps": 1e-3, "torch_adam": True}}
    check(same(2, {**config, "optimizer": adam, "zero_force_ds_cpu_optimizer": False}), 2)


# --- what is trained


def test_adapters_on_frozen_layers():
    def adapt(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("up" in name or "down" in name)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    results = same(2, {**DYNAMIC, **ZERO}, kind=pipeline(*[Adapted] * 4), adapt=adapt)
    assert [result["status"]["sessions"][0]["split_layers"] for result in results] == [4, 4], "the adapters alone"


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_without_anything_to_train(stage):
    kind = pipeline(*[Block] * 4, first=FrozenEmbed if stage == 0 else Embed)
    results = same(3, UNCLIPPED, stages=3, kind=kind, adapt=frozen(stage))
    split = [result["status"]["sessions"][0]["split_layers"] for result in results]
    assert [number for number, layers in enumerate(split) if layers == 0] == [stage]


def test_sparse_gradients():
    """Of an embedding: DeepSpeed reduces them as they are."""
    same(2, UNCLIPPED, kind=pipeline(*[Block] * 4, first=SparseEmbed), optimizer=SparseDescent)


# --- shapes


def curriculum(engine, microbatches):
    """Another length for each step, announced as Megatron-DeepSpeed does."""
    length = (6, 6, 4, 5, 5, 3, 6, 6)[engine.global_steps % len(STEPS)]
    engine.reset_activation_shape()
    return iter([(tokens[:, :length], labels[:, :length]) for tokens, labels in microbatches])


def test_shapes_that_change_between_steps():
    same(2, {}, kind="mask", iterate=curriculum)


def changing(engine, microbatches):
    for number, (tokens, labels) in enumerate(microbatches):
        yield tokens[:, : 3 + number % 4], labels[:, : 3 + number % 4]


def test_shapes_that_change_between_microbatches():
    same(2, {}, kind="mask", iterate=changing, model_kwargs={"dynamic_shape": True})


def test_tensors_without_dimensions_or_elements():
    edges = pipeline(Edges, Edges, first=partial(Edges, first=True), last=partial(Edges, last=True))
    same(2, {}, kind=edges)


# --- several engines, and restarts


def two_engines(rank):
    """Two pipelines of one process are trained in turns."""
    results = []
    for adaptra in ({}, {"adaptra": {**SLOW, **QUIET}}):
        adaptra_plugin.activate()
        deepspeed.init_distributed()
        engines, losses = [], []
        for kind in ("tied", "mask"):
            model = build(kind, 2)
            config = copy.deepcopy({**BASE_CONFIG, **adaptra})
            engines.append(
                deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
            )
        torch.manual_seed(5)
        for step, count in enumerate(STEPS):
            for engine in engines:
                if count != engine.gradient_accumulation_steps():
                    engine.set_train_batch_size(2 * count)
                losses.append(engine.train_batch(iter(batches(count, 2, seed=step))).item())
        sessions = adaptra_plugin.status()["sessions"]
        results.append((losses, [p.detach().clone() for engine in engines for p in engine.module.parameters()]))
        adaptra_plugin.deactivate()
    (stock, before), (ours, after) = results
    assert stock == ours and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return [(session["level"], session["iteration"]) for session in sessions]


def test_several_engines():
    assert run_ranks(two_engines, 2) == [[("full", len(STEPS))] * 2] * 2


def saved(rank, folder):
    def during(engine, step):
        if step == 2:
            engine.save_checkpoint(folder, tag="t")

    train({}, SLOW, STEPS[:3], stages=2, kind=BLOCKS, during=during)


def test_a_restart_with_another_number_of_stages(tmp_path):
    """DeepSpeed loads the layers; optimizer states are those of other stages, and begin anew."""

    def layers_only(engine):
        engine.load_checkpoint(str(tmp_path), tag="t", load_module_only=True)

    run_ranks(saved, 2, str(tmp_path))
    results = same(3, {}, stages=3, kind=BLOCKS, prepare=layers_only)
    assert results[0]["losses"][0] < 3.0, "what was loaded had been trained"
