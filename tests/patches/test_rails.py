"""A rail that dies in the middle of training: the other rails carry on, it is used again, and the report says so."""

from __future__ import annotations

import json
import time

import pytest

from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import assert_same, train

import_deepspeed()
pytestmark = pytest.mark.multiprocess
STEPS = [5, 8, 5, 8, 5, 8, 5]


def rail_state(engine, rail):
    (peer,) = engine.adaptra.status()["transport"]["peers"].values()
    return peer["rails"][rail]["state"]


def loses_shared_memory(rank, folder):
    stock = train({}, None, STEPS, stages=2)
    seen = []

    def during(engine, step):
        if step == len(STEPS) - 1:
            return  # the other rank may have finished, and its rails with it
        if step >= 4:  # at 4 the other end may still be in an iteration with the fault when this one sees the rail back
            until = time.monotonic() + 30
            while rail_state(engine, "shm") != "healthy" and time.monotonic() < until:
                time.sleep(0.05)
        seen.append(rail_state(engine, "shm"))

    fault = {"kind": "death", "src": 0, "dst": 1, "rail": "shm", "from_iteration": 2, "to_iteration": 4}
    ours = train(
        {},
        {"simulate": {"faults": [fault]}, "report": {"directory": str(folder), "wandb": "off"}},
        STEPS,
        stages=2,
        during=during,
    )
    assert_same(stock, ours)
    return seen


def test_a_rail_that_dies_is_replaced_used_again_and_reported(tmp_path):
    for seen in run_ranks(loses_shared_memory, 2, tmp_path):
        assert seen[0] == "healthy" and seen[3] != "healthy" and seen[-1] == "healthy"
    records = [json.loads(line) for line in (tmp_path / "rank00000.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (tmp_path / "rank00001.jsonl").read_text().splitlines()]
    assert len({record["run"] for record in records + others}) == 1, "both ranks name one run"
    events = [record for record in records if record["type"] == "event" and record["kind"] == "rail"]
    assert [event["state"] for event in events[:2]] == ["lost", "healed"]
    assert {(event["rail"], event["link"]) for event in events} == {("shm", "0-1")}
    assert events[0]["since_iteration"] in (2, 3) and events[0]["text"].startswith("rail shm of link 0-1")
    steps = [record["state"] for record in records if record["type"] == "rail" and record["rail"] == "shm"]
    assert "paused" in steps and steps[-1] == "healthy"
