"""A full ring blocks the producer, says so once, and memory stays bounded."""

import logging
import threading

import psutil
import pytest
import torch

from adaptra_plugin.errors import TransferTimeout, TransportError
from adaptra_plugin.transport import Direction, Key
from adaptra_plugin.transport.ring import Ring

from .support import STUCK, activation, line, until

MESSAGE = torch.arange(300_000 // 8)  # 300 KB: three fill a ring of 1 MiB


def test_full_ring_blocks_warns_once_and_recovers(caplog):
    """Nobody receives, so rings and socket buffers fill up; then everything is received, in order."""
    caplog.set_level(logging.WARNING, "adaptra.transport")
    count = 64  # 19 MB: more than both rings and both socket buffers hold
    with line(2, connections_per_direction=1, warn_full_after_ms=20.0) as (first, second):
        sent = []

        def produce():
            for number in range(count):
                first.channel(1).send(activation(number), [MESSAGE + number])
                sent.append(number)

        thread = threading.Thread(target=produce)
        thread.start()
        until(lambda: any("blocked" in r.message for r in caplog.records), "warning")
        assert len(sent) < count
        warning = next(r.message for r in caplog.records if "blocked" in r.message)
        assert "rank 1 (stage 1, host n)" in warning and "adaptra.transport.ring_mib" in warning
        for number in range(count):
            message = second.channel(0).recv(activation(number)).wait()
            assert torch.equal(message.tensors[0], MESSAGE + number)
        thread.join(20)
        assert not thread.is_alive()
        sending = first.stats()["peers"][1]["directions"]["activation"]["sent"]
        assert sending["messages"] == count
        assert sending["full"] >= 1 and sending["blocked_ms"] >= 20
        blocked = [r for r in caplog.records if "blocked" in r.message]
        assert len(blocked) <= sending["full"]


def test_one_full_lane_does_not_hold_up_the_others():
    with line(2, connections_per_direction=2) as (first, second):
        blocked = threading.Thread(
            target=lambda: [first.channel(1).send(activation(2 * n), [MESSAGE]) for n in range(64)], daemon=True
        )
        blocked.start()
        until(lambda: first.stats()["peers"][1]["directions"]["activation"]["sent"]["full"], "full ring")
        first.channel(1).send(activation(1), [MESSAGE])
        assert torch.equal(second.channel(0).recv(activation(1)).wait().tensors[0], MESSAGE)
        second.channel(0).send(Key(0, Direction.GRADIENT, 0, 0), [MESSAGE])
        assert torch.equal(first.channel(1).recv(Key(0, Direction.GRADIENT, 0, 0)).wait().tensors[0], MESSAGE)
        for n in range(64):
            second.channel(0).recv(activation(2 * n)).wait()
        blocked.join(20)


def test_full_ring_has_a_deadline():
    with line(2, links=[STUCK], deadline_s=0.3) as (first, _):
        with pytest.raises(TransferTimeout) as caught:
            for number in range(0, 100, 2):
                first.channel(1).send(activation(number), [MESSAGE])
        text = str(caught.value)
        assert "activation of microbatch 6 to stage 1 (epoch 0) could not be staged for rank 1" in text
        assert "within 0.3 s" in text
        assert "3 messages wait in the staging ring, 900480 of 1048576 bytes" in text
        first.close(linger_s=0.0)


def test_message_longer_than_the_ring_is_refused_with_numbers_and_remedy():
    with line(2) as (first, second):
        with pytest.raises(TransportError) as caught:
            first.channel(1).send(activation(0), [torch.zeros(5 << 18)])
        text = str(caught.value)
        assert "5.0 MiB" in text and "more than the 1048576 bytes" in text
        assert "adaptra.transport.ring_mib to 6 or more" in text
        exactly = torch.zeros((1 << 20) - 128, dtype=torch.uint8)  # header and description take 128 bytes
        first.channel(1).send(activation(0), [exactly])
        assert second.channel(0).recv(activation(0)).wait().tensors[0].numel() == exactly.numel()
        with pytest.raises(TransportError, match="more than the 1048576 bytes"):
            first.channel(1).send(activation(0), [torch.zeros((1 << 20) - 127, dtype=torch.uint8)])


def test_many_messages_do_not_grow_memory():
    with line(2) as (first, second):

        def move(count):
            for number in range(count):
                first.channel(1).send(activation(number), [MESSAGE])
                second.channel(0).recv(activation(number)).wait()

        move(50)
        before = psutil.Process().memory_info().rss
        move(400)  # 120 MB
        assert psutil.Process().memory_info().rss - before < 20 << 20


def test_ring_wraps_and_starts_again_when_empty():
    ring = Ring(256)
    data = torch.arange(200, dtype=torch.uint8)
    offset = ring.place()
    ring.copy_in(offset, data)
    ring.commit(200)
    ring.release(150)
    assert (ring.used, ring.free, ring.place()) == (50, 206, 200)
    ring.copy_in(200, data)  # 56 bytes at the end, the rest at the start
    ring.commit(200)
    out = torch.zeros(200, dtype=torch.uint8)
    ring.copy_out(200, out)
    assert torch.equal(out, data)
    assert ring.read(200, 200) == bytes(range(200))
    assert [len(part) for part in ring.slices(200, 200)] == [56, 144]
    ring.write(250, b"0123456789")
    assert ring.read(250, 10) == b"0123456789"
    ring.release(250)
    assert ring.used == 0
    assert ring.place() == 0
    assert len(ring.window()) == 256


def test_ring_is_mapped_only_when_used():
    before = psutil.Process().memory_info().vms
    rings = [Ring(1 << 30) for _ in range(8)]
    assert psutil.Process().memory_info().vms - before < 1 << 28
    rings[0].write(0, b"x")
    resident = psutil.Process().memory_info().rss
    assert rings[0].read(0, 1) == b"x"
    assert psutil.Process().memory_info().rss - resident < 1 << 24
