"""Chunks consume in another order than neighbours send, and pipelines are rings: staging rings that are far too small must not
stop them."""

from __future__ import annotations

import pytest

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.megatron.runs import assert_same, both, loaded

loaded()
pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("pipeline", [2, 4])
def test_rings_that_hold_one_message(pipeline):
    job = GptJob(pipeline=pipeline, chunks=2, layers=2 * pipeline, width=64, sequence=16, micro_batch=128)
    block = {
        "simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 10}]},
        "detector": {"warmup_iterations": 1, "min_history": 2},
        "transport": {"ring_mib": 1, "connections_per_direction": 1, "deadline_s": 8.0, "bind": "127.0.0.1"},
    }
    stock, ours = both(job, pipeline, block, steps=(8,) * 3)
    assert_same(stock, ours)
    peers = [peer for rank in ours for peer in rank["status"]["sessions"][0]["transport"]["peers"].values()]
    assert sum(peer["directions"][d]["sent"]["full"] for peer in peers for d in ("activation", "gradient")) > 0
