"""Where proxies run, and which interfaces they listen on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from adaptra_plugin.config import parse_config
from adaptra_plugin.errors import TransportError
from tests.transport.support import activation, config, endpoint, line

pytestmark = pytest.mark.usefixtures("by_proxies")


def test_the_proxy_process_runs_where_and_as_it_is_told():
    cpu = max(os.sched_getaffinity(0))
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    made = endpoint(0, config(proxy="process", cpus=(cpu,), nice=3))
    try:
        pid = made._proxy.pid
        assert os.sched_getaffinity(pid) == {cpu}
        assert os.getpriority(os.PRIO_PROCESS, pid) == nice + 3
    finally:
        made.close()


def test_a_proxy_thread_is_placed_and_the_training_thread_is_not():
    before, cpu = os.sched_getaffinity(0), max(os.sched_getaffinity(0))
    made = endpoint(0, config(proxy="thread", cpus=(cpu,), nice=2))
    try:
        assert os.sched_getaffinity(0) == before
        found = {task for task in Path("/proc/self/task").iterdir() if os.sched_getaffinity(int(task.name)) == {cpu}}
        assert len(found) == 1 or before == {cpu}
    finally:
        made.close()


def test_each_interface_is_one_more_path_of_tcp_rails():
    with line(2, rail="tcp", interfaces=("127.0.0.2",), connections_per_direction=1, ring_mib=16) as (first, second):
        assert [address.host for address in first.endpoint_info.addresses] == ["127.0.0.1", "127.0.0.2"]
        sent = [first.channel(1).send(activation(n), [torch.full((300_000,), float(n))]) for n in range(8)]
        for number in range(8):
            (found,) = second.channel(0).recv(activation(number)).wait().tensors
            assert torch.equal(found, torch.full((300_000,), float(number)))
        for work in sent:
            work.wait()
        rails = first.stats()["peers"][1]["rails"]
        assert set(rails) == {"tcp0", "tcp1"} and all(rail["delivered_bytes"] > 300_000 for rail in rails.values())


def test_an_interface_that_does_not_exist_is_refused_by_name():
    with pytest.raises(TransportError, match=r"no-such-nic.*this host has.*lo"):
        endpoint(0, config(interfaces=("no-such-nic",)))


def test_lists_of_json_are_accepted():
    block = {"transport": {"rdma_devices": ["mlx5_0"], "cpus": [0, 1], "interfaces": ["eth1"]}}
    found = parse_config(block).transport
    assert (found.rdma_devices, found.cpus, found.interfaces) == (("mlx5_0",), (0, 1), ("eth1",))
