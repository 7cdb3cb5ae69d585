"""Long messages from a device travel in parts: one is on the wire, or on its way to the other device, while the next is copied."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptra_plugin.errors import PeerLostError, TransportError
from adaptra_plugin.transport import Direction
from adaptra_plugin.transport.bridge import Op
from adaptra_plugin.transport.frames import HEADER_BYTES, MalformedMessage, MessageHeader, parse_header, split
from adaptra_plugin.transport.shared import Loss
from adaptra_plugin.transport.tensors import describe
from tests.transport.fake_device import THERE, FakeDevice, channels, pair
from tests.transport.support import activation, gradient, heard, until

PART = 4 * 64 << 10
KEY = gradient(0)


@pytest.fixture(params=[True, False], ids=["pinned", "detour"])
def device(request) -> Iterator[FakeDevice]:
    made = FakeDevice(pins=request.param)
    made.upload_s = 0.0
    yield made
    made.end()


def long_tensor(parts: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (parts * PART - 12_345,), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


class Gate:
    """Holds copies from the device, from the one that begins part `part` on, until it is opened."""

    def __init__(self, device: FakeDevice, part: int) -> None:
        self._first = part + 1 if device.pins else 4 * part + 1
        self._open = threading.Event()
        device.before_copy = lambda number: number < self._first or self._open.wait(20)

    def open(self) -> None:
        self._open.set()


@pytest.mark.parametrize("rail", ["tcp", "shm"])
def test_a_part_is_at_the_other_end_while_the_next_is_copied(device, rail):
    with pair(device, rail=rail) as ends:
        out, into = channels(ends)
        gate = Gate(device, 1)
        tensor = long_tensor()
        received = into.recv(activation(0), device=THERE)
        sent = out.send(activation(0), [device.put(tensor)], tag=5)
        until(heard(ends[1], lambda: device.uploads == 1), "the first part on the other device")
        assert not received.ready() and not sent.ready()
        gate.open()
        message = received.wait()
        device.compute.mark().synchronize()
        assert torch.equal(message.tensors[0], tensor) and message.tag == 5
        sent.wait()
        until(
            heard(ends[0], lambda: all(not len(lane.allocator) for lane in ends[0]._links[1].send_lanes())),
            "room given back",
        )
        assert ends[1].stats()["peers"][0]["directions"]["activation"]["received"]["messages"] == 1


def test_parts_of_messages_of_one_key_stay_together_and_in_order(device):
    with pair(device) as ends:
        out, into = channels(ends)
        for early in (False, True):
            tensors = [long_tensor(1, seed) if seed % 2 else long_tensor(2, seed) for seed in (1, 2, 3)]
            works = [] if early else [into.recv(activation(0)) for _ in tensors]
            for tensor in tensors[:2]:
                out.send(activation(0), [device.put(tensor), torch.ones(3)])
            last = out.send(activation(0), [tensors[2]])
            if early:
                [lane] = [lane for lane in ends[1]._links[0].recv_lanes() if lane.direction == 0 and lane.index == 0]
                until(heard(ends[1], lambda lane=lane: len(lane._held) == 4), "1 + 2 + 1 parts")
                works = [into.recv(activation(0)) for _ in tensors]
            for work, tensor in zip(works, tensors, strict=True):
                assert torch.equal(work.wait().tensors[0], tensor)
            last.wait()


def test_a_sender_that_ends_between_two_parts_is_lost(device):
    with pair(device) as ends:
        out, into = channels(ends)
        gate = Gate(device, 1)
        received = into.recv(activation(0), device=THERE)
        out.send(activation(0), [device.put(long_tensor())])
        until(heard(ends[1], lambda: device.uploads == 1))
        closing = threading.Thread(target=ends[0].close, kwargs={"linger_s": 0.1})
        closing.start()
        with pytest.raises(PeerLostError, match="rank 0"):
            received.wait()
        gate.open()
        closing.join(20)
        with pytest.raises(PeerLostError, match="rank 0"):
            into.recv(activation(0)).wait()


def test_a_copy_that_fails_half_way_delivers_nothing(device):
    with pair(device) as ends:
        out, into = channels(ends)
        gate = Gate(device, 1)
        tensor = device.put(long_tensor())
        received = into.recv(activation(0), device=THERE)
        sent = out.send(activation(0), [tensor])
        until(heard(ends[1], lambda: device.uploads == 1), "the first part on the other device")
        tensor.add_(1)
        gate.open()
        with pytest.raises(TransportError, match="changed in place before it was copied"):
            sent.wait()
        ends[0].close(linger_s=0.1)
        with pytest.raises(TransportError):
            received.wait(5)


def test_an_upload_that_fails_between_two_parts_may_be_tried_again(device):
    with pair(device) as ends:
        out, into = channels(ends)
        gate = Gate(device, 1)
        tensor = long_tensor()
        received = into.recv(activation(0), device=THERE)
        out.send(activation(0), [device.put(tensor)])
        until(heard(ends[1], lambda: device.uploads == 1))
        device.uploads_fail = 3  # at most: the fetcher's two, and one of the caller
        gate.open()
        until(received.ready)
        until(lambda: not received._copying.locked())
        for _ in range(3):
            try:
                message = received.wait()
                break
            except RuntimeError as error:
                assert "out of memory" in str(error)
        else:
            message = received.wait()
        assert device.uploads_fail < 3
        device.compute.mark().synchronize()
        assert torch.equal(message.tensors[0], tensor)


def test_parts_are_absorbed_while_the_receiver_is_blocked_itself(device):
    """Both ends send more than the rings hold before either takes anything."""
    with pair(device, connections_per_direction=1) as ends:
        out, into = channels(ends)
        tensors = [long_tensor(2, seed) for seed in range(6)]
        back = [out.recv(gradient(number), device=THERE) for number in range(6)]

        def send(channel, key):
            for number, tensor in enumerate(tensors):
                channel.send(key(number), [device.put(tensor.clone())])

        activations = threading.Thread(target=send, args=(out, activation))
        activations.start()
        [lane] = ends[0]._links[1].sending[Direction.ACTIVATION]
        until(lambda: lane.counters.full, "a blocked activation")
        gradients = threading.Thread(target=send, args=(into, gradient))
        gradients.start()
        gradients.join(15)
        assert not gradients.is_alive() and activations.is_alive()
        assert ends[0].stats()["peers"][1]["directions"]["gradient"]["received"]["drained_early"] > 3
        for number, tensor in enumerate(tensors):
            assert torch.equal(into.recv(activation(number)).wait().tensors[0], tensor)
        activations.join(15)
        assert not activations.is_alive()
        for number, tensor in enumerate(tensors):
            message = back[number].wait()
            device.compute.mark().synchronize()
            assert torch.equal(message.tensors[0], tensor)


def test_room_is_given_back_although_its_giving_back_was_interrupted(fake_pair):
    first, fake = fake_pair()
    lane = first._links[1].receiving[Direction.GRADIENT][0]
    work = first.channel(1).recv(KEY)
    fake.deliver(KEY, torch.arange(192, dtype=torch.uint8), 0, step=64)
    until(work.ready)
    release, interrupted = lane.release, []

    def interrupting(arrived):
        if len(interrupted) < 3:  # of 3 parts
            interrupted.append(arrived.position)
            raise KeyboardInterrupt
        release(arrived)

    lane.release = interrupting
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            work.wait()
    assert torch.equal(work.wait().tensors[0], torch.arange(192, dtype=torch.uint8))
    assert [fake.expect(Op.RELEASE)[5] for _ in range(3)] == [0, 192, 320]
    assert not lane._held and not lane.can_drain_early()


def test_who_waits_for_a_copy_to_end_is_woken_when_another_may_copy(fake_pair):
    first, fake = fake_pair()
    lane = first._links[1].receiving[Direction.GRADIENT][0]
    work = first.channel(1).recv(KEY)
    fake.record(Op.PEER_STUCK, Direction.GRADIENT, total=1)
    fake.deliver(KEY, torch.zeros(192, dtype=torch.uint8), 0, step=64)
    until(work.ready)
    idle = []
    wake = lane.pump.wake
    lane.pump.wake = lambda: (idle.append(work.idle), wake())
    assert lane.drain_early() and idle[-1:] == [True]
    work.wait()
    assert idle[-1:] == [True]


def test_parts_whose_beginning_went_to_a_ticket_that_failed_are_nobodys(fake_pair):
    first, fake = fake_pair()
    lane = first._links[1].receiving[Direction.GRADIENT][0]
    meta, payload = describe([torch.zeros(192, dtype=torch.uint8)])
    begin, *rest = split(KEY, 0, 1, len(meta), payload, 64)
    work = first.channel(1).recv(KEY)
    receive_ring = fake.receive_ring(Direction.GRADIENT)
    receive_ring.write(0, begin.pack() + meta + bytes(64))
    fake.record(Op.ARRIVED, Direction.GRADIENT, 0, begin.total)
    until(heard(first, lambda: lane._parts))
    lane.abort(Loss(PeerLostError, "it is gone", "."))
    for index, part in enumerate(rest):
        receive_ring.write(1024 * (index + 1), part.pack() + bytes(64))
        fake.record(Op.ARRIVED, Direction.GRADIENT, 1024 * (index + 1), part.total)
    until(heard(first, lambda: not lane._parts))
    for failed in (work, first.channel(1).recv(KEY)):
        with pytest.raises(PeerLostError, match="it is gone"):
            failed.wait(5)


def test_a_tensor_without_memory_is_refused_and_nothing_is_sent(fake_pair):
    first, fake = fake_pair()
    with FakeTensorMode():
        nothing = torch.zeros(5)
    with pytest.raises(TransportError, match=r"tensor 1 \(FakeTensor\) has no memory of its own"):
        first.channel(1).send(activation(0), [torch.zeros(2), nothing])
    first.channel(1).send(activation(0), [torch.zeros(2)])
    assert fake.expect(Op.SEND)[5] == 0


def test_what_lies_in_host_memory_goes_whole():
    with pair(FakeDevice()) as ends:
        out, into = channels(ends)
        out.send(activation(0), [torch.zeros(3 * PART, dtype=torch.uint8)])
        [lane] = [lane for lane in ends[1]._links[0].recv_lanes() if lane.direction == 0 and lane.index == 0]
        until(heard(ends[1], lambda: lane._held))
        assert [held.nbytes for held in lane._held.values()] == [3 * PART]
        into.recv(activation(0)).wait()


# --- the format


@pytest.mark.parametrize("payload", [0, 64, 128, 192, 1000 * 64])
def test_parts_cover_the_payload(payload):
    parts = split(KEY, 3, 2, 64, payload, 128)
    assert [part.at for part in parts] == list(range(0, max(payload, 1), 128))
    assert sum(part.payload_bytes for part in parts) == payload
    assert {part.whole for part in parts} == {payload}
    assert [(part.tensors, part.meta_bytes) for part in parts] == [(2, 64)] + [(0, 0)] * (len(parts) - 1)
    for part in parts:
        assert parse_header(part.pack(), direction=KEY.direction, total=part.total, limit=payload) == part


@pytest.mark.parametrize(
    ("header", "total"),
    [
        (MessageHeader(KEY, 0, 1, 64, 64, 0, 1 << 50), 192),  # more than a ring holds
        (MessageHeader(KEY, 0, 0, 0, 64, 1 << 50, 0), 128),
        (MessageHeader(KEY, 0, 0, 0, 64, 63, 0), 128),
        (MessageHeader(KEY, 0, 1, 64, 65, 0, 64), 193),  # what follows would not be aligned
        (MessageHeader(KEY, 0, 1, 64, 0, 0, 64), 128),  # a part of nothing
        (MessageHeader(KEY, 0, 1, 0, 64, 64, 0), 128),  # described behind the first part
        (MessageHeader(KEY, 0, 0, 64, 64, 64, 0), 192),
    ],
)
def test_parts_that_cannot_be_are_refused(header, total):
    with pytest.raises(
        MalformedMessage, match=r"a part of \d+ bytes behind \d+ and before \d+ is announced; at most 1048576"
    ):
        parse_header(header.pack(), direction=KEY.direction, total=total, limit=1 << 20)


_numbers = st.one_of(st.integers(0, 1 << 14).map(lambda n: 64 * n), st.integers(0, (1 << 64) - 1))


@given(
    st.one_of(st.just(0), st.integers(0, (1 << 16) - 1)),
    st.one_of(st.sampled_from([0, 0, 64, 1 << 20]), st.integers(0, (1 << 32) - 1)),
    _numbers,
    _numbers,
    _numbers,
)
def test_whatever_a_header_says_what_is_accepted_fits(tensors, meta, payload, at, rest):
    header = MessageHeader(KEY, -1, tensors, meta, payload, at, rest)
    try:
        accepted = parse_header(header.pack(), direction=KEY.direction, total=header.total, limit=1 << 20)
    except MalformedMessage:
        return
    assert accepted == header and 0 <= at <= at + payload <= header.whole <= 1 << 20
    assert not (at and (meta or tensors))


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (MessageHeader(KEY, 0, 0, 0, 64, 128, 0), "a part begins at 128 of 192 bytes instead of 64 of 192"),
        (MessageHeader(KEY, 0, 0, 0, 64, 64, 0), "a part begins at 64 of 128 bytes instead of 64 of 192"),
        (MessageHeader(KEY, 0, 1, 64, 192, 0, 0), "a part begins at 0 of 192 bytes instead of 64 of 192"),
    ],
)
def test_parts_that_do_not_follow_each_other_end_the_link(fake_pair, second, expected):
    first, fake = fake_pair()
    work = first.channel(1).recv(KEY)
    meta, payload = describe([torch.zeros(192, dtype=torch.uint8)])
    start = split(KEY, 0, 1, len(meta), payload, 64)[0]
    receive_ring = fake.receive_ring(Direction.GRADIENT)
    receive_ring.write(0, start.pack() + meta + bytes(64))
    fake.record(Op.ARRIVED, Direction.GRADIENT, 0, start.total)
    receive_ring.write(1024, second.pack() + bytes(second.total - HEADER_BYTES))
    fake.record(Op.ARRIVED, Direction.GRADIENT, 1024, second.total)
    with pytest.raises(TransportError, match=f"malformed message on connection gradient 0: .*{expected}"):
        work.wait(10)


def test_a_part_without_a_beginning_ends_the_link(fake_pair):
    first, fake = fake_pair()
    work = first.channel(1).recv(KEY)
    part = MessageHeader(KEY, 0, 0, 0, 64, 64, 0)
    fake.receive_ring(Direction.GRADIENT).write(0, part.pack() + bytes(64))
    fake.record(Op.ARRIVED, Direction.GRADIENT, 0, part.total)
    with pytest.raises(TransportError, match="a part begins at 64 of 128 bytes instead of 0 of 128"):
        work.wait(10)
