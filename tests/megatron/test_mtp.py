"""Results of pipelines that predict several tokens, or whose stages are uneven, are those of the stock schedules, to the bit."""

from __future__ import annotations

import pytest

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.megatron.moe_models import EXPERTS, predicting
from tests.megatron.runs import assert_same, both, loaded
from tests.switching import CAUSED, FIRST

loaded()
pytestmark = pytest.mark.multiprocess

STEPS = (8, 4, 8)
"""Microbatches of each iteration."""
ALLTOALL = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}

JOBS = {
    "one": (predicting(1), 2, 3),
    "two-tied-vpp2": (predicting(2, tied=True, chunks=2), 2, 3),
    "two-with-experts": (predicting(2, {**EXPERTS, **BIAS}, dtype="bf16"), 2, 1),
    "layout-vpp2": (predicting(1, {"pipeline_model_parallel_layout": "E|tt|t|tmL"}, chunks=2), 2, 2),
    "stage-of-its-own": (predicting(1, {"pipeline_model_parallel_layout": "Et|tt|tm|L"}, pipeline=4), 4, 4),
}
"""Each with the number of ranks."""
