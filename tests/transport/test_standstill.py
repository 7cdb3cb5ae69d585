"""Processes that are stopped for 1.5 s and go on, with real proxies: clocks keep their offset, delays are told apart."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time

import pytest
import torch

from .support import activation, gradient, line

pytestmark = [pytest.mark.timing, pytest.mark.usefixtures("by_proxies")]
PAUSE_S = 1.5
ROUNDS = 6
MESSAGES = 8


class Traffic:
    """Iterations of two ranks: activations one way, gradients the other, all received, with some time between."""

    def __init__(self, first, second):
        self.ends = (first, second)
        self.step_id = 0
        self.steps = []
        for e in self.ends:
            e.on_rail = lambda peer, rail, state, why: self.steps.append((rail, state, why))

    def round(self, during=lambda number: None, nbytes=4000):
        """Delays (ms) that each rank's link shows: as measured, and what is left of them."""
        first, second = self.ends
        self.step_id += 1
        there, back = first.channel(1), second.channel(0)
        got = ([], [])
        for number in range(MESSAGES):
            during(number)
            there.send(activation(number, self.step_id), [torch.ones(nbytes)])
            back.send(gradient(number, self.step_id), [torch.ones(nbytes)])
            time.sleep(0.01)
        for number in range(MESSAGES):
            got[1].append(back.recv(activation(number, self.step_id)).wait())
            got[0].append(there.recv(gradient(number, self.step_id)).wait())
        return [
            ([m.delay_ms for m in messages], messages[0].pauses.undisturbed([(m.delay_ms, m.came_s) for m in messages]))
            for messages in got
        ]

    def offsets_ms(self):
        return [
            abs(e.stats()["peers"][1 - e.me.rank]["clock_offset_ms"] - shift)
            for e, shift in zip(self.ends, (1e6, -1e6), strict=True)
        ]


def stop(*processes):
    """Stops processes, and lets them go on after a while, from another thread."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)

    def resume():
        time.sleep(PAUSE_S)
        for process in processes:
            os.kill(process, signal.SIGCONT)

    thread = threading.Thread(target=resume)
    thread.start()
    return thread


@pytest.mark.parametrize("stopped", ["receiver", "sender", "both"])
def test_a_proxy_that_stands_still_is_no_slow_link(stopped):
    with line(2, proxy="process", offsets={1: 1000.0}, connections_per_direction=4) as (first, second):
        traffic = Traffic(first, second)
        for _ in range(3):
            traffic.round()
        before = max(traffic.offsets_ms())
        processes = [e._proxy._process.pid for e in (first, second)]
        chosen = {"receiver": processes[1:], "sender": processes[:1], "both": processes}[stopped]
        threads = []
        worst = traffic.round(lambda number: threads.append(stop(*chosen)) if number == 3 else None)
        threads[0].join()
        assert max(max(measured) for measured, _ in worst) > PAUSE_S * 500, "some messages have crossed the pause"
        for measured, kept in worst:
            assert 2 <= len(kept) < len(measured) and statistics.median(kept) < 50, (measured, kept)
        assert max(traffic.offsets_ms()) < max(2.0, 2 * before)
        for _ in range(ROUNDS):
            for _, kept in traffic.round():
                assert len(kept) >= MESSAGES // 2 and statistics.median(kept) < 50
        assert max(traffic.offsets_ms()) < max(2.0, 2 * before)
        assert [step for step in traffic.steps if step[1] == "paused"] == [], "no rail has failed"
