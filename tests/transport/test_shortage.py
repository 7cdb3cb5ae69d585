"""Limits that are reached while the transport starts or runs: one error that names the limit, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from adaptra_plugin.errors import TransportError
from adaptra_plugin.report.worker import BatchWorker
from adaptra_plugin.transport import spawn
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.memory import Memory
from adaptra_plugin.transport.slabs import Slabs

from .support import activation, config, endpoint, line

MIB = 1 << 20


@contextlib.contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process can open so many more."""
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    taken = []
    with limited(resource.RLIMIT_NOFILE, highest + 50):
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(count):
                os.close(taken.pop())
            yield
        finally:
            for fd in taken:
                os.close(fd)


def without_threads(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> str:
    """The error of a call in a forked process that may start neither threads nor processes, and how many children it has
    then. `before` runs while it still may."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before()
            if os.getuid() == 0:
                os.setresuid(65534, 65534, 65534)  # the limit does not count for root
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            try:
                call()
                said = "no error"
            except TransportError as error:
                said = str(error)
            children = [process for process in psutil.Process().children() if process.status() != "zombie"]
            os.write(write_end, f"{said} [{len(children)} children]".encode())
        except BaseException:  # noqa: BLE001  a forked child never returns into pytest
            os.write(write_end, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as pipe:
        return pipe.read().decode()


@pytest.mark.parametrize("proxy", ["thread", "process"])
def test_no_thread_and_no_process_for_the_proxy(proxy):
    said = without_threads(lambda: endpoint(0, config(proxy=proxy)))
    assert said.startswith(f"the proxy {proxy} of rank 0 cannot be started (")
    assert "may have 0 processes and threads" in said and "(RLIMIT_NPROC): `ulimit -u`" in said
    assert said.endswith("[0 children]")


def test_no_thread_for_the_endpoint():
    """Its proxy runs already, and ends with it."""
    ready: list[spawn.Running] = []
    said = without_threads(
        lambda: endpoint(0, config(), spawn=lambda rank: ready.pop()), lambda: ready.append(spawn.ProxyThread(0))
    )
    assert said.startswith("the endpoint of rank 0 cannot be started (can't start new thread: ")
    assert "(RLIMIT_NPROC)" in said and said.endswith("[0 children]")


def test_no_thread_for_reports_costs_the_reports(caplog):
    def report() -> None:
        worker: BatchWorker[int] = BatchWorker("adaptra-jsonl-0", print, print, 10)
        worker.put(1)
        assert worker.close(1.0)
        raise TransportError(caplog.text)

    said = without_threads(report)
    assert "report: adaptra-jsonl-0 cannot be started, and its records are lost: can't start new thread: " in said
    assert "(RLIMIT_NPROC)" in said


def test_every_descriptor_that_is_missing_is_told_of():
    """However many are left: it starts, or it says which limit was reached and leaves nothing behind."""
    errors = 0
    for spare in range(30):
        with descriptors_left(spare):
            try:
                only = endpoint(0, config())
            except TransportError as error:
                errors += 1
                assert "(RLIMIT_NOFILE): raise `ulimit -n`" in str(error), (spare, str(error))
            else:
                only.close()
    assert 5 < errors < 30


def test_no_descriptors_for_a_proxy_process():
    for spare in range(6):
        with (
            descriptors_left(spare),
            pytest.raises(
                TransportError, match=r"proxy process of rank 0 .*may have \d+ files open and has .*`ulimit -n`"
            ),
        ):
            spawn.ProxyProcess(0)


def test_rings_longer_than_a_file_may_be():
    with (
        limited(resource.RLIMIT_FSIZE, 4096),
        pytest.raises(
            TransportError,
            match=r"no shared memory of 1048576 bytes .*shared memory included, may have 4096 bytes \(RLIMIT_FSIZE\)",
        ),
        line(2, connect_deadline_s=2.0),
    ):
        pass


def test_no_addresses_left_for_rings_and_received_tensors():
    used = psutil.Process().memory_info().vms
    ring = Memory(Memfd.create(256 * MIB))
    with limited(resource.RLIMIT_AS, used + 64 * MIB):
        with pytest.raises(TransportError, match=r"a staging ring of 268435456 bytes cannot be mapped .*\(RLIMIT_AS\)"):
            ring.tensor  # noqa: B018
        with pytest.raises(TransportError, match=r"no memory for a received tensor of 268435456 bytes .*\(RLIMIT_AS\)"):
            Slabs(MIB).empty((256 * MIB,), torch.uint8)
    assert ring.tensor.numel() == 256 * MIB
    ring.close()


def test_a_proxy_that_runs_out_of_memory_says_so():
    with line(2, proxy="process", rail="tcp", ring_mib=64) as (first, second):
        pid = first._proxy.pid
        used = psutil.Process(pid).memory_info().vms
        resource.prlimit(pid, resource.RLIMIT_AS, (used + MIB, resource.RLIM_INFINITY))
        first.channel(1).send(activation(0), [torch.zeros(MIB)])
        with pytest.raises(TransportError, match=r"proxy process of rank 0 .*MiB of addresses.*\(RLIMIT_AS\)"):
            first.channel(1).recv(activation(1)).wait()
            time.sleep(0)
        second.close(linger_s=0.0)
