"""Connections in the making: what fails at once fails like what fails later, from the loop."""

from __future__ import annotations

import logging
import socket
import time

import pytest

from adaptra_plugin.transport import Address
from adaptra_plugin.transport.proxy.handshake import Claim, Purpose, Settings
from adaptra_plugin.transport.proxy.handshake_connection import Acceptor, Connector
from adaptra_plugin.transport.proxy.loop import Loop

SECRET, SETTINGS = b"a secret of the tests, 32 bytes.", Settings(2, 1 << 20)
CLAIM = Claim(1, 1, 0, Purpose.TCP, 0)


@pytest.fixture
def loop():
    found = Loop()
    yield found
    found.close()


def run(loop, condition, patience_s=10.0):
    end = time.monotonic() + patience_s
    loop.turn_ended = lambda: loop.stop() if condition() or time.monotonic() > end else None
    loop.call_later(patience_s, lambda: None)
    loop._stopped = False
    loop.run()
    assert condition()


def dial(loop, address, source=None, failed=None):
    nobody = lambda *found: pytest.fail("nobody listens there")  # noqa: E731
    return Connector(loop, address, CLAIM, SECRET, SETTINGS, 5.0, source, nobody, nobody, failed)


@pytest.mark.parametrize(
    ("address", "source", "says"),
    [
        ("adaptra-nobody", None, "refused"),  # a Unix socket: refused within the call
        (Address("127.0.0.1", 1), "192.0.2.1", "assign"),  # no address of this host
        (Address("no number", 1), None, "name"),
    ],
)
def test_a_dialer_tells_its_owner_of_a_failure_when_the_owner_has_it(loop, address, source, says):
    dialers, reasons = {}, []

    def failed(claim, error):
        assert claim is CLAIM
        reasons.append(str(error))
        dialers.pop("one").close()

    dialers["one"] = dial(loop, address, source, failed)
    assert reasons == []
    run(loop, lambda: reasons)
    assert len(reasons) == 1 and says in reasons[0].lower()


def test_a_dialer_that_is_closed_at_once_never_dials(loop):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        dial(loop, Address("127.0.0.1", server.getsockname()[1])).close()
        turns = []
        loop.call_later(0.02, lambda: turns.append(1))
        run(loop, lambda: turns)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_connection_that_fails_while_it_is_taken_is_refused_and_the_next_one_is_heard(loop, caplog):
    caplog.set_level(logging.WARNING, "adaptra.transport")

    class Broken:
        def accepted(self, sock):
            raise OSError(104, "Connection reset by peer")

    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    acceptor = Acceptor(loop, server, SECRET, 0, SETTINGS, 5.0, lambda *found: None, tls=Broken())
    for count in (1, 2):
        with socket.create_connection(server.getsockname()):
            run(loop, lambda count=count: acceptor.refused == count)
    assert caplog.text.count("it could not be taken (Connection reset by peer)") == 2
    acceptor.close()
