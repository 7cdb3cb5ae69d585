"""Loss scaling (fp16) and tensor parallelism inside the pipeline: losses, norms, scales and parameters of stock, to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import assert_same, overflowing, train
from tests.patches.test_parity import SLOW, SWITCHES, both

import_deepspeed()
import deepspeed  # noqa: E402

pytestmark = pytest.mark.multiprocess

STEPS = [5, 8, 5, 8, 8, 5, 8, 8]
ZERO = {"zero_optimization": {"stage": 1}}
SPREAD = {"kind": "tensor", "model_kwargs": {"tensor": 2}}


def fp16(**more):
    return {"fp16": {"enabled": True, **more}}


DYNAMIC = fp16(initial_scale_power=10, loss_scale_window=2, hysteresis=1)
"""Every second step twice the scale."""


def check(results, stages, *, switched=2):
    sessions = [result["status"]["sessions"][0] for result in results]
    assert {session["level"] for session in sessions} == {"full"}
    assert all(session["split_layers"] > 0 for session in sessions)
    assert {session["plan_version"] for session in sessions} == {switched}, (
        "all ranks of a tensor group switch together"
    )
    assert len({str(result["actions"]) for result in results}) == stages, "all ranks of a stage ran the same"


@pytest.mark.parametrize(
    "config", [fp16(loss_scale=128), DYNAMIC, {**fp16(loss_scale=64), **ZERO}, {**DYNAMIC, **ZERO}], ids=str
)
def test_loss_scaling(config):
    more = {"prepare": overflowing(STEPS, 3), "evaluate_after": (1,), "switches": SWITCHES[:2]}
    results = run_ranks(both, 2, config, SLOW, STEPS, stages=2, **more)
    check(results, 2)
    scales = [scale for scale, _ in results[0]["scales"]]
    assert [skipped for _, skipped in results[0]["scales"]] == [0, 0, 0, 1, 1, 1, 1, 1], "one step, in the middle"
    static = config["fp16"].get("loss_scale")
    assert scales[:4] == ([static] * 4 if static else [1024, 1024, 2048, 1024])


@pytest.mark.parametrize(
    "config", [pytest.param(DYNAMIC, marks=pytest.mark.matrix), {**DYNAMIC, **ZERO}], ids=["zero-0", "zero-1"]
)
def test_loss_scaling_at_four_stages(config):
    check(run_ranks(both, 4, config, SLOW, STEPS, stages=4, switches=SWITCHES[:2]), 4)


PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}, **ZERO}, "fp16": {**DYNAMIC, **ZERO}}
UNPARTITIONED = {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.matrix), "bf16", "fp16"])
@pytest.mark.parametrize(
    "config", [{}, pytest.param(UNPARTITIONED, marks=pytest.mark.matrix)], ids=["partitioned", "whole"]
)
def test_tensor_parallel_stages(precision, config):
    config = {**PRECISIONS[precision], **config}
    more = {"stages": 2, "switches": SWITCHES[:2], "evaluate_after": (1,), **SPREAD}
    check(run_ranks(both, 4, config, SLOW, STEPS, **more), 2)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.matrix), "fp16"])
def test_pipeline_tensor_and_data_parallelism_together(precision):
    """2 x 2 x 2 ranks."""
    more = {"stages": 2, "switches": SWITCHES[:2], **SPREAD}
    check(run_ranks(both, 8, PRECISIONS[precision], SLOW, STEPS[:7], **more), 2)


def partitioning(engine):
    """Each rank of a tensor group keeps its part of a checkpoint, on the host."""
    grid = engine.grid
    group = {
        "get_model_parallel_rank": grid.get_slice_parallel_rank,
        "get_model_parallel_world_size": grid.get_slice_parallel_world_size,
        "get_model_parallel_group": grid.get_slice_parallel_group,
    }
    deepspeed.checkpointing.configure(SimpleNamespace(**group), partition_activations=True, checkpoint_in_cpu=True)


@pytest.mark.parametrize(
    "prepare", [pytest.param(None, marks=pytest.mark.matrix), partitioning], ids=["whole", "partitioned"]
)
def test_tensor_parallel_activation_checkpoints(prepare):
    more = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["TensorBlock"]}
    kwargs = {"kind": "tensor", "model_kwargs": {"tensor": 2, **more}, "prepare": prepare}
    check(run_ranks(both, 4, PRECISIONS["bf16"], SLOW, STEPS, stages=2, switches=SWITCHES[:2], **kwargs), 2)


def whole_gradients(rank, pipeline):
    """DeepSpeed itself fails with them on CPUs, where its copy of what describes a part is no copy."""
    stock = train(UNPARTITIONED, None, STEPS[:4], stages=2, **SPREAD)
    ours = train({"pipeline": pipeline}, SLOW, STEPS[:4], stages=2, **SPREAD)
    assert_same(stock, ours)


def test_partitioned_activations_with_whole_gradients():
    run_ranks(whole_gradients, 4, {"pipe_partitioned": True, "grad_partitioned": False})


def test_autocast():
    """Layers that autocast casts for are not split, and not said to be."""
    config = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    for result in run_ranks(both, 2, config, SLOW, STEPS[:7], stages=2, switches=SWITCHES[:2]):
        (session,) = result["status"]["sessions"]
        assert session["level"] == "full" and session["split_layers"] == 0
