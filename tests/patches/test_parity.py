"""Losses and parameters are those of stock DeepSpeed, to the bit."""

from __future__ import annotations

import pytest

from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import assert_same, train
from tests.switching import CAUSED, FIRST, plans_follow

import_deepspeed()
pytestmark = pytest.mark.multiprocess

SLOW = {
    **CAUSED,
    "simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 60, "from_iteration": 4, "to_iteration": 9}]},
}
SWITCHES = (FIRST, 4, 9)
"""After these iterations a plan is agreed on, which begins two later: from measured times, for the slow link, for the healed one."""
MICROBATCHES = [5, 8, 13, 5, 8, 13, 8, 8, 8, 5, 13, 8, 8]


def both(rank, config, adaptra, steps, *, switches=(), **kwargs):
    stock = train(config, None, steps, **kwargs)
    during = plans_follow(adaptra, switches) if switches else None
    ours = train(config, adaptra, steps, during=during, **kwargs)
    assert_same(stock, ours)
    return {name: ours[name] for name in ("losses", "scales", "status", "actions")}


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("adaptra", [{}, SLOW], ids=["healthy", "slow"])
def test_fp32_dropout_tied_clipped(stages, adaptra):
    """5, 8 and 13 microbatches, evaluations in between; slow: the plan changes three times in the run."""
    more = {"stages": stages, "evaluate_after": (1, 4), "switches": SWITCHES if adaptra else ()}
    results = run_ranks(both, stages, {}, adaptra, MICROBATCHES, **more)
    sessions = [result["status"]["sessions"][0] for result in results]
    assert all(session["split_layers"] > 0 for session in sessions)
    assert len({session["plan_version"] for session in sessions}) == 1
    if adaptra:
        assert sessions[0]["plan_version"] >= 3, "the slow link led to another plan, and its end to one more"
    assert results[0]["losses"][-1] < results[0]["losses"][0]


@pytest.mark.parametrize("coordinator", ["thread", "process"])
def test_data_parallel_replicas(coordinator):
    block = {**SLOW, "coordinator": coordinator}
    results = run_ranks(both, 4, {}, block, MICROBATCHES[:10], stages=2, evaluate_after=(3,), switches=SWITCHES[:2])
    versions = {result["status"]["sessions"][0]["plan_version"] for result in results}
    assert len(versions) == 1 and versions.pop() >= 2


CHECKPOINTED = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
VARIANTS = {
    "bf16": ({"bf16": {"enabled": True}}, {}),
    "bf16-immediate": ({"bf16": {"enabled": True, "immediate_grad_update": True}}, {}),
    "zero1": ({"zero_optimization": {"stage": 1}}, {}),
    "zero1-bf16": ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, {}),
    "checkpointing": ({}, {"model_kwargs": CHECKPOINTED}),
    "checkpointing-non-reentrant": (
        {"pipeline": {"use_reentrant": False}},
        {"model_kwargs": CHECKPOINTED},
    ),
    "tuple-with-bool-mask": ({}, {"kind": "mask"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    config, kwargs = VARIANTS[variant]
    more = {"stages": 2, "switches": SWITCHES[:2], "evaluate_after": (1,), **kwargs}
    results = run_ranks(both, 2, config, SLOW, [5, 8, 5, 8, 5, 8, 8, 8], **more)
    for result in results:
        (session,) = result["status"]["sessions"]
        assert session["split_layers"] > 0 and session["plan_version"] >= 2, "split, and switched in the middle"


@pytest.mark.parametrize(
    "config", [{"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, {}], ids=["zero1-bf16", "fp32"]
)
def test_variants_with_data_parallelism(config):
    run_ranks(both, 4, config, {}, [5, 8, 8], stages=2)


@pytest.mark.parametrize(
    "adaptra", [{"schedule": "1f1b"}, {"schedule": "zb-h1"}, {"split_backward": False}, {"max_activations": 4}]
)
def test_other_settings(adaptra):
    results = run_ranks(both, 4, {}, adaptra, [5, 8], stages=4)
    for result in results:
        held, kinds = 0, {action[1] for action in result["actions"]}
        for action in result["actions"]:
            held += (action[1] == "F") - (action[1] in "WB")
            assert held <= adaptra.get("max_activations", 8)
        assert kinds == ({"F", "B"} if adaptra.get("schedule") == "1f1b" else {"F", "I", "W"})
