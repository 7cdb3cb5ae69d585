"""Chunks consume in another order than neighbours send, and pipelines are rings: staging rings that are far too small must not
stop them."""

from __future__ import annotations

import pytest

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.megatron.layers import marked
from tests.megatron.runs import assert_same, both, loaded

loaded()
pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    ("pipeline", "more"),
    [
        (2, {}),
        (4, {}),
        (2, {"spec": marked}),
        pytest.param(4, {"spec": marked}, marks=pytest.mark.matrix),
        pytest.param(
            *(4, {"spec": marked, "extra": {"overlap_p2p_comm_warmup_flush": True}}), marks=pytest.mark.matrix
        ),
    ],
    ids=["plans-2", "plans-4", "followed-2", "followed-4", "followed-4-flush"],
)
def test_rings_that_hold_one_message(pipeline, more):
    job = GptJob(pipeline=pipeline, chunks=2, layers=2 * pipeline, width=64, sequence=16, micro_batch=128, **more)
    block = {
        "simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 60}]},
        "detector": {"warmup_iterations": 1, "min_history": 2},
        "transport": {"ring_mib": 1, "connections_per_direction": 1, "deadline_s": 8.0, "bind": "127.0.0.1"},
    }
    stock, ours = both(job, pipeline, block, steps=(8,) * 3)
    assert_same(stock, ours)
    if more:
        return  # its sends are as many as stock has on their way at once: they may find room
    peers = [peer for rank in ours for peer in rank["status"]["sessions"][0]["transport"]["peers"].values()]
    assert sum(peer["directions"][d]["sent"]["full"] for peer in peers for d in ("activation", "gradient")) > 0
