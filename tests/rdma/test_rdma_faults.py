"""Faults that are injected into the RDMA rails between two ranks: whatever is asked for, every message arrives once, whole."""

from __future__ import annotations

import random
from typing import Any

import pytest

from adaptra_plugin.config import Fault
from tests.rdma.hosts import both
from tests.rdma.ranks import Rank

MESSAGES = 240
ROUNDS = 12
FAULTS: dict[str, list[dict[str, Any]]] = {
    "stalls": [
        {"kind": "stall", "rail": "rdma0", "from_s": 0.5, "to_s": 60},
    ],
    "damages": [
        {"kind": "corruption", "rail": "rdma0", "rate": 0.05},
        {"kind": "corruption", "rail": "rdma1", "rate": 0.01, "part": "header"},
    ],
    "slows down": [
        {"kind": "jitter", "rail": "rdma0", "ms": 5},
        {"kind": "latency", "rail": "rdma1", "ms": 20},
    ],
    "dies": [
        {"kind": "death", "rail": "rdma0", "rate": 0.02},
        {"kind": "death", "rail": "rdma1", "rate": 0.005},
    ],
    "all of it": [
        {"kind": "latency", "rail": "rdma", "ms": 2},
        {"kind": "corruption", "rail": "any", "rate": 0.02},
        {"kind": "jitter", "rail": "rdma1", "ms": 10},
        {"kind": "death", "rail": "rdma", "rate": 0.003},
    ],
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_message_arrives_once_and_whole(name):
    def scenario(rank: Rank) -> None:
        faults = [Fault(src=0, dst=1, seed=seed, **block) for seed, block in enumerate(FAULTS[name])]
        rank.connect(faults=faults, segment_kib=64, rail="rdma")
        chance = random.Random(name)
        for _ in range(ROUNDS):
            sizes = [chance.choice((0, 1, 100, 4000, 5000, 70_000, 200_000)) for _ in range(MESSAGES // ROUNDS)]
            rank.round(sizes)
        found = rank.peer_stats()
        counted = [direction["received"]["messages"] for direction in found["directions"].values()]
        assert sum(counted) == MESSAGES, "no message twice"
        if name == "damages":
            assert found["damaged"], "the faults have struck"
        elif name != "slows down":
            assert found["retries"], "the faults have struck"
        rank.swap()

    both(scenario, maker=Rank)
