"""A DeepSpeed pipeline over RDMA whose wires lose packets: losses and parameters are those of stock DeepSpeed, to the bit."""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ.get("ADAPTRA_IN_GUEST") != "1":
    pytest.skip("needs the guest kernel: make test-rdma", allow_module_level=True)

from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import assert_same, train
from tests.rdma import wires

import_deepspeed()


def _train(rank: int, steps: list[int]) -> dict[str, Any]:
    config = {"train_micro_batch_size_per_gpu": 16}  # activations of 12 KiB, too long for a slot
    stock = train(config, None, steps, stages=2)
    side = "ab"[rank]
    transport = {
        "rail": "rdma",
        "proxy": "thread",
        "bind": "127.0.0.1",
        "rdma_devices": [wires.device(side, wire) for wire in range(wires.COUNT)],
        "ring_mib": 4,
    }
    ours = train(config, {"transport": transport}, steps, stages=2)
    assert_same(stock, ours)
    (session,) = ours["status"]["sessions"]
    return session["transport"]["peers"][1 - rank]["rails"]


def test_a_pipeline_over_lossy_rdma_trains_as_stock_deepspeed_does():
    wires.touched()
    for wire in range(wires.COUNT):
        wires.fault(wire, "loss", "1%")
    for rails in run_ranks(_train, 2, [3, 4], timeout=100.0):
        assert rails["rdma0"]["delivered_bytes"] + rails["rdma1"]["delivered_bytes"] > 7 * 12_288
