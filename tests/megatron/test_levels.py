"""Jobs that cannot bear another order: Megatron's own schedule runs, its transfers are delegated, and results are stock's."""

from __future__ import annotations

import dataclasses
import time

import pytest

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.forked import run_ranks
from tests.megatron.layers import marked
from tests.megatron.runs import SLOW, assert_same, both, loaded, run

loaded()
pytestmark = pytest.mark.multiprocess


MARKED = GptJob(spec=marked)
JOBS = {
    "one chunk": MARKED,
    "four stages": dataclasses.replace(MARKED, pipeline=4, dtype="bf16", batched_p2p=True),
    "two chunks": dataclasses.replace(MARKED, chunks=2, dropout=0.1),
    "two chunks on four ranks": dataclasses.replace(MARKED, pipeline=4, chunks=2, layers=8, batched_p2p=True),
    "overlapped reduction": dataclasses.replace(MARKED, overlap_grad_reduce=True, distributed_optimizer=True),
}


def is_followed(results):
    sessions = [result["status"]["sessions"][0] for result in results]
    assert all(session["level"] == "stock-order" and session["reasons"] for session in sessions)
    # every tensor has gone through the proxy
    moved = [peer["directions"] for session in sessions for peer in session["transport"]["peers"].values()]
    assert all(sum(direction["sent"]["messages"] for direction in peer.values()) > 0 for peer in moved)
    assert all(session["split_layers"] == 0 for session in sessions)


@pytest.mark.parametrize("name", JOBS)
def test_the_stock_schedule_runs_with_the_results_of_stock(name):
    job = JOBS[name]
    stock, ours = both(job, max(2, job.pipeline), SLOW, steps=(8, 8, 4, 8), evaluate_after=(1,))
    assert_same(stock, ours)
    is_followed(ours)


def test_two_replicas():
    stock, ours = both(dataclasses.replace(MARKED, overlap_grad_reduce=True), 4, SLOW)
    assert_same(stock, ours)
    is_followed(ours)


@pytest.mark.parametrize("chunks", [1, 2])
def test_sequences_of_different_lengths(chunks):
    extra = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    stock, ours = both(dataclasses.replace(MARKED, chunks=chunks, extra=extra), 2, lengths=(16, 5, 9))
    assert_same(stock, ours)
    is_followed(ours)


def timed(rank, block):
    """When computations begin on this rank, and when messages have come, in one iteration after the first."""
    from adaptra_plugin.runtime.following import Following

    computing, take, found = Following.computing, Following._take, {"F": [], "came": []}

    def computing_and_noting(self, kind, chunk=0):
        if kind.value == "F" and self.index == 1:
            found["F"].append(time.time())
        return computing(self, kind, chunk)

    def take_and_note(self, key):
        message = take(self, key)
        if self.index == 1:
            found["came"].append(time.time())
        return message

    Following.computing, Following._take = computing_and_noting, take_and_note
    return {**run(rank, MARKED, block, (4, 4)), "found": found}


def test_transfers_over_a_slow_link_overlap_with_computation():
    block = {"simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 1000}]}}
    stock, ours = run_ranks(run, 2, MARKED, None, (4, 4)), run_ranks(timed, 2, block)
    assert_same(stock, ours)
    first, last = (result["found"] for result in ours)
    assert first["F"][1] < last["came"][0], "the next forward begins while the first activation is still on its way"
