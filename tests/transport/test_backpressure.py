"""A full ring blocks the producer, says so once, and memory stays bounded."""

import logging
import threading
import time

import psutil
import pytest
import torch

from adaptra_plugin.errors import TransferTimeout, TransportError
from adaptra_plugin.transport import Direction, Key
from adaptra_plugin.transport.bridge import Op
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.memory import Memory
from adaptra_plugin.transport.ring import RingAllocator, RingEntry
from adaptra_plugin.transport.works import SendWork

from .support import activation, line, until

pytestmark = pytest.mark.usefixtures("either_way")

MESSAGE = torch.arange(300_000 // 8)  # 300 KB: three fill a ring of 1 MiB


def test_full_ring_blocks_warns_once_and_recovers(caplog):
    """Nobody receives, so the rings fill up; then everything is received, in order."""
    caplog.set_level(logging.WARNING, "adaptra.transport")
    count = 64  # 19 MB: more than the rings hold
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
    with line(2, deadline_s=0.3) as (first, _):
        with pytest.raises(TransferTimeout) as caught:
            for number in range(0, 100, 2):
                first.channel(1).send(activation(number), [MESSAGE])
        text = str(caught.value)
        assert "activation of microbatch 6 to stage 1 (step 0) could not be staged for rank 1" in text
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


def outgoing(position, total):
    return RingEntry(position, total, SendWork(activation(0), None))


def room(allocator):
    """The longest message that fits now."""
    return max((total for total in range(0, allocator.capacity + 1, 64) if total and allocator.fits(total)), default=0)


def test_room_becomes_free_from_the_oldest_message_on():
    allocator = RingAllocator(1024)
    for position, total in ((0, 256), (256, 128), (384, 512)):
        assert allocator.place(total) == position
        allocator.add(outgoing(position, total))
    assert (allocator.used, room(allocator), len(allocator)) == (896, 128, 3)
    assert allocator.consume(256) is not None
    assert allocator.consume(256) is None  # heard twice
    assert allocator.consume(999) is None  # never sent
    assert (allocator.used, len(allocator)) == (896, 2)
    allocator.consume(0)
    assert (allocator.used, room(allocator)) == (512, 512)
    allocator.add(outgoing(allocator.place(448), 448))  # over the end
    assert (allocator.used, room(allocator)) == (960, 64)
    allocator.consume(896)
    assert room(allocator) == 64
    allocator.consume(384)
    assert (allocator.used, room(allocator), len(allocator)) == (0, 1024, 0)


def test_an_empty_ring_is_filled_from_its_start_again_and_positions_only_grow():
    allocator = RingAllocator(1024)
    allocator.add(outgoing(allocator.place(320), 320))
    allocator.consume(0)
    assert allocator.place(1024) == 1024
    allocator.add(outgoing(1024, 1024))
    assert room(allocator) == 0
    allocator.consume(1024)
    assert allocator.place(64) == 2048


def test_messages_wrap_around_the_end_of_the_memory():
    memory = Memory(Memfd.create(4096))
    data = torch.arange(200, dtype=torch.uint8)
    memory.copy_in(3 * 4096 - 50, data)  # 50 bytes at the end, the rest at the start
    out = torch.zeros(200, dtype=torch.uint8)
    memory.copy_out(4096 - 50, out)
    assert torch.equal(out, data)
    assert memory.memfd.read(4046, 200) == bytes(range(200))
    memory.close()
    with pytest.raises(TransportError, match="the endpoint is closed"):
        memory.copy_out(0, out)


def test_rings_are_mapped_only_when_used():
    before = psutil.Process().memory_info().vms
    rings = [Memory(Memfd.create(1 << 30)) for _ in range(8)]
    assert psutil.Process().memory_info().vms - before < 1 << 28
    resident = psutil.Process().memory_info().rss
    rings[0].memfd.write(5 << 30, b"x")
    assert rings[0].memfd.read(0, 1) == b"x" and rings[0].tensor[0] == ord("x")
    assert psutil.Process().memory_info().rss - resident < 1 << 24
    for ring in rings:
        ring.close()


# --- producers that find no room


def test_a_producer_that_becomes_the_first_in_line_tells_the_peer_as_well(fake_pair):
    first, fake = fake_pair(warn_full_after_ms=15_000)
    channel = first.channel(1)
    channel.send(activation(0), [torch.zeros(150_000)])
    fake.expect(Op.SEND)
    threads = [
        threading.Thread(target=channel.send, args=(activation(n), [torch.zeros(150_000)]), name=str(n)) for n in (1, 2)
    ]
    for thread in threads:
        thread.start()
        until(lambda: any(len(lane._line) for lane in first._links[1].send_lanes()))
    assert fake.expect(Op.STUCK)[6] == 1
    time.sleep(0.05)  # both wait
    fake.record(Op.CONSUMED, position=0)
    assert [fake.next()[0] for _ in range(2)] == [Op.STUCK, Op.SEND]
    assert fake.expect(Op.STUCK)[6] == 1
    for lane in first._links[1].send_lanes():
        for waiting in lane.allocator.waiting():
            fake.record(Op.CONSUMED, position=waiting.position)
    assert [fake.next()[0] for _ in range(2)] == [Op.STUCK, Op.SEND]
    for thread in threads:
        thread.join(10)


def test_producers_of_a_full_lane_stand_in_line(fake_pair):
    """A large message is not overtaken for ever by small ones that would fit."""
    first, fake = fake_pair()
    channel = first.channel(1)
    channel.send(activation(0), [torch.zeros(150_000)])
    fake.expect(Op.SEND)
    sent = []

    def send(number, elements):
        channel.send(activation(number), [torch.zeros(elements)])
        sent.append(number)

    large = threading.Thread(target=send, args=(1, 150_000))
    large.start()
    fake.expect(Op.STUCK)
    small = threading.Thread(target=send, args=(2, 10))
    small.start()
    time.sleep(0.1)
    assert sent == []
    fake.record(Op.CONSUMED, position=0)
    assert fake.expect(Op.STUCK)[6] == 0
    sizes = [fake.expect(Op.SEND)[6] for _ in range(2)]
    assert sizes == [600_128, 192]
    large.join(10)
    small.join(10)


def test_a_timeout_gives_the_place_in_line_to_the_next(fake_pair):
    first, fake = fake_pair(deadline_s=0.3)
    channel = first.channel(1)
    channel.send(activation(0), [torch.zeros(150_000)])
    with pytest.raises(TransferTimeout):
        channel.send(activation(1), [torch.zeros(150_000)])
    channel.send(activation(2), [torch.zeros(10)])
    assert [r[0] for r in (fake.next() for _ in range(4))] == [Op.SEND, Op.STUCK, Op.STUCK, Op.SEND]
