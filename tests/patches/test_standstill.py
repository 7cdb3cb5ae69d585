"""A proxy, a training process, or a whole rank is stopped for 1.5 s in the middle of training, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest

from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import train

import_deepspeed()
pytestmark = [pytest.mark.multiprocess, pytest.mark.timing]
STEPS, MICROBATCHES = 44, 6
PAUSES = {10: "proxy", 18: "training", 26: "both", 34: "proxy"}
"""What of a rank is stopped in the middle of which iteration: rank 1's first, then rank 0's, and so on."""
SLOW_MS = 12.0
"""More than a busy machine delays, less than a clock that is wrong by half of a pause."""


def is_stopped_now_and_then(rank, folder):
    offsets = []

    def during(engine, step):
        what, number = PAUSES.get(step + 1), len([at for at in PAUSES if at <= step])
        if what is not None and rank == (1 + number) % 2:
            proxy, own = engine.adaptra._endpoint._proxy._process.pid, os.getpid()
            pids = {"proxy": [proxy], "training": [own], "both": [own, proxy]}[what]
            words = " ".join(map(str, pids))
            script = f"sleep 0.04; kill -STOP {words}; sleep 1.5; kill -CONT {words}"
            subprocess.Popen(["sh", "-c", script], start_new_session=True)
        (peer,) = engine.adaptra.status()["transport"]["peers"].values()
        offsets.append(abs(peer["clock_offset_ms"]))

    began = time.monotonic()
    settings = {
        "simulate": {"compute": {"forward_ms": 5, "backward_input_ms": 5, "backward_weight_ms": 3}},
        "detector": {"min_delay_ms": SLOW_MS},
        "transport": {"connections_per_direction": 4},  # the more rails, the more pings in a pause
        "report": {"directory": str(folder), "wandb": "off"},
    }
    train({}, settings, [MICROBATCHES] * STEPS, stages=2, during=during)
    return offsets, time.monotonic() - began


def test_pauses_are_no_slow_links(tmp_path):
    found = run_ranks(is_stopped_now_and_then, 2, tmp_path, timeout=120)
    for offsets, took in found:
        assert took > 1.4 * len(PAUSES), "the pauses have held up the job"
        assert max(offsets) < 3.0
    records = [
        json.loads(line) for rank in (0, 1) for line in (tmp_path / f"rank0000{rank}.jsonl").read_text().splitlines()
    ]
    events = [record["text"] for record in records if record["type"] == "event"]
    assert [text for text in events if text.startswith(("link", "rail"))] == []
    assert [record for record in records if record["type"] == "rail" and record["state"] == "paused"] == []
    delays = [
        delay
        for record in records
        if record["type"] == "iteration" and record["iteration"] > 3
        for delay in record["link_delay_ms"].values()
    ]
    assert len(delays) > STEPS
    assert sum(delay > SLOW_MS for delay in delays) < len(delays) / 10, sorted(delays)[-20:]
    plans = [record["first_iteration"] for record in records if record["type"] == "plan"]
    assert all("link" not in record["reason"] for record in records if record["type"] == "plan"), plans
