"""What must hold when shared memory goes and comes back, and whatever reaches the proxy from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from adaptra_plugin.transport import bridge
from adaptra_plugin.transport.bridge import Reader
from tests.transport.support import activation, config, endpoint, line, until

pytestmark = pytest.mark.usefixtures("by_proxies")


def cut(link, rail, reason="cut by the test"):
    link.connections[rail].rail._fail(reason)


def back(link, rail, before):
    return lambda: (
        rail in link.connections and link.connections[rail].rail is not before and link.connections[rail].ready
    )


def test_a_message_that_came_by_reference_is_read_after_shared_memory_has_gone_and_come_back():
    data = torch.arange(30_000)
    with line(2) as (first, second):
        work = second.channel(0).recv(activation(0))
        first.channel(1).send(activation(0), [data]).wait()
        until(work.ready, "arrival")
        proxy = first._proxy._proxy
        link = proxy._peers[1].link
        before = link.connections["shm"].rail
        proxy.loop.post(lambda: cut(link, "shm"))
        until(back(link, "shm", before), "return of shared memory")
        other = second._proxy._proxy._peers[0].link
        until(lambda: "shm" in other.connections and other.connections["shm"].ready, "return at the other end")
        time.sleep(0.1)
        assert torch.equal(work.wait().tensors[0], data)
        first.channel(1).send(activation(1), [data * 2])
        assert torch.equal(second.channel(0).recv(activation(1)).wait().tensors[0], data * 2)


def test_one_refused_attempt_does_not_lose_a_rail_for_ever():
    with line(2, rail="tcp", connections_per_direction=1, reconnect_s=20.0) as (first, second):
        dialler = second._proxy._proxy if second._proxy._proxy._peers[0].dials else first._proxy._proxy
        (peer,) = dialler._peers.values()
        good, before = dialler.secret, peer.link.connections["tcp0"].rail
        dialler.secret = b"another secret, for a moment...."
        dialler.loop.post(lambda: cut(peer.link, "tcp0"))
        until(lambda: peer.link.health["tcp0"]._pauses.pause_s > 1.0, "a few refusals")
        assert not peer.gone
        dialler.secret = good
        until(back(peer.link, "tcp0", before), "return")
        first.channel(1).send(activation(0), [torch.ones(5)])
        assert torch.equal(second.channel(0).recv(activation(0)).wait().tensors[0], torch.ones(5))


def test_signals_for_the_job_do_not_end_the_proxy():
    made = endpoint(0, config(proxy="process"))
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            os.kill(made._proxy.pid, number)
        time.sleep(0.2)
        assert made.stats()["refused_connections"] == 0
        os.kill(made._proxy.pid, 0)
    finally:
        made.close()


def test_the_proxy_imports_nothing_from_the_working_directory(tmp_path):
    (tmp_path / "xxhash.py").write_text("raise SystemExit('imported from the working directory')")
    program = textwrap.dedent("""
        import sys
        sys.path[:] = [path for path in sys.path if path]
        from adaptra_plugin.config import TransportConfig
        from adaptra_plugin.transport import Endpoint, PeerInfo
        Endpoint(PeerInfo(0, 0, "n"), TransportConfig(), b"x" * 32, bind_host="127.0.0.1").close()
        print("fine")
    """)
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.stdout == "fine\n", run.stderr


def test_a_host_name_to_listen_on_is_published_as_an_address():
    made = endpoint(0, config(bind="localhost"))
    try:
        assert made.address.host in ("127.0.0.1", "::1")
    finally:
        made.close()


def test_a_message_whose_descriptors_found_no_room_comes_without_them(monkeypatch):
    here, there = socket.socketpair()
    reader = Reader(here)
    memfd = os.memfd_create("x")
    try:
        socket.send_fds(there, [bridge.encode({"event": "memfds"}, 5)], [memfd] * 5)
        there.sendall(bridge.encode({"event": "lost"}))
        # as if the process could take one of the two only
        monkeypatch.setattr(bridge, "_MAX_DESCRIPTORS", 1)
        found = []
        while len(found) < 2:
            found += reader.receive()
        assert json.dumps(found) == json.dumps([[{"event": "memfds"}, []], [{"event": "lost"}, []]])
    finally:
        os.close(memfd)
        here.close()
        there.close()
