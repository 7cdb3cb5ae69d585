"""DeepSpeed's mixture of experts in a pipeline: results of stock, to the bit, with plans that change."""

from __future__ import annotations

from functools import partial

import pytest

from tests.forked import import_deepspeed, run_ranks
from tests.patches.feature_models import Block, CountingHead, ExpertBlock, pipeline
from tests.patches.models import loss_fn
from tests.patches.test_parity import SLOW, SWITCHES, both
from tests.patches.test_scaled_and_spread import DYNAMIC, ZERO, check

import_deepspeed()
pytestmark = pytest.mark.multiprocess

STEPS = [3, 5, 3, 5, 5, 3, 5, 5]


def experts_apart(model):
    """DeepSpeed wants them in groups of their own."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    return split({"params": list(model.parameters()), "name": "all"})


@pytest.mark.parametrize("ranks", [1, 2], ids=["whole", "spread"])
def test_experts(ranks):
    """On one rank, or spread over the replicas of a stage."""
    layer = partial(ExpertBlock, ranks, k=1)
    more = {"kind": pipeline(Block, layer, Block, layer), "adapt": experts_apart, "evaluate_after": (1,)}
    check(run_ranks(both, 2 * ranks, {**DYNAMIC, **ZERO}, SLOW, STEPS, stages=2, switches=SWITCHES[:2], **more), 2)


def with_losses(model):
    """The losses of the experts are handed on beside the activations, and added in the end."""
    model.loss_fn = lambda outputs, labels: loss_fn(outputs[0], labels) + 0.01 * outputs[1].sum()
    return experts_apart(model)


def test_losses_of_experts_travel_with_the_activations():
    """Two experts for each token, noise in the gate, a residual layer beside the experts."""
    layer = partial(ExpertBlock, 2, counted=True, k=2, use_residual=True, noisy_gate_policy="RSample")
    more = {"kind": pipeline(*[layer] * 4, last=CountingHead), "adapt": with_losses}
    check(run_ranks(both, 4, {}, SLOW, STEPS, stages=2, switches=SWITCHES[:2], **more), 2)
