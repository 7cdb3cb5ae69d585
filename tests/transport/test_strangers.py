"""Connections that do not prove the job's secret: refused, logged, counted; traffic goes on."""

import contextlib
import logging
import os
import socket
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptra_plugin.errors import HandshakeError, TransportError
from adaptra_plugin.transport.log import RateLimit
from adaptra_plugin.transport.proxy import handshake, handshake_connection
from adaptra_plugin.transport.proxy.handshake import (
    AcceptorMachine,
    Claim,
    InitiatorMachine,
    Purpose,
    Refused,
    Settings,
)

from .support import SECRET, activation, config, connect_line, endpoint, everywhere, line, table, until

CLAIM = Claim(source=1, pp_rank=1, target=0, purpose=Purpose.TCP, index=1)
SETTINGS = Settings(connections=2, ring_bytes=1 << 20)


def dial(e):
    return socket.create_connection((e.address.host, e.address.port), timeout=10)


def answer(sock):
    """Everything until the other end closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(4096):
            data += part
    return data


def traffic(first, second, step_id):
    for number in range(8):
        x = torch.full((1000,), float(number))
        first.channel(1).send(activation(number, step_id), [x])
        assert torch.equal(second.channel(0).recv(activation(number, step_id)).wait().tensors[0], x)


# --- over sockets


@pytest.mark.parametrize(
    ("garbage", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not a handshake of this transport"),
        (b"\0", "not a handshake of this transport"),
        (os.urandom(100_000), "not a handshake of this transport"),
        (b"", "closed the connection during the handshake"),
        (handshake.MAGIC, "closed the connection during the handshake"),
    ],
    ids=["http", "zero", "random", "scan", "start only"],
)
def test_garbage_is_refused_logged_and_counted(garbage, reason, caplog):
    caplog.set_level(logging.WARNING, "adaptra.transport")
    with line(2) as (first, second):
        with dial(second) as sock:
            name = f"{sock.getsockname()[0]}:{sock.getsockname()[1]}"
            with contextlib.suppress(ConnectionError):
                sock.sendall(garbage)
            if "closed" in reason:
                sock.shutdown(socket.SHUT_WR)
            data = answer(sock)
        assert len(data) in (0, 44)  # at most the greeting
        until(lambda: second.stats()["refused_connections"] == 1, "refusal")
        until(lambda: f"refused: connection from {name}" in caplog.text, "log line")
        assert reason in caplog.text or "broke during the handshake" in caplog.text
        traffic(first, second, 1)
        assert first.stats()["refused_connections"] == 0


def test_wrong_secret_is_refused_and_gets_no_proof_in_return(caplog):
    with line(2) as (first, second):
        with dial(second) as sock:
            machine = InitiatorMachine(b"x" * 32, Claim(0, 0, 1, Purpose.TCP, 0), SETTINGS)
            sock.sendall(machine.feed(sock.recv(machine.expects, socket.MSG_WAITALL)))
            welcome = sock.recv(machine.expects, socket.MSG_WAITALL)
            assert welcome[-32:] == bytes(32)
            with pytest.raises(Refused, match="does not know the job's secret"):
                machine.feed(welcome)
            assert sock.recv(1) == b""
        until(lambda: "it does not know the secret of this job" in caplog.text, "log line")
        assert second.stats()["refused_connections"] == 1
        traffic(first, second, 1)


def test_a_silent_connection_is_dropped_after_the_handshake_timeout(caplog):
    with line(2, handshake_timeout_s=0.2) as (first, second):
        with dial(second) as sock:
            sock.settimeout(10)
            assert len(answer(sock)) == 44
        until(lambda: "did not complete the handshake within 0.2 s" in caplog.text, "log line")
        traffic(first, second, 1)


def test_a_flood_of_half_open_connections_is_bounded_and_does_not_keep_peers_out(monkeypatch):
    monkeypatch.setattr(handshake_connection, "HALF_OPEN", 8)
    monkeypatch.setattr(handshake_connection, "HALF_OPEN_GRACE_S", 0.05)
    endpoints = [endpoint(rank, config()) for rank in (0, 1)]
    strangers = []
    try:
        for e in endpoints:
            strangers += [dial(e) for _ in range(40)]
        assert connect_line(endpoints) == [None, None]
        traffic(*endpoints, 1)
        for e in endpoints:
            until(lambda e=e: e.stats()["refused_connections"] >= 20, "refusals")
            assert len(e._proxy._proxy._listeners._acceptors[0]._half_open) <= 8
    finally:
        for sock in strangers:
            sock.close()
        everywhere(*(e.close for e in endpoints))


def test_a_flood_of_strangers_writes_few_lines(caplog):
    with line(2) as (first, second):
        for _ in range(60):
            with dial(second) as sock, contextlib.suppress(ConnectionError):
                sock.sendall(b"nonsense")
        until(lambda: second.stats()["refused_connections"] == 60, "refusals")
        assert caplog.text.count("refused:") <= 15
        traffic(first, second, 1)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (Claim(0, 0, 1, Purpose.TCP, 9), "no connection tcp9 is wanted with rank 0"),
        (Claim(5, 0, 1, Purpose.TCP, 0), "rank 5 is no neighbour of rank 1"),
        (Claim(0, 7, 1, Purpose.TCP, 0), "rank 0 says it is stage 7, here it is known as rank 0 (stage 0, host n)"),
    ],
    ids=["place", "rank", "stage"],
)
def test_a_connection_that_has_no_place_is_refused_though_it_knows_the_secret(claim, reason, caplog):
    with line(2) as (first, second):
        with dial(second) as sock:
            machine = InitiatorMachine(SECRET, claim, SETTINGS)
            while not machine.done:
                sock.sendall(machine.feed(sock.recv(machine.expects, socket.MSG_WAITALL)))
            assert sock.recv(1) == b""
        until(lambda: reason in caplog.text, "log line")
        traffic(first, second, 1)


def test_ranks_with_different_secrets_or_settings_say_so():
    for changes, expected in (
        ({"secret": b"another secret, also long enough"}, "give the same secret to all ranks"),
        ({"settings": config(connections_per_direction=3)}, "connections_per_direction 3"),
    ):
        first = endpoint(0, changes.get("settings", config()), secret=changes.get("secret", SECRET))
        second = endpoint(1, config(connect_deadline_s=10))
        try:
            peers = table((first, second))
            with pytest.raises(HandshakeError, match=expected) as caught:  # rank 1 dials the coordinator
                second.connect(peers, neighbours=[0], coordinator=0)
            assert "rank 0 (stage 0, host n) at 127.0.0.1:" in str(caught.value)
        finally:
            everywhere(first.close, second.close)


# --- the state machines themselves


def talk(acceptor, initiator, tamper=lambda number, raw: raw):
    """Runs a handshake; `tamper` may change each message on its way."""
    raw = tamper(0, acceptor.start())
    raw = tamper(1, initiator.feed(raw))
    raw = tamper(2, acceptor.feed(raw))
    raw = tamper(3, initiator.feed(raw))
    acceptor.feed(raw)


def pair(rank=0, secret=SECRET, settings=SETTINGS):
    return AcceptorMachine(SECRET, rank, SETTINGS), InitiatorMachine(secret, CLAIM, settings)


def test_both_ends_learn_the_other_and_its_settings():
    acceptor, initiator = AcceptorMachine(SECRET, 0, Settings(2, 1 << 21)), InitiatorMachine(SECRET, CLAIM, SETTINGS)
    talk(acceptor, initiator)
    assert acceptor.done and initiator.done
    assert acceptor.claim == CLAIM
    assert (acceptor.peer_settings, initiator.peer_settings) == (SETTINGS, Settings(2, 1 << 21))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 3), st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(message, position, change):
    acceptor, initiator = pair()

    def tamper(number, raw):
        if number != message:
            return raw
        at = position % len(raw)
        return raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1 :]

    with contextlib.suppress(HandshakeError):
        talk(acceptor, initiator, tamper)
    assert not acceptor.done
    assert message == 3 or not initiator.done


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=200, max_size=200))
def test_random_bytes_never_pass_nor_crash(data):
    acceptor, initiator = pair()
    acceptor.start()
    with contextlib.suppress(HandshakeError):
        acceptor.feed(data[: acceptor.expects])
        acceptor.feed(data[: acceptor.expects])
    with contextlib.suppress(HandshakeError):
        initiator.feed(data[: initiator.expects])
        initiator.feed(data[: initiator.expects])
    assert not acceptor.done and not initiator.done


def test_a_recorded_proof_cannot_be_replayed_nor_reflected():
    first, initiator = pair()
    proof = initiator.feed(first.start())
    second = AcceptorMachine(SECRET, 0, SETTINGS)
    second.start()  # another nonce
    second.feed(proof)
    assert second.refused == "it does not know the secret of this job" and not second.done
    welcome = first.feed(proof)
    third = InitiatorMachine(SECRET, CLAIM, SETTINGS)
    third.feed(first.start())
    with pytest.raises(Refused):
        third.feed(welcome)


def test_wrong_target_and_versions_are_named():
    acceptor, initiator = pair(rank=5)
    with pytest.raises(Refused, match="it is not rank 0: the published addresses"):
        talk(acceptor, initiator)
    assert acceptor.refused == "rank 1 looks for rank 0, this is rank 5"
    _, initiator = pair()
    greeting = bytearray(AcceptorMachine(SECRET, 0, SETTINGS).start())
    struct.pack_into("<H", greeting, 8, 9)
    with pytest.raises(HandshakeError, match="protocol version 9, this side 2"):
        initiator.feed(bytes(greeting))


def test_rate_limit_counts_what_it_holds_back():
    now = [0.0]
    limit = RateLimit(burst=2, every_s=5.0, clock=lambda: now[0])
    assert [limit.allow() for _ in range(5)] == [0, 0, None, None, None]
    now[0] = 6.0
    assert [limit.allow(), limit.allow()] == [3, None]
    now[0] = 100.0
    assert [limit.allow() for _ in range(3)] == [1, 0, None]


def test_secret_must_be_long_enough():
    with pytest.raises(TransportError, match="has 3 bytes: give at least 16"):
        endpoint(0, config(), secret=b"abc")
