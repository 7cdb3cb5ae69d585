"""A process that stood still notices it; one that slept on purpose or computed did not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from adaptra_plugin.transport.proxy.loop import Loop
from adaptra_plugin.transport.proxy.pulse import BEAT_S, STANDSTILL_S, Pulse


class Machine:
    def __init__(self):
        self.now, self.used, self.stood = 100.0, 3.0, []
        self.pulse = Pulse(lambda: self.now, lambda: self.used)
        self.pulse.stood = self.stood.append

    def sleep(self, seconds, allowed=BEAT_S):
        self.now += seconds
        assert self.pulse.slept(allowed) == pytest.approx(seconds)

    def work(self, wall, cpu):
        self.now += wall
        self.used += cpu
        self.pulse.worked()


def test_sleeping_and_working_are_no_pauses():
    machine = Machine()
    for _ in range(1000):
        machine.sleep(BEAT_S + 0.004)  # a busy machine
        machine.work(0.03, 0.03)  # much to copy
        machine.work(0.0001, 0.00005)
        machine.sleep(0.0)
    assert machine.stood == []


@pytest.mark.parametrize("pause", [0.05, 0.09, 1.5])
def test_a_pause_while_it_sleeps_is_noticed_wherever_it_begins(pause):
    for begins in (0.0, BEAT_S / 2, BEAT_S - 1e-6):
        machine = Machine()
        machine.sleep(max(BEAT_S, begins + pause) + 1e-6)
        assert len(machine.stood) == 1 and machine.stood[0] >= pause


@pytest.mark.parametrize("pause", [0.05, 1.5])
def test_a_pause_while_it_works_is_noticed(pause):
    machine = Machine()
    machine.sleep(0.01)
    machine.work(0.002 + pause, 0.002)
    machine.work(0.02, 0.018)
    assert len(machine.stood) == 1 and machine.stood[0] == pytest.approx(pause + 0.002)


def test_short_turns_before_a_pause_do_not_hide_it():
    machine = Machine()
    for _ in range(100):
        machine.work(0.0001, 0.0001)
    machine.work(STANDSTILL_S + 0.01, 0.0)
    assert len(machine.stood) == 1


def test_a_loop_in_a_process_that_is_stopped_notices_and_one_that_waits_does_not():
    code = """
import sys
from adaptra_plugin.transport.proxy.loop import Loop
loop = Loop()
loop.pulse.stood = lambda seconds: print(f"{seconds:.3f}", flush=True)
print("ready", flush=True)
loop.call_later(3.0, loop.stop)
loop.run()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.6)
        os.kill(process.pid, signal.SIGCONT)
        pauses = [float(line) for line in process.stdout]
    assert max(pauses) >= 0.6 and sum(pauses) < 2.0


def test_a_loop_wakes_for_its_timers_and_events_in_time():
    loop = Loop()
    ran = []
    began = time.monotonic()
    for delay in (0.01, 0.06, 0.13):
        loop.call_later(delay, lambda delay=delay: ran.append(time.monotonic() - began - delay))
    loop.call_later(0.15, loop.stop)
    turns = []
    loop.turn_ended = lambda: turns.append(1)
    loop.run()
    loop.close()
    assert len(ran) == 3 and min(ran) >= 0.0
    assert len(turns) <= 5, "beats are no turns"
