"""Layers of Transformer Engine run split, and results are those of stock, to the bit. They are stand-ins, see `te_stand_in`."""

from __future__ import annotations

from functools import partial

import pytest

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.forked import run_ranks
from tests.megatron.layers import delayed_te_spec, te_spec
from tests.megatron.runs import SLOW, STEPS, assert_same, assert_same_while_a_link_turns_slow, both, loaded, run

loaded()
pytestmark = pytest.mark.multiprocess

SHORT = (6, 4, 6)
"""Microbatches of each iteration: one is observed, two run split."""
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FUSED = partial(te_spec, fuse=True)
JOBS = {
    "fp32": (GptJob(spec=te_spec), 2),
    "fp32-vpp2-overlapped": (GptJob(chunks=2, overlap_grad_reduce=True, spec=te_spec), 2),
    "bf16-fused-quantised": (GptJob(dtype="bf16", spec=partial(te_spec, fuse=True, quantised=True)), 2),
    "fused-recomputed": (GptJob(extra=RECOMPUTE, spec=FUSED), 2),
    "recomputed-vpp2": (GptJob(chunks=2, extra=RECOMPUTE, spec=te_spec), 2),
    "bf16-fused-vpp2-dp2": (
        GptJob(dtype="bf16", chunks=2, distributed_optimizer=True, overlap_grad_reduce=True, spec=FUSED),
        4,
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_linear_layers(name):
    job, world = JOBS[name]
    stock, ours = both(job, world, steps=SHORT, evaluate_after=(1,))
    assert_same(stock, ours)
    session = ours[0]["status"]["sessions"][0]
    assert session["split_layers"] == 8, "four in each of two"
    assert "TeLinear" not in session["fused_layers"]


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_all_kinds_of_layers(fuse):
    """Also one that is called twice in a forward, and a frozen one."""
    stock, ours = both(GptJob(spec=partial(te_spec, mixed=True, fuse=fuse)), 2, steps=SHORT)
    assert_same(stock, ours)
    session = ours[0]["status"]["sessions"][0]
    assert session["split_layers"] == 10 and session["fused_layers"].get("Linear") == 2


def test_a_link_turns_slow_and_plans_change_in_the_middle():
    assert_same_while_a_link_turns_slow(GptJob(dtype="bf16", spec=te_spec), 2)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain-vpp2", "fused-overlapped"])
def test_layers_that_were_built_to_delay_weight_gradients(fuse):
    """Stock without the delay is the measure."""
    more = {"chunks": 1 if fuse else 2, "overlap_grad_reduce": fuse}
    stock = run_ranks(run, 2, GptJob(spec=partial(te_spec, fuse=fuse), **more), None, STEPS)
    for split in (True, False):
        job = GptJob(spec=partial(delayed_te_spec, fuse=fuse), **more)
        ours = run_ranks(run, 2, job, {**SLOW, "split_backward": split}, STEPS)
        assert_same(stock, ours)
        assert ours[0]["status"]["sessions"][0]["split_layers"] == (8 if split else 0)


def test_delaying_layers_that_are_called_twice():
    stock = run_ranks(run, 2, GptJob(spec=partial(te_spec, mixed=True)), None, SHORT)
    assert_same(stock, run_ranks(run, 2, GptJob(spec=partial(delayed_te_spec, mixed=True)), SLOW, SHORT))
