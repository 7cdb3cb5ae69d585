"""Deadlines, lost peers, goodbyes, failed endpoints: who is named, how soon, and what still works."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import traceback

import pytest
import torch

from adaptra_plugin.errors import PeerLostError, TransferTimeout, TransportError
from adaptra_plugin.transport import Address
from adaptra_plugin.transport.frames import TIMES, Header, Kind, parse_header
from adaptra_plugin.transport.handshake import Claim, Initiator, Purpose, Settings
from adaptra_plugin.transport.tickets import Loss

from .support import SECRET, STUCK, activation, config, endpoint, everywhere, gradient, info, line, until


def test_deadline_of_a_receive_names_transfer_peer_and_remedy():
    with line(2) as (first, second):
        first.channel(1).send(activation(2), [torch.ones(1)])
        ticket = second.channel(0).recv(activation(0, epoch=7))
        until(lambda: second.stats()["peers"][0]["directions"]["activation"]["received"]["messages"], "arrival")
        with pytest.raises(TransferTimeout) as caught:
            ticket.wait(0.05)
        text = str(caught.value)
        assert text.startswith(
            "activation of microbatch 0 to stage 1 (epoch 7) did not arrive from rank 0 (stage 0, host n) within 0.05 s"
        )
        assert "unread: activation of microbatch 2 to stage 1 (epoch 0)" in text
        assert "adaptra.transport.deadline_s" in text
        first.channel(1).send(activation(0, epoch=7), [torch.ones(1)])  # late, but the ticket still holds
        assert ticket.wait().tensors[0].item() == 1


def test_the_configured_deadline_applies_without_an_argument():
    with line(2, deadline_s=0.05) as (_, second), pytest.raises(TransferTimeout, match=r"within 0\.05 s"):
        second.channel(0).recv(activation(0)).wait()


def test_deadline_of_a_send():
    with line(2, links=[STUCK]) as (first, _):
        ticket = first.channel(1).send(activation(0), [torch.zeros(1000)])
        with pytest.raises(
            TransferTimeout, match=r"was not taken by rank 1 \(stage 1, host n\) within 0\.01 s"
        ) as caught:
            ticket.wait(0.01)
        assert "1 messages wait in the staging ring, 4160 of 1048576 bytes" in str(caught.value)
        assert not ticket.ready()
        first.close(linger_s=0.0)


@contextlib.contextmanager
def forked_peer(run, links=()):
    """Rank 0 here and rank 1 in a forked child that connects, then runs `run(endpoint)` and waits to be killed."""
    read_end, write_end = os.pipe()
    to_child_read, to_child_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            os.close(to_child_write)
            mine = endpoint(1, config())
            os.write(write_end, (mine.address.to_text() + "\n").encode())
            other = Address.parse(os.read(to_child_read, 100).decode())
            mine.connect({0: (info(0), other), 1: (mine.me, mine.address)}, neighbours=[0], coordinator=0)
            run(mine)
            os.write(write_end, b"ready\n")
            time.sleep(60)
        except BaseException:  # noqa: BLE001  a forked child never returns into pytest
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write_end)
    os.close(to_child_read)
    lines = os.fdopen(read_end)
    first = endpoint(0, config(), simulate_links=links)
    try:
        there = Address.parse(lines.readline().strip())
        os.write(to_child_write, first.address.to_text().encode())
        peer = info(1)
        first.connect({0: (first.me, first.address), 1: (peer, there)}, neighbours=[1], coordinator=0)
        assert lines.readline() == "ready\n"
        yield first, pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        lines.close()
        os.close(to_child_write)
        first.close()


def test_killed_peer_is_named_at_once_and_what_had_arrived_stays_readable(caplog):
    def child(mine):
        for number in range(3):
            mine.channel(0).send(gradient(number), [torch.full((5,), number)]).wait()

    with forked_peer(child) as (first, pid):
        lost = []
        first.on_peer_lost = lambda peer, reason: lost.append((peer, reason))
        channel = first.channel(1)
        before = channel.recv(gradient(0))
        before.wait()
        waiting = [channel.recv(gradient(number)) for number in (10, 11)]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed = time.monotonic()
        for ticket in waiting:
            with pytest.raises(PeerLostError) as caught:
                ticket.wait()
        assert time.monotonic() - killed < 5
        text = str(caught.value)
        assert text.startswith(
            "gradient of microbatch 11 to stage 0 (epoch 0) cannot arrive from rank 1 (stage 1, host n1)"
        )
        assert "its connection" in text and "waited" in text and "restart the job from a checkpoint" in text
        assert before.wait().tensors[0].tolist() == [0.0] * 5
        for number in (1, 2):
            assert channel.recv(gradient(number)).wait().tensors[0].tolist() == [number] * 5
        with pytest.raises(PeerLostError, match=r"gradient .* cannot arrive from rank 1"):
            channel.recv(gradient(12)).wait()
        with pytest.raises(PeerLostError, match=r"activation .* cannot be sent to rank 1 \(stage 1, host n1\)"):
            channel.send(activation(0), [torch.ones(1)])
        until(lambda: lost, "on_peer_lost")
        time.sleep(0.05)  # the other connections end as well
        assert [peer.rank for peer, _ in lost] == [1]
        assert "lost: rank 1 (stage 1, host n1)" in caplog.text


def test_blocked_producers_and_pending_sends_hear_of_the_loss():
    with forked_peer(lambda mine: None, links=[STUCK]) as (first, pid):
        pending = first.channel(1).send(activation(0), [torch.zeros(200_000)])
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        start = time.monotonic()
        with pytest.raises(PeerLostError, match=r"activation of microbatch 2 .* cannot be sent to rank 1 .*waited"):
            first.channel(1).send(activation(2), [torch.zeros(200_000)])
        with pytest.raises(PeerLostError, match="cannot be sent to rank 1"):
            pending.wait()
        assert 0.2 < time.monotonic() - start < 5


def test_goodbye_is_no_loss_but_ends_waits_at_once(caplog):
    caplog.set_level(logging.INFO, "adaptra.transport")
    with line(3) as (first, second, third):
        lost = []
        for e in (first, second):
            e.on_peer_lost = lambda peer, reason: lost.append(peer)
        third.channel(1).send(gradient(0, stage=1), [torch.ones(1)])
        ticket = second.channel(2).recv(gradient(5, stage=1))
        third.close()
        with pytest.raises(
            PeerLostError, match=r"cannot arrive from rank 2 .* it has ended and closed its connections"
        ):
            ticket.wait(10)
        assert second.channel(2).recv(gradient(0, stage=1)).wait().tensors[0].item() == 1
        until(lambda: second._links[2].sending[0][0].loss, "goodbye")
        with pytest.raises(PeerLostError, match="cannot be sent to rank 2"):
            second.channel(2).send(activation(0, stage=2), [torch.ones(1)])
        first.channel(1).send(activation(0), [torch.ones(1)])  # the others go on
        second.channel(0).recv(activation(0)).wait()
        assert lost == []
    assert "lost" not in caplog.text
    assert "left: rank 2 (stage 2, host n)" in caplog.text


def test_close_sends_what_waits():
    with line(2, connections_per_direction=1, ring_mib=8) as (first, second):
        sent = [torch.full((500_000,), float(number)) for number in range(4)]
        for number, tensor in enumerate(sent):
            first.channel(1).send(activation(number), [tensor])
        everywhere(lambda: first.close(linger_s=20))
        for number, tensor in enumerate(sent):
            assert torch.equal(second.channel(0).recv(activation(number)).wait().tensors[0], tensor)


def test_close_gives_up_after_linger_and_says_so(caplog):
    with line(2, links=[STUCK]) as (first, _):
        first.channel(1).send(activation(0), [torch.zeros(1000)])
        start = time.monotonic()
        first.close(linger_s=0.2)
        assert 0.2 <= time.monotonic() - start < 5
        assert "closed with 4160 bytes unsent to rank 1 (stage 1, host n)" in caplog.text


def test_fail_ends_every_wait_with_that_error():
    with line(2, links=[STUCK]) as (first, _):
        arrived = first.channel(1).recv(gradient(0))
        errors = []

        def produce():
            try:
                for number in range(0, 100, 2):
                    first.channel(1).send(activation(number), [torch.zeros(100_000)])
            except TransportError as error:
                errors.append(error)

        producer = threading.Thread(target=produce)
        producer.start()
        until(lambda: first.stats()["peers"][1]["directions"]["activation"]["sent"]["full"], "full ring")
        error = PeerLostError("rank 7 is lost, says the coordinator")
        first.fail(error)
        first.fail(TransportError("a later one does not count"))
        producer.join(10)
        assert errors == [error]
        for call in (
            arrived.wait,
            first.channel(1).recv(gradient(1)).wait,
            lambda: first.channel(1).send(activation(0), []),
            lambda: first.send_control(1, {}),
        ):
            with pytest.raises(PeerLostError, match="rank 7 is lost"):
                call()
        assert arrived.ready()
        first.close(linger_s=0.0)


@pytest.mark.parametrize("callback", ["on_control", "on_peer_lost"])
def test_an_exception_on_the_proxy_thread_fails_the_endpoint_loudly(callback, caplog):
    with line(2) as (first, second):

        def broken(*_):
            raise ZeroDivisionError("in a callback")

        setattr(second, callback, broken)
        if callback == "on_control":
            first.send_control(1, {"a": 1})
        else:
            loss = Loss(PeerLostError, "a test says so", "")
            second._proxy.loop.post(lambda: second._proxy._peers[0].lose(loss))
        until(lambda: second._fate.error, "failure")
        for call in (second.channel(0).recv(activation(0)).wait, lambda: second.channel(0).send(gradient(0), [])):
            with pytest.raises(TransportError, match="proxy thread of rank 1 failed: ZeroDivisionError: in a callback"):
                call()
        assert "Traceback" in caplog.text


# --- an authenticated peer that sends nonsense

HEADER = Header(Kind.DATA, 0, 0.0, 64, 64, tensors=1)
NONSENSE = {
    "no magic": (b"x" * 64, "a frame starts with 78787878"),
    "unknown kind": (HEADER.pack().replace(b"ADf1\x01", b"ADf1\x63"), "unknown kind"),
    "longer than the ring": (Header(Kind.DATA, 0, 0.0, 0, 1 << 40).pack(), "at most 1048576 are accepted"),
    "huge description": (Header(Kind.DATA, 0, 0.0, 0xFFFFFFFF, 0).pack(), "at most 1048576 are accepted"),
    "out of sequence": (Header(Kind.DATA, 5, 0.0).pack(), "frame number 5 came where 0 was due"),
    "bad description": (HEADER.pack() + b"\xff" * 128, "unknown dtype code 255"),
    "control on data": (Header(Kind.CONTROL, 0, 0.0, 0, 64).pack() + b"{}" * 32, "a control frame came on a data"),
}


def impostor(address, purpose, index=0, connections=1):
    """A raw connection that has passed the handshake as rank 1."""
    sock = socket.create_connection((address.host, address.port), timeout=10)
    machine = Initiator(SECRET, Claim(1, 1, 0, purpose, index), Settings(connections, 1 << 20))
    while not machine.done:
        sock.sendall(machine.feed(sock.recv(machine.expects, socket.MSG_WAITALL)))
    return sock


def pong(sock, count=8):
    """Answers the first pings, so that the link counts as connected."""
    for number in range(count):
        ping = parse_header(sock.recv(64, socket.MSG_WAITALL), sequence=number, limit=64)
        assert ping.kind == Kind.PING
        now = time.monotonic()
        sock.sendall(Header(Kind.PONG, number, now, payload_bytes=TIMES.size).pack() + TIMES.pack(ping.sent, now))


@pytest.mark.parametrize("name", NONSENSE)
def test_malformed_frame_ends_the_link_with_a_clear_error(name):
    raw, expected = NONSENSE[name]
    first = endpoint(0, config(connections_per_direction=1))
    socks = []
    try:

        def there():
            socks.append(impostor(first.address, Purpose.SERVICE))
            socks.append(impostor(first.address, Purpose.ACTIVATION))
            socks.append(impostor(first.address, Purpose.GRADIENT))
            pong(socks[0])

        peers = {0: (first.me, first.address), 1: (info(1), Address("127.0.0.1", 1))}
        errors = everywhere(there, lambda: first.connect(peers, neighbours=[1], coordinator=0))
        assert errors == [None, None]
        ticket = first.channel(1).recv(gradient(0))
        socks[2].sendall(raw)
        with pytest.raises(TransportError) as caught:
            ticket.wait(10)
        assert not isinstance(caught.value, PeerLostError | TransferTimeout)
        text = str(caught.value)
        assert "rank 1 (stage 1, host n1): it sent a malformed frame on connection gradient 0" in text
        assert expected in text
        assert socks[2].recv(1) == b""
    finally:
        for sock in socks:
            sock.close()
        first.close()


@pytest.mark.parametrize("raw", [b"{", b"[1]", b"\xff", b"[" * 100_000], ids=["cut", "list", "binary", "deep"])
def test_control_messages_are_json_objects(raw):
    first = endpoint(0, config())
    sock = None
    try:

        def there():
            nonlocal sock
            sock = impostor(first.address, Purpose.SERVICE, connections=2)

        peers = {0: (first.me, first.address), 1: (info(1), Address("127.0.0.1", 1))}
        assert everywhere(there, lambda: first.connect(peers, neighbours=[], coordinator=0)) == [None, None]
        lost = []
        first.on_peer_lost = lambda peer, reason: lost.append(reason)
        sock.sendall(Header(Kind.CONTROL, 0, 0.0, payload_bytes=len(raw)).pack() + raw)
        until(lambda: lost, "loss")
        assert "malformed frame on connection service" in lost[0]
    finally:
        sock.close()
        first.close()
