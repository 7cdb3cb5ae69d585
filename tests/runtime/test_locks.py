"""The plug-in's locks have one order, which `docs/design/threads.md` lists."""

from __future__ import annotations

import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from adaptra_plugin.config import parse_config
from adaptra_plugin.errors import PeerLostError
from adaptra_plugin.runtime import session as module
from adaptra_plugin.runtime.iteration import Iteration
from adaptra_plugin.runtime.session import Session
from adaptra_plugin.runtime.topology import Topology
from tests.locks import LockOrder, watched_locks
from tests.switching import CAUSED, FIRST, _newer, plans_follow
from tests.transport.fake_device import THERE, FakeDevice, pair
from tests.transport.support import activation, everywhere, gradient

DOCUMENT = Path(__file__).parents[2] / "docs" / "design" / "threads.md"
ITERATIONS, MICROBATCHES, WORDS = FIRST + 6, 4, 64 << 10


class OutOfData(Exception):
    pass


def train(session: Session, ends: bool) -> list[int]:
    """Iterations without a model; every message is as large as a quarter of the ring. Versions of the plans that ran."""
    ran = []
    for step in range(ITERATIONS):
        with session.inside():
            iteration = session.begin(MICROBATCHES)
            for action in iteration.dispatch():
                if iteration.receives(action):
                    (tensor,), _ = iteration.receive(action)
                    assert tensor[0] == action.microbatch
                with iteration.compute(action):
                    if ends and step == ITERATIONS - 1:
                        raise OutOfData
                if iteration.sends(action):
                    iteration.send(action, [torch.full((WORDS,), float(action.microbatch))])
            session.end(iteration)
        ran.append(iteration.version)
        if step == FIRST:
            _newer(session._book, 0, step)
    return ran


@pytest.mark.parametrize("leaves", [None, 0, 2])
def test_locks_are_taken_in_one_order(leaves, monkeypatch, tmp_path):
    """Three ranks send, receive, switch to another plan and end; or one of them leaves in the middle of an iteration."""
    block: dict[str, Any] = {
        **CAUSED,
        "split_backward": False,
        "transport": {"proxy": "thread", "bind": "127.0.0.1", "ring_mib": 1},
        "report": {"directory": str(tmp_path), "wandb": "off"},
        "simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 20.0}]},
    }
    monkeypatch.setattr(Iteration, "report", Iteration.report)  # put back at the end
    plans_follow(block, ())
    monkeypatch.setattr(module, "_numbers", itertools.repeat(0))  # of one job, although in one process
    store, config = HashStore(), parse_config(block)

    def rank(number: int) -> list[int] | Exception:
        topology = Topology.of(number, [[0, 1, 2]])
        session = Session(config, topology, store, lambda _: None, torch.device("cpu"), MICROBATCHES)
        try:
            return train(session, number == leaves)
        except (OutOfData, PeerLostError) as error:
            return error
        finally:
            session.close()

    with watched_locks(monkeypatch) as order, ThreadPoolExecutor(3) as pool:
        results = list(pool.map(rank, range(3)))
    if leaves is None:
        assert results[0] == results[1] == results[2] and results[0][0] == 0 and results[0][-1] >= 1, (
            "all have switched"
        )
    else:
        assert [type(result) for result in results] == [OutOfData if n == leaves else PeerLostError for n in range(3)]
    check_document(order)


def test_locks_of_copies_from_and_to_a_device(monkeypatch):
    """Both ends send more than the rings hold, from a device and from host memory, before either waits for anything."""
    device = FakeDevice(pins=True)
    device.upload_s = 0.0
    monkeypatch.setattr("adaptra_plugin.transport.send_lane.PART_SEGMENTS", 1)
    with watched_locks(monkeypatch) as order, pair(device) as ends:

        def exchange(mine: int) -> None:
            channel = ends[mine].channel(1 - mine)
            make = activation if mine == 0 else gradient
            take = gradient if mine == 0 else activation
            expected = [channel.recv(take(n), device=THERE if n % 2 else None) for n in range(12)]
            for n in range(12):
                tensor = torch.full((100_000,), float(n))
                channel.send(make(n), [device.put(tensor) if n % 3 else tensor])
            for n, work in enumerate(expected):
                (tensor,) = work.wait().tensors
                device.compute.mark().synchronize()
                assert tensor[0] == n

        assert everywhere(lambda: exchange(0), lambda: exchange(1)) == [None, None]
    device.end()
    check_document(order)


def check_document(order: LockOrder) -> None:
    assert order.edges, "locks were watched"
    listed = re.findall(r"^\d+\. (.*)", DOCUMENT.read_text(), re.MULTILINE)
    place = {name: number for number, line in enumerate(listed) for name in re.findall(r"`(\w+\.\w+)`", line)}
    wrong = [edge for edge in order.edges if not place.get(edge[0], 99) < place.get(edge[1], -1)]
    assert not wrong, f"{DOCUMENT.name} does not list them in this order: {wrong}"


class Pair:
    def __init__(self) -> None:
        self.first = threading.Lock()
        self.second = threading.RLock()


Pair.__module__ = "adaptra_plugin.made_up"


def test_two_orders_are_found(monkeypatch):
    monkeypatch.setitem(Pair.__init__.__globals__, "__name__", "adaptra_plugin.made_up")
    with pytest.raises(AssertionError, match=r"Pair.first -> Pair.second on .*; Pair.second -> Pair.first on "):  # noqa: SIM117
        with watched_locks(monkeypatch):
            pair = Pair()
            with pair.first, pair.second:
                pass
            with pair.second, pair.second, pair.first:
                pass


def test_two_locks_of_one_kind_have_no_order(monkeypatch):
    order = LockOrder()
    order.edges["Lane._lock", "Lane._lock"] = "main"
    with pytest.raises(AssertionError, match=r"Lane\._lock -> Lane\._lock on main"):
        order.check()
