"""Tensors on a device: copies to and from it beside the computation, in parts where they are long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport import staging
from tests.transport.fake_device import SLOW_S, THERE, FakeDevice, channels, late, pair, tensors_of_all_kinds
from tests.transport.support import activation, gradient, heard, until

pytestmark = pytest.mark.usefixtures("either_way")


@pytest.fixture(params=[True, False], ids=["pinned", "detour"])
def device(request) -> Iterator[FakeDevice]:
    made = FakeDevice(pins=request.param)
    yield made
    made.end()


def test_the_copy_waits_for_the_computation_and_the_caller_does_not(device):
    with pair(device) as ends:
        out, into = channels(ends)
        tensor = device.put(torch.zeros(50_000))
        device.compute.run(late(tensor, 7.0))
        started = time.monotonic()
        work = out.send(activation(0), [tensor])
        assert time.monotonic() - started < SLOW_S / 2
        message = into.recv(activation(0)).wait()
        assert torch.equal(message.tensors[0], torch.full((50_000,), 7.0))
        work.wait()
        assert message.delay_ms < SLOW_S * 500  # neither the computation nor the copy is the link's


@pytest.mark.parametrize("part_segments", [1, 4])
def test_every_tensor_arrives_bit_by_bit_over_and_over_the_end_of_the_ring(device, part_segments, monkeypatch):
    monkeypatch.setattr("adaptra_plugin.transport.send_lane.PART_SEGMENTS", part_segments)
    device.upload_s = 0.0
    with pair(device) as ends:
        out, into = channels(ends)
        for turn in range(12):  # 0.25 MiB a message in rings of 1 MiB
            sent = tensors_of_all_kinds()
            for index, tensor in enumerate(sent):
                if (index + turn) % 3:  # the others are in host memory
                    device.put(tensor)
            works = [out.send(activation(microbatch, turn), sent) for microbatch in (0, 1)]
            for microbatch in (0, 1):
                got = into.recv(activation(microbatch, turn), device=THERE if turn % 2 else None).wait().tensors
                device.compute.mark().synchronize()
                for mine, theirs in zip(sent, got, strict=True):
                    assert mine.dtype == theirs.dtype
                    assert mine.shape == theirs.shape
                    assert torch.equal(mine, theirs)
            for work in works:
                work.wait()
        assert device.copies > 12
        lanes = ends[0]._links[1].send_lanes()
        assert [lane._copying for lane in lanes] == [0, 0, 0, 0]


def test_others_hear_of_messages_in_the_order_of_their_positions(device):
    with pair(device, connections_per_direction=1) as ends:
        out, into = channels(ends)
        [lane] = [lane for lane in ends[0]._links[1].send_lanes() if lane.direction == 0]
        posted = []
        tell = lane._tell

        def record(outgoing, after):
            posted.append(outgoing.position)
            tell(outgoing, after)

        lane._tell = record
        tensor = device.put(torch.zeros(1000))
        device.compute.run(late(tensor, 1.0))
        for microbatch in range(6):  # those in host memory are ready long before
            out.send(
                activation(microbatch), [tensor if microbatch % 2 == 0 else torch.full((1000,), float(microbatch))]
            )
        received = [into.recv(activation(microbatch)).wait().tensors[0][0].item() for microbatch in range(6)]
        assert received == [1.0, 1.0, 1.0, 3.0, 1.0, 5.0]
        assert posted == sorted(posted)
        assert len(posted) == 6


def test_a_copy_that_fails_ends_the_endpoint_with_its_reason(device):
    with pair(device) as ends:
        out, _ = channels(ends)
        device.broken = "an illegal memory access was encountered"
        work = out.send(activation(0), [device.put(torch.zeros(10))])
        with pytest.raises(
            TransportError, match=r"activation of microbatch 0 .* copied from the device: .*illegal memory"
        ):
            work.wait()
        with pytest.raises(TransportError, match="illegal memory"):
            out.send(activation(1), [torch.zeros(1)])
        with pytest.raises(TransportError, match="illegal memory"):
            out.recv(gradient(0)).wait()


def test_a_tensor_that_is_changed_before_it_is_copied_is_noticed(device):
    with pair(device) as ends:
        out, _ = channels(ends)
        tensor = device.put(torch.zeros(10))
        device.compute.run(lambda: time.sleep(SLOW_S))
        work = out.send(activation(0), [tensor.detach()])
        tensor.add_(1)
        with pytest.raises(TransportError, match="changed in place before it was copied"):
            work.wait()


def test_what_is_not_contiguous_is_copied_at_once_and_may_be_changed(device):
    with pair(device) as ends:
        out, into = channels(ends)
        tensor = device.put(torch.arange(20.0).reshape(4, 5))
        device.compute.run(lambda: time.sleep(SLOW_S))
        out.send(activation(0), [tensor.t()])
        tensor.zero_()
        assert torch.equal(into.recv(activation(0)).wait().tensors[0], torch.arange(20.0).reshape(4, 5).t())


def test_closing_waits_for_the_copies_as_it_waits_for_the_wire(device):
    with pair(device) as ends:
        out, into = channels(ends)
        tensor = device.put(torch.zeros(10))
        device.compute.run(late(tensor, 4.0))
        out.send(activation(0), [tensor])
        ends[0].close(linger_s=10)
        assert into.recv(activation(0)).wait().tensors[0].tolist() == [4.0] * 10


def test_a_device_that_hangs_does_not_keep_the_endpoint_from_closing(device, monkeypatch, caplog):
    monkeypatch.setattr(staging, "_END_S", 0.2)
    hang = threading.Event()
    with pair(device) as ends:
        out, _ = channels(ends)
        device.compute.run(lambda: hang.wait(20))
        work = out.send(activation(0), [device.put(torch.zeros(10))])
        started = time.monotonic()
        ends[0].close(linger_s=0.1)
        assert time.monotonic() - started < 5
        with pytest.raises(TransportError):
            work.wait()
        assert "does not complete a copy" in caplog.text
        hang.set()
        until(lambda: not ends[0]._copier.copies.alive)


def test_tensors_of_several_devices_are_refused_and_the_lane_goes_on(device, monkeypatch):
    with pair(device) as ends:
        out, into = channels(ends)
        one, other = device.put(torch.zeros(3)), device.put(torch.zeros(3))
        monkeypatch.setattr(
            staging, "as_bytes", lambda t: torch.empty(12, dtype=torch.uint8, device="meta" if t is other else "cpu")
        )
        with pytest.raises(TransportError, match="tensors on cpu and meta"):
            out.send(activation(0), [one, other])
        monkeypatch.undo()
        out.send(activation(1), [torch.ones(2)])
        assert into.recv(activation(1)).wait().tensors[0].tolist() == [1.0, 1.0]


def test_what_is_received_is_complete_for_the_stream_and_the_host_does_not_wait(device):
    with pair(device) as ends:
        out, into = channels(ends)
        sent = [torch.arange(6.0).reshape(2, 3), torch.ones(3, dtype=torch.int8)]
        work = into.recv(activation(0), device=THERE)
        out.send(activation(0), sent, tag=9).wait()
        started = time.monotonic()
        message = work.wait()
        assert time.monotonic() - started < SLOW_S / 2
        assert message.tag == 9
        seen: list[torch.Tensor] = []
        device.compute.run(lambda: seen.extend(tensor.clone() for tensor in message.tensors))
        device.compute.mark().synchronize()
        assert all(torch.equal(a, b) for a, b in zip(seen, sent, strict=True))
        assert work.wait() is message


def test_the_next_message_of_a_lane_is_fetched_ahead_and_no_more(device):
    with pair(device) as ends:
        out, into = channels(ends)
        works = [into.recv(activation(microbatch), device=THERE) for microbatch in (0, 2, 4)]  # all of lane 0
        other = into.recv(activation(6))
        for microbatch in (0, 2, 4, 6):
            out.send(activation(microbatch), [torch.full((1000,), float(microbatch))]).wait()
            until(heard(ends[1], lambda: device.uploads == 1), "upload before it is waited for")
        for turn, work in enumerate(works):
            until(heard(ends[1], lambda turn=turn: device.uploads == turn + 1), "upload of the next one")
            time.sleep(0.05)  # for one too many to show
            assert device.uploads == turn + 1
            message = work.wait()
            seen: list[torch.Tensor] = []
            device.compute.run(lambda message=message, seen=seen: seen.append(message.tensors[0].clone()))
            device.compute.mark().synchronize()
            assert torch.equal(seen[0], torch.full((1000,), 2.0 * turn))
        other.wait()
        assert device.uploads == 3


def test_a_message_that_came_before_it_was_asked_for_is_fetched_too(device):
    with pair(device) as ends:
        out, into = channels(ends)
        out.send(activation(0), [torch.ones(10)]).wait()
        [lane] = [lane for lane in ends[1]._links[0].recv_lanes() if lane.direction == 0 and lane.index == 0]
        until(heard(ends[1], lambda: lane._held))
        assert device.uploads == 0
        work = into.recv(activation(0), device=THERE)
        until(lambda: device.uploads == 1)
        message = work.wait()
        device.compute.mark().synchronize()
        assert message.tensors[0].tolist() == [1.0] * 10


def test_a_fetch_waits_for_no_computation(device):
    with pair(device) as ends:
        out, into = channels(ends)
        hang = threading.Event()
        device.compute.run(lambda: hang.wait(20))
        into.send(gradient(0), [device.put(torch.zeros(10))])  # the copier waits
        into.recv(activation(0), device=THERE)
        out.send(activation(0), [torch.ones(10)]).wait()
        until(heard(ends[1], lambda: device.uploads == 1))
        hang.set()
        out.recv(gradient(0)).wait()


def test_an_upload_that_fails_may_be_tried_again(device):
    with pair(device) as ends:
        out, into = channels(ends)
        work = into.recv(activation(0), device=THERE)
        out.send(activation(0), [torch.ones(4)])
        device.uploads_fail = 2  # once ahead of its turn, which is nobody's error
        until(heard(ends[1], lambda: device.uploads_fail == 1))
        with pytest.raises(RuntimeError, match="out of memory"):
            work.wait()
        out.send(activation(2), [torch.zeros(200_000)])  # into the room of the first one, which is free
        into.recv(activation(2)).wait()
        message = work.wait()
        device.compute.mark().synchronize()
        assert message.tensors[0].tolist() == [1.0] * 4


def test_host_memory_needs_neither_thread_nor_copies(device):
    with pair(device) as ends:
        out, into = channels(ends)
        tensor = torch.zeros(10)
        device.compute.run(lambda: time.sleep(SLOW_S))
        started = time.monotonic()
        out.send(activation(0), [tensor])
        tensor.add_(1)  # at once
        work = into.recv(activation(0), device=torch.device("cpu"))
        assert work._device is None  # as without one
        got = work.wait()
        assert time.monotonic() - started < SLOW_S / 2
        assert got.tensors[0].tolist() == [0.0] * 10
        assert (device.copies, ends[0]._copier.copies.alive, ends[1]._copier.fetches.alive) == (0, False, False)
