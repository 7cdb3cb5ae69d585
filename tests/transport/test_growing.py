"""`ring_mib: "auto"`: rings grow with the messages, up to a cap, and take no memory that no message has needed."""

from __future__ import annotations

import logging
import os
import random
import resource
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptra_plugin.config import Fault, TransportConfig
from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport import memfd, ring
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.ring import MESSAGES, RingAllocator, RingEntry
from adaptra_plugin.transport.works import SendWork

from .fake_device import FakeDevice, channels, pair
from .support import activation, config, connect_line, endpoint, everywhere, gradient, line, until

pytestmark = pytest.mark.usefixtures("either_way")

KIB, MIB = 1 << 10, 1 << 20


def lane(end, rank, direction=0, index=0):
    return end._links[rank].sending[direction][index]


def touched(end, rank):
    """Bytes of memory that the rings towards a peer have taken."""
    return [os.fstat(each.memory.memfd.fd).st_blocks * 512 for each in end._links[rank].lanes()]


@pytest.mark.parametrize("rail", ["shm", "tcp"])
def test_80_mib_travel_with_the_default_configuration(rail):
    """Both ways at the same time, each over a proxy process."""
    settings = TransportConfig(rail=rail, bind="127.0.0.1")
    ends = [endpoint(rank, settings) for rank in range(2)]
    try:
        assert connect_line(ends) == [None, None]
        there, back = torch.arange(20 * MIB, dtype=torch.int32), torch.arange(20 * MIB, dtype=torch.int32).neg()
        for step_id in range(2):
            works = [ends[1].channel(0).recv(activation(0, step_id)), ends[0].channel(1).recv(gradient(0, step_id))]
            ends[0].channel(1).send(activation(0, step_id), [there])
            ends[1].channel(0).send(gradient(0, step_id), [back])
            for work, expected in zip(works, (there, back), strict=True):
                assert torch.equal(work.wait().tensors[0], expected)
        allocator = lane(ends[0], 1).allocator
        assert MESSAGES * 80 * MIB <= allocator.window <= MESSAGES * 80 * MIB + 4 * MIB
    finally:
        everywhere(*(end.close for end in ends))


@pytest.mark.parametrize("rail", ["shm", "tcp"])
def test_a_ring_takes_what_its_messages_have_needed(rail):
    """Longer and longer, and short ones again: always the same memory, as long as the ring is emptied."""
    with line(2, ring_mib="auto", rail=rail) as (first, second):
        assert lane(first, 1).capacity == 1024 * MIB and max(touched(first, 1)) == 0
        for number, mib in enumerate([1, 2, 5, 30, 60, 100, 1, 3]):
            data = torch.full((mib * MIB,), number, dtype=torch.uint8)
            key = activation(0, step_id=number)
            work = first.channel(1).send(key, [data])
            assert torch.equal(second.channel(0).recv(key).wait().tensors[0], data)
            work.wait()
            until(lambda: not first._pump.drain() and not len(lane(first, 1).allocator), "an empty ring")
        assert lane(first, 1).allocator.window >= MESSAGES * 100 * MIB
        assert max(touched(first, 1)) <= 105 * MIB and max(touched(second, 0)) <= 105 * MIB


def test_a_message_beyond_the_cap_is_refused_with_numbers_and_remedy():
    with line(2, ring_mib="auto", ring_max_mib=4) as (first, second):
        with pytest.raises(TransportError) as caught:
            first.channel(1).send(activation(0), [torch.zeros(5 << 18)])
        text = str(caught.value)
        assert "5.0 MiB" in text and "more than the 4194304 bytes" in text
        assert "adaptra.transport.ring_max_mib to 6 or more on every rank (now 4" in text
        exactly = torch.arange(4 * MIB - 128, dtype=torch.int32).to(torch.uint8)
        for step_id in range(3):
            first.channel(1).send(activation(0, step_id), [exactly])
            assert torch.equal(second.channel(0).recv(activation(0, step_id)).wait().tensors[0], exactly)


def test_of_two_ends_the_smaller_one_counts():
    ends = [endpoint(0, config(ring_mib="auto")), endpoint(1, config(ring_mib=2))]
    try:
        assert connect_line(ends) == [None, None]
        with pytest.raises(TransportError, match="more than the 2097152 bytes"):
            ends[0].channel(1).send(activation(0), [torch.zeros(3 * MIB, dtype=torch.uint8)])
        with pytest.raises(TransportError, match="ring_mib to 4 or more"):
            ends[1].channel(0).send(gradient(0), [torch.zeros(3 * MIB, dtype=torch.uint8)])
        for sender, receiver, key in ((0, 1, activation(1)), (1, 0, gradient(1))):
            ends[sender].channel(receiver).send(key, [torch.ones(MIB)[: MIB // 4]])
            assert ends[receiver].channel(sender).recv(key).wait().tensors[0].numel() == MIB // 4
    finally:
        everywhere(*(end.close for end in ends))


def test_growth_is_said(caplog):
    caplog.set_level(logging.INFO, "adaptra.transport")
    with line(2, ring_mib="auto") as (first, second):
        for step_id in range(2):
            first.channel(1).send(activation(0, step_id), [torch.zeros(20 * MIB, dtype=torch.uint8)])
            second.channel(0).recv(activation(0, step_id)).wait()
    (said,) = [record.message for record in caplog.records if "grows" in record.message]
    assert "activation 0 to rank 1" in said and "grows to 81 MiB, for messages of 20.0 MiB (at most 1024 MiB" in said


def test_a_full_ring_that_grows_blocks_as_any_other(monkeypatch):
    monkeypatch.setattr(ring, "WINDOW_BYTES", MIB)
    message = torch.arange(250_000 // 8)
    with line(2, ring_mib="auto", connections_per_direction=1) as (first, second):
        sent = []

        def produce():
            for number in range(40):
                first.channel(1).send(activation(number), [message + number])
                sent.append(number)

        thread = threading.Thread(target=produce)
        thread.start()
        until(lambda: first.stats()["peers"][1]["directions"]["activation"]["sent"]["full"], "full ring")
        assert len(sent) == 4
        for number in range(40):
            assert torch.equal(second.channel(0).recv(activation(number)).wait().tensors[0], message + number)
        thread.join(20)
        assert not thread.is_alive()
        assert max(touched(first, 1)) <= MIB


def test_neighbours_whose_growing_rings_are_full_do_not_wait_for_ever(monkeypatch):
    """See `Channel.send`: an activation that is blocked drains early gradients."""
    monkeypatch.setattr(ring, "WINDOW_BYTES", MIB)
    message = torch.arange(250_000 // 8)
    count = 12
    with line(2, ring_mib="auto", connections_per_direction=1) as (first, second):
        mine = [first.channel(1).recv(gradient(n)) for n in range(count)]
        theirs = [second.channel(0).recv(activation(n)) for n in range(count)]

        def run(end, rank, key, works, sign):
            for n in range(count):
                end.channel(rank).send(key(n), [message + sign * n])
            for n, work in enumerate(works):
                assert torch.equal(work.wait().tensors[0], message - sign * n)

        errors = everywhere(lambda: run(first, 1, activation, mine, 1), lambda: run(second, 0, gradient, theirs, -1))
        assert errors == [None, None]
        assert first.stats()["peers"][1]["directions"]["gradient"]["received"]["drained_early"]


@pytest.mark.parametrize("rail", ["auto", "tcp"])
@pytest.mark.parametrize("seed", range(2))
def test_a_storm_of_changing_sizes(rail, seed, monkeypatch):
    monkeypatch.setattr(ring, "WINDOW_BYTES", 256 * KIB)
    link = {"src": 0, "dst": 1, "from_iteration": 1}
    faults = [
        Fault(kind="corruption", rate=0.05, **link),
        Fault(kind="jitter", ms=5.0, rail="tcp1", **link),
        Fault(kind="death", rate=0.003, **link),
    ]
    rng = random.Random(seed)
    sizes = [rng.choice([1, 10 * KIB, 150 * KIB, MIB, 3 * MIB]) + rng.randrange(5000) for _ in range(60)]
    options = {"segment_kib": 64, "reconnect_s": 20.0, "deadline_s": 50.0, "ring_mib": "auto", "ring_max_mib": 8}
    with line(2, faults=faults, rail=rail, **options) as (first, second):
        for end in (first, second):
            end.set_iteration(1)

        def data(number):
            generator = torch.Generator().manual_seed(number)
            return torch.randint(0, 255, (sizes[number % 60],), generator=generator, dtype=torch.uint8)

        def send(end, rank, key, base):
            for work in [end.channel(rank).send(key(n), [data(base + n)], tag=n) for n in range(60)]:
                work.wait()

        def receive(end, rank, key, base):
            for n, work in enumerate([end.channel(rank).recv(key(n)) for n in range(60)]):
                message = work.wait()
                assert message.tag == n and torch.equal(message.tensors[0], data(base + n))

        errors = everywhere(
            lambda: send(first, 1, activation, 0),
            lambda: send(second, 0, gradient, 60),
            lambda: receive(second, 0, activation, 0),
            lambda: receive(first, 1, gradient, 60),
        )
        assert errors == [None] * 4
        for end in (first, second):
            end.set_iteration(0)
        assert max(max(touched(first, 1)), max(touched(second, 0))) <= 8 * MIB


@pytest.mark.parametrize("pins", [True, False])
def test_rings_that_grow_are_pinned_as_they_come_to_be_used(pins, monkeypatch):
    monkeypatch.setattr(memfd, "EXTENT_BYTES", 64 * KIB)
    device = FakeDevice(pins=pins)
    device.upload_s = 0.0
    with pair(device, ring_mib="auto", connections_per_direction=1) as ends:
        first, second = channels(ends)
        for step_id, kib in enumerate([10, 700, 90, 1500]):
            sent = device.put(torch.arange(kib * KIB // 4, dtype=torch.int32) + step_id)
            first.send(activation(0, step_id), [sent])
            assert torch.equal(second.recv(activation(0, step_id)).wait().tensors[0], sent)
        pinned = len(device.pinned_rings)
        assert pinned == 0 if not pins else 1500 / 64 <= pinned <= 1024 * MIB / (64 * KIB) / 100
    device.end()


def test_a_limit_of_file_sizes_limits_the_growth_and_nothing_else():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * MIB + 5, hard))
    try:
        with line(2, ring_mib="auto") as (first, second):
            assert lane(first, 1).capacity == 20 * MIB
            first.channel(1).send(activation(0), [torch.ones(4 * MIB)])
            assert second.channel(0).recv(activation(0)).wait().tensors[0].sum() == 4 * MIB
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_extents_are_cut_where_they_end():
    memory = Memfd.create(4096, 1000)
    assert list(memory.extents(900, 1300)) == [(0, 900, 1000), (1, 0, 1000), (2, 0, 200)]
    assert list(memory.extents(4096 * 3 + 4000, 200)) == [(4, 0, 96), (0, 0, 104)]
    assert list(memory.extents(5, 0)) == []
    assert [len(memory.extent_view(number)) for number in range(5)] == [1000, 1000, 1000, 1000, 96]
    whole = Memfd.create(4096)
    assert list(whole.extents(4000, 200)) == [(0, 4000, 4096), (0, 0, 104)]
    memory.close()
    whole.close()


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 90), st.integers(0, 9)), max_size=200),
    st.sampled_from([64 * 100, 64 * 256]),
)
def test_messages_of_a_growing_ring_never_overlap_and_stay_in_its_window(steps, capacity):
    allocator = RingAllocator(capacity, grows=True)
    allocator.window = 64 * 16
    held: dict[int, int] = {}
    newest = 0
    for send, units, which in steps:
        total = 64 * units
        if send:
            # what `expect` does, without its rounding up to whole MiB
            allocator.window = max(allocator.window, min(capacity, MESSAGES * total))
            if not held:
                assert allocator.fits(total), "an empty ring has room for whatever may be sent"
            if not allocator.fits(total):
                continue
            position = allocator.place(total)
            start = position % capacity
            assert position >= newest and start + total <= allocator.window
            assert position + total <= min(held, default=position) + capacity, "the other end would refuse it"
            for other, size in held.items():
                at = other % capacity
                assert start + total <= at or at + size <= start
            allocator.add(RingEntry(position, total, SendWork(activation(0), None)))
            held[position], newest = total, position + total
        elif held:
            position = sorted(held)[which % len(held)]
            allocator.consume(position)
            del held[position]


def test_a_limit_of_addresses_limits_how_far_rings_grow(monkeypatch):
    limits = {resource.RLIMIT_FSIZE: resource.RLIM_INFINITY, resource.RLIMIT_AS: 8 << 30}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], resource.RLIM_INFINITY))
    assert memfd.growth_limit(1 << 30) == 128 << 20
    limits[resource.RLIMIT_AS] = resource.RLIM_INFINITY
    assert memfd.growth_limit(1 << 30) == 1 << 30
