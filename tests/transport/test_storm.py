"""Real rails, whatever happens to them: the promise of `proxy/test_random.py` between two endpoints, and for long.

`ADAPTRA_EXAMPLES=100` tries more storms, `ADAPTRA_SOAK=10000` that many iterations of the soak.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptra_plugin.config import Fault
from adaptra_plugin.transport import Endpoint, Key
from tests.transport.proxy.strategies import faults

from .support import activation, everywhere, gradient, line

pytestmark = [pytest.mark.timing, pytest.mark.usefixtures("by_proxies")]
STORMS = max(1, int(os.environ.get("ADAPTRA_EXAMPLES", "200")) // 25)
SOAK = int(os.environ.get("ADAPTRA_SOAK", "240"))
STORM_S = 1.0
KEYS = 40
DETERMINED = {"reconnect_s": 20.0, "deadline_s": 50.0}


def payload(number: int, rng: random.Random) -> list[torch.Tensor]:
    """Says which message it is all over."""
    count = rng.choice([1, 10, 1000, 9000, 30_000])
    return [torch.arange(count, dtype=torch.int64) + (number << 32)]


def send_all(end: Endpoint, rank: int, keys: list[Key], seed: int) -> None:
    rng = random.Random(seed)
    works = [end.channel(rank).send(key, payload(n, rng), tag=n) for n, key in enumerate(keys)]
    for work in works:
        work.wait()


def receive_all(end: Endpoint, rank: int, keys: list[Key], seed: int) -> None:
    rng = random.Random(seed)
    works = [end.channel(rank).recv(key) for key in keys]
    for number, work in enumerate(works):
        message = work.wait()
        assert message.tag == number
        (expected,) = payload(number, rng)
        assert torch.equal(message.tensors[0], expected)


def exchange(first: Endpoint, second: Endpoint, messages: int, seed: int) -> None:
    """Both ways at the same time; keys come several times, so that their order counts."""
    there = [activation(n % KEYS) for n in range(messages)]
    back = [gradient(n % KEYS) for n in range(messages)]
    errors = everywhere(
        lambda: send_all(first, 1, there, seed),
        lambda: send_all(second, 0, back, seed + 1),
        lambda: receive_all(second, 0, there, seed),
        lambda: receive_all(first, 1, back, seed + 1),
    )
    for error in errors:
        if error is not None:
            raise error


@settings(max_examples=STORMS, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(
    storm=st.lists(faults(STORM_S, mild=True), min_size=1, max_size=5),
    rail=st.sampled_from(["auto", "tcp"]),
    segment_kib=st.sampled_from([64, 256]),
    seed=st.integers(0, 1000),
)
def test_everything_arrives_once_in_order_and_whole(storm, rail, segment_kib, seed):
    found = [Fault(**fault, from_iteration=1) for fault in storm]
    with line(2, faults=found, rail=rail, segment_kib=segment_kib, **DETERMINED) as (first, second):
        for end in (first, second):
            end.set_iteration(1)
        exchange(first, second, 150, seed)
        for end in (first, second):
            end.set_iteration(0)


def every_day() -> list[Fault]:
    """What a bad network does all the time."""
    link = {"src": 0, "dst": 1, "from_iteration": 1}
    return [
        Fault(kind="corruption", rate=0.01, **link),
        Fault(kind="corruption", rate=0.0001, part="header", **link),
        Fault(kind="death", rate=0.0005, **link),
        Fault(kind="jitter", ms=0.2, rail="tcp1", **link),
    ]


class Consumption:
    """What the processes of a job hold: resident memory (bytes), threads, descriptors."""

    def __init__(self) -> None:
        gc.collect()
        here = psutil.Process()
        family = [here, *here.children(recursive=True)]
        self.memory = sum(process.memory_info().rss for process in family)
        self.threads = sum(process.num_threads() for process in family)
        self.descriptors = sum(len(list(Path(f"/proc/{process.pid}/fd").iterdir())) for process in family)

    def __repr__(self) -> str:
        return f"{self.memory >> 10} KiB, {self.threads} threads, {self.descriptors} descriptors"


@pytest.mark.timeout(max(120, SOAK))
@pytest.mark.parametrize(("proxy", "rail"), [("thread", "tcp"), ("process", "auto")])
def test_nothing_grows_over_many_iterations(proxy, rail):
    options = {**DETERMINED, "proxy": proxy, "rail": rail, "segment_kib": 64}
    with line(2, faults=every_day(), **options) as ends:
        measured: list[Consumption] = []
        failures: list[BaseException] = []
        data = [torch.arange(20_000, dtype=torch.int64), torch.arange(3, dtype=torch.int64)]

        def iterate(end: Endpoint, other: int, step_id: int) -> None:
            mine, theirs = (activation, gradient) if end.me.rank == 0 else (gradient, activation)
            end.set_iteration(1)
            works = [end.channel(other).recv(theirs(n, step_id)) for n in range(4)]
            sent = [end.channel(other).send(mine(n, step_id), data, tag=step_id) for n in range(4)]
            for work in works:
                message = work.wait()
                assert message.tag == step_id
                assert all(torch.equal(got, expected) for got, expected in zip(message.tensors, data, strict=True))
            for work in sent:
                work.wait()

        def run(end: Endpoint, other: int) -> None:
            try:
                for step_id in range(SOAK):
                    if failures:
                        return
                    iterate(end, other, step_id)
                    if end.me.rank == 0 and step_id % max(1, SOAK // 20) == 0:
                        measured.append(Consumption())
            except BaseException as error:  # noqa: BLE001  handed to the test
                failures.append(error)

        threads = [threading.Thread(target=run, args=(end, 1 - end.me.rank)) for end in ends]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
        if failures:
            raise failures[0]
        statistics = [end.stats()["peers"][1 - end.me.rank] for end in ends]
        print(f"{SOAK} iterations in {took:.1f} s; {[(peer['retries'], peer['damaged']) for peer in statistics]}")
        print(*measured, sep="\n")
        assert sum(peer["retries"] for peer in statistics) > 0  # there was something to live with
        third = len(measured) // 3
        begin, end = measured[third : 2 * third], measured[2 * third :]

        def most(samples: list[Consumption], what: str) -> int:
            return max(getattr(sample, what) for sample in samples)

        # rails come and go, each with buffers of its own: what is compared is how much there is at most. The last third moves
        # 100 MB at least, of which nothing may stay; a rail that comes back late brings 9 MB of buffers
        assert most(end, "threads") <= most(begin, "threads") + 1
        assert most(end, "descriptors") <= most(begin, "descriptors") + 12
        assert most(end, "memory") <= most(begin, "memory") + (12 << 20)
        for one in ends:
            one.set_iteration(0)
