"""Deadlines, lost peers, goodbyes, failed endpoints and proxies: who is named, how soon, and what still works."""

import contextlib
import logging
import os
import signal
import threading
import time
import traceback

import psutil
import pytest
import torch

from adaptra_plugin.config import SimulateConfig
from adaptra_plugin.errors import PeerLostError, TransferTimeout, TransportError
from adaptra_plugin.transport import Direction, EndpointInfo, spawn
from adaptra_plugin.transport import endpoint as endpoint_module
from adaptra_plugin.transport.bridge import Op
from adaptra_plugin.transport.frames import MessageHeader

from .fake_proxy import connected
from .support import STUCK, activation, config, endpoint, everywhere, gradient, info, line, until


def test_deadline_of_a_receive_names_transfer_peer_and_remedy():
    with line(2) as (first, second):
        first.channel(1).send(activation(2), [torch.ones(1)])
        work = second.channel(0).recv(activation(0, step_id=7))
        until(lambda: second.stats()["peers"][0]["directions"]["activation"]["received"]["messages"], "arrival")
        with pytest.raises(TransferTimeout) as caught:
            work.wait(0.05)
        text = str(caught.value)
        assert text.startswith(
            "activation of microbatch 0 to stage 1 (step 7) did not arrive from rank 0 (stage 0, host n) within 0.05 s"
        )
        assert "unread: activation of microbatch 2 to stage 1 (step 0)" in text
        assert "adaptra.transport.deadline_s" in text
        first.channel(1).send(activation(0, step_id=7), [torch.ones(1)])  # late, but the work still holds
        assert work.wait().tensors[0].item() == 1


def test_the_configured_deadline_applies_without_an_argument():
    with line(2, deadline_s=0.05) as (_, second), pytest.raises(TransferTimeout, match=r"within 0\.05 s"):
        second.channel(0).recv(activation(0)).wait()


def test_deadline_of_a_send():
    first, fake = connected()
    work = first.channel(1).send(activation(0), [torch.zeros(1000)])
    with pytest.raises(TransferTimeout, match=r"was not taken by rank 1 \(stage 1, host n1\) within 0\.01 s") as caught:
        work.wait(0.01)
    assert "1 messages wait in the staging ring, 4160 of 1048576 bytes" in str(caught.value)
    assert not work.ready()
    first.close()
    fake.close()


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
            os.write(write_end, (mine.endpoint_info.to_text() + "\n").encode())
            other = EndpointInfo.parse(os.read(to_child_read, 4096).decode())
            mine.connect({0: (info(0), other), 1: (mine.me, mine.endpoint_info)}, neighbours=[0], coordinator=0)
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
    first = endpoint(0, config(), simulate=SimulateConfig(links=tuple(links)))
    try:
        there = EndpointInfo.parse(lines.readline().strip())
        os.write(to_child_write, first.endpoint_info.to_text().encode())
        peer = info(1)
        first.connect({0: (first.me, first.endpoint_info), 1: (peer, there)}, neighbours=[1], coordinator=0)
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
        for work in waiting:
            with pytest.raises(PeerLostError) as caught:
                work.wait()
        assert time.monotonic() - killed < 5
        text = str(caught.value)
        assert text.startswith(
            "gradient of microbatch 11 to stage 0 (step 0) cannot arrive from rank 1 (stage 1, host n1)"
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


def test_the_death_of_a_peer_is_no_news_of_its_rails(caplog):
    with forked_peer(lambda mine: None) as (first, pid):
        steps, lost = [], []
        first.on_rail = lambda peer, rail, state, why: steps.append((rail, state, why))
        first.on_peer_lost = lambda peer, reason: lost.append(peer.rank)
        assert set(first.stats()["peers"][1]["rails"]) == {"shm", "tcp0", "tcp1"}
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        until(lambda: lost, "on_peer_lost")
        time.sleep(0.1)  # the other connections end as well
    assert steps == [] and lost == [1]
    said = [r.getMessage() for r in caplog.records if "rail" in r.getMessage() or "lost" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("lost: rank 1 (stage 1, host n1)")


@pytest.mark.parametrize("cut", [("tcp0",), ("shm", "tcp1"), ("shm", "tcp0", "tcp1")])
def test_rails_that_end_while_the_peer_lives_are_told_of_at_once(cut):
    with line(2) as (first, _):
        steps = []
        first.on_rail = lambda peer, rail, state, why: steps.append((time.monotonic(), rail, state))
        link = first._proxy._proxy._peers[1].link
        began = time.monotonic()
        first._proxy._proxy.loop.post(lambda: [link.connections[name].rail._fail("cut by the test") for name in cut])
        until(lambda: {name for _, name, state in steps if state == "paused"} == set(cut), "news of the rails")
        assert max(at for at, _, state in steps if state == "paused") - began < 1.0
        until(lambda: {name for _, name, state in steps if state == "healthy"} >= set(cut), "their return")
        for name in cut:
            assert [state for _, rail, state in steps if rail == name] == ["paused", "healthy"]


def test_blocked_producers_hear_of_the_loss():
    with forked_peer(lambda mine: None) as (first, pid):
        for number in range(5):
            first.channel(1).send(activation(2 * number), [torch.zeros(50_000)])
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        start = time.monotonic()
        with pytest.raises(PeerLostError, match=r"activation of microbatch 12 .* cannot be sent to rank 1 .*waited"):
            first.channel(1).send(activation(12), [torch.zeros(50_000)])
        assert 0.2 < time.monotonic() - start < 5


def test_pending_sends_hear_of_the_loss_and_a_blocked_one_too():
    first, fake = connected()
    pending = first.channel(1).send(activation(0), [torch.zeros(200_000)])
    fake.expect(Op.SEND)

    def lose():
        fake.expect(Op.STUCK)
        fake.tell("lost", rank=1, error="PeerLostError", reason="its connections broke", remedy="Look.")
        fake.record(Op.LOST)

    def blocked():
        with pytest.raises(PeerLostError, match=r"microbatch 2 .* cannot be sent to rank 1 .*: its connections broke"):
            first.channel(1).send(activation(2), [torch.zeros(200_000)])

    assert everywhere(lose, blocked) == [None, None]
    with pytest.raises(PeerLostError, match="cannot be sent to rank 1"):
        pending.wait()
    first.close()
    fake.close()


def test_goodbye_is_no_loss_but_ends_waits_at_once(caplog):
    caplog.set_level(logging.INFO, "adaptra.transport")
    with line(3) as (first, second, third):
        lost = []
        for e in (first, second):
            e.on_peer_lost = lambda peer, reason: lost.append(peer)
        third.channel(1).send(gradient(0, stage=1), [torch.ones(1)])
        work = second.channel(2).recv(gradient(5, stage=1))
        third.close()
        with pytest.raises(
            PeerLostError, match=r"cannot arrive from rank 2 .* it has ended and closed its connections"
        ):
            work.wait(10)
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
        assert "closed with 1 messages unsent to rank 1 (stage 1, host n)" in caplog.text


def test_fail_ends_every_wait_with_that_error():
    with line(2) as (first, _):
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
def test_an_exception_in_a_callback_fails_the_endpoint_loudly(callback, caplog):
    first, fake = connected()

    def broken(*_):
        raise ZeroDivisionError("in a callback")

    setattr(first, callback, broken)
    if callback == "on_control":
        fake.tell("control", messages=[[1, {"a": 1}]])
    else:
        fake.record(Op.LOST)
        fake.tell("lost", rank=1, error="PeerLostError", reason="a test says so", remedy="")
    until(lambda: first._fate.error, "failure")
    for call in (first.channel(1).recv(gradient(0)).wait, lambda: first.channel(1).send(activation(0), [])):
        with pytest.raises(TransportError, match="control thread of rank 0 failed: ZeroDivisionError: in a callback"):
            call()
    assert "Traceback" in caplog.text
    first.close()
    fake.close()


# --- the proxy


def test_a_proxy_process_that_dies_ends_every_wait_with_its_exit_code():
    with line(2, proxy="process") as (first, second):
        lost = []
        second.on_peer_lost = lambda peer, reason: lost.append((peer.rank, reason))
        work = first.channel(1).recv(gradient(0))
        threading.Timer(0.2, os.kill, (first._proxy.pid, signal.SIGKILL)).start()
        with pytest.raises(TransportError, match=r"the proxy process of rank 0 was killed by SIGKILL \(exit code -9\)"):
            work.wait()
        for call in (
            lambda: first.channel(1).send(activation(0), []),
            first.channel(1).recv(gradient(1)).wait,
            lambda: first.send_control(1, {}),
        ):
            with pytest.raises(TransportError, match="exit code -9"):
                call()
        assert first.stats()["peers"][1]["directions"]
        with pytest.raises(PeerLostError):
            second.channel(0).recv(activation(0)).wait()
        assert [rank for rank, _ in lost] == [0]


def test_a_proxy_that_cannot_start_says_why():
    with pytest.raises(TransportError, match=r"cannot listen on '192\.0\.2\.1'.*adaptra\.transport\.bind"):
        endpoint(0, config(bind="192.0.2.1", proxy="process"))
    with pytest.raises(TransportError, match=r"cannot listen on '192\.0\.2\.1'"):
        endpoint(0, config(bind="192.0.2.1"))


def test_a_proxy_that_dies_while_it_starts_is_reported(monkeypatch):
    monkeypatch.setattr(spawn, "_PROXY", "adaptra_plugin.no_such_module")
    with pytest.raises(TransportError, match=r"the proxy process of rank 0 has ended with exit code 1"):
        endpoint(0, config(proxy="process"))


def test_a_proxy_process_that_does_not_end_is_killed(monkeypatch, caplog):
    monkeypatch.setattr(endpoint_module, "_MARGIN_S", 0.2)
    with line(1, proxy="process") as (only,):
        os.kill(only._proxy.pid, signal.SIGSTOP)
        only.close(linger_s=0.1)
        assert "the proxy of rank 0 does not end and is killed" in caplog.text
        with pytest.raises(TransportError):
            only.send_control(0, {})


def test_the_proxy_process_is_gone_when_its_endpoint_was_killed():
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            mine = endpoint(0, config(proxy="process"))
            os.write(write_end, str(mine._proxy.pid).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    pid = int(os.read(read_end, 100))
    os.close(read_end)
    os.close(write_end)
    proxy = psutil.Process(pid)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    proxy.wait(10)


# --- records in any order


def test_nonsense_in_the_ring_of_an_authenticated_peer_ends_the_link(caplog):
    right = MessageHeader(gradient(0), 0, 1, 64, 64).pack()
    for raw, total, expected in (
        (b"x" * 64, 64, "starts with 78787878 instead"),
        (right, 256, "a message of 256 bytes announces 64 + 64 + 64 bytes"),
        (right, 1 << 40, "at most 1048576 are accepted"),
        (right, 0, "a message has 0 bytes"),
        (
            MessageHeader(activation(0), 0, 1, 64, 64).pack(),
            192,
            "a message of direction 0 came among those of direction 1",
        ),
        (MessageHeader(gradient(0), 0, 0, 63, 65).pack(), 192, "announces 64 + 63 + 65 bytes"),
        (MessageHeader(gradient(0), 0, 5000, 64, 64).pack(), 192, "5000 tensors; at most 4096"),
        (right + b"\xff" * 128, 192, "unknown dtype code 255"),
    ):
        first, fake = connected()
        lost = []
        first.on_peer_lost = lambda peer, reason, lost=lost: lost.append((peer.rank, reason))
        work = first.channel(1).recv(gradient(0))
        fake.receive_ring(Direction.GRADIENT).write(0, raw)
        fake.record(Op.ARRIVED, Direction.GRADIENT, 0, total)
        with pytest.raises(TransportError) as caught:
            work.wait(10)
        assert not isinstance(caught.value, PeerLostError | TransferTimeout)
        text = str(caught.value)
        assert "rank 1 (stage 1, host n1): it sent a malformed message on connection gradient 0" in text
        assert expected in text
        until(lambda lost=lost: lost, "on_peer_lost")
        assert len(lost) == 1 and expected in lost[0][1]
        first.close()
        fake.close()
    assert caplog.text.count("lost: rank 1") == 8


def test_a_reference_to_a_ring_that_is_not_mapped_ends_the_link():
    first, fake = connected()
    work = first.channel(1).recv(gradient(0))
    fake.deliver(gradient(0), torch.ones(3), 0, flags=1)
    with pytest.raises(TransportError, match="came by reference, and the peer's ring is not mapped"):
        work.wait(10)
    first.close()
    fake.close()


def test_what_had_arrived_stays_readable_though_nobody_had_looked():
    """The news of the loss travels on another socket than the records in front of it."""
    first, fake = connected()
    channel = first.channel(1)
    waiting = channel.recv(gradient(9))
    fake.tell("lost", rank=1, error="PeerLostError", reason="a test says so", remedy="")
    time.sleep(0.1)
    position = fake.deliver(gradient(0), torch.ones(3), 0)
    fake.deliver(gradient(1), torch.ones(4), position)
    fake.record(Op.LOST)
    with pytest.raises(PeerLostError, match="a test says so"):
        waiting.wait(5)
    assert channel.recv(gradient(0)).wait().tensors[0].tolist() == [1.0] * 3
    assert channel.recv(gradient(1)).wait().tensors[0].tolist() == [1.0] * 4
    with pytest.raises(PeerLostError):
        channel.recv(gradient(2)).wait()
    first.close()
    fake.close()
