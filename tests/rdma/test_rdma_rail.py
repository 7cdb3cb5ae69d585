"""The RDMA rail between two processes: frames and segments both ways, little memory, slow, lossy, cut and silent wires."""

from __future__ import annotations

import os
import signal
import time

import pytest

from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.proxy.rails.rdma.nics import Nic
from adaptra_plugin.transport.proxy.rails.rdma.slots import PREFIX_BYTES
from adaptra_plugin.transport.proxy.rails.rdma.verbs import VerbsError, Work
from adaptra_plugin.transport.proxy.rails.rdma.verbs_library import event_descriptors
from adaptra_plugin.transport.proxy.wire import HEADER_BYTES, FrameKind
from tests.rdma import wires
from tests.rdma.hosts import LANES, Host, both, started
from tests.rdma.pairs import MIB, noise

EDGE = 4096 - PREFIX_BYTES - HEADER_BYTES
"""Longest body that travels inside a slot."""


def test_frames_and_chunks_both_ways_in_order():
    def scenario(host: Host) -> None:
        rail = host.connect()
        other = "b" if host.side == "a" else "a"
        plan = []  # (kind, body or (lane, message, bytes)), the same on both sides but for the seed
        capacity = host.rings[LANES[0]].capacity
        for size in (0, 1, 3000, EDGE, EDGE + 1, 100_000, 4 * MIB):
            plan.append(("small", size))
        # inside a slot, at its edge, large, over the end of the ring in a slot and in the landing
        for message, size in (
            *((0, 1), (64, EDGE), (8192, EDGE + 1), (MIB, MIB), (capacity - 128, 1000)),
            *((2 * capacity - MIB // 2, MIB), (3 * capacity + 64, MIB + 17)),
        ):
            plan += [("segment", (lane, message, size)) for lane in LANES]

        def content(side: str, index: int, size: int) -> bytes:
            return noise(size, 1000 * (side == "a") + index)

        for index, (kind, what) in enumerate(plan):
            if kind == "small":
                rail.submit(host.small(content(host.side, index, what), index))
            else:
                lane, message, size = what
                rail.submit(host.segment(message, content(host.side, index, size), lane=lane))
            # a ring's room is used again only when what lay there has arrived
            host.until(lambda n=index: len(host.came) > n, f"frame {index}")
            host.complete()
            host.swap()
        assert len(host.came) == len(plan)
        for index, ((kind, what), (name, header, body)) in enumerate(zip(plan, host.came, strict=True)):
            assert name == "rdma0"
            size = what if kind == "small" else what[2]
            assert body == content(other, index, size), (index, kind, what)
            assert header.kind == (
                FrameKind.SEGMENT if kind == "segment" else FrameKind.CONTROL if size else FrameKind.PING
            )
        assert rail.backlog == 0 and not host.failures
        assert "198.18.0.1" in rail.describe() and "198.18.0.2" in rail.describe()

    both(scenario)


def test_little_memory_at_the_other_end_loses_nothing():
    """Far more than fits is submitted at both ends at once; credit goes to and fro."""

    def scenario(host: Host) -> None:
        rail = host.connect(slots=4, landing_bytes=300_000)
        sizes = [0, 9000, 200, 100_000, 0, 0, 250_000, 5000] * 8
        position = 0
        for index, size in enumerate(sizes):
            if index % 2:
                rail.submit(host.small(noise(size, index) if size else b"", index))
                continue
            frame = host.segment(position, noise(size + 64, index))
            position += -(-size // 64) * 64 + 64
            rail.submit(frame)
        assert rail.backlog > MIB
        host.until(lambda: len(host.came) == len(sizes), "everything")
        for index, (_, _, body) in enumerate(host.came):
            size = sizes[index]
            assert body == (noise(size, index) if index % 2 and size else b"" if index % 2 else noise(size + 64, index))
        host.complete()

    both(scenario)


@pytest.mark.parametrize("gather", [1, 2, 3])
def test_a_chunk_is_one_request_if_the_device_gathers_its_pieces(gather):
    def scenario(host: Host) -> None:
        posted: list[list[Work]] = []
        device = Nic(host.loop, wires.device(host.side, 0), address=wires.address(host.side, 0))
        device.device.max_gather = gather
        host.nics[0] = device
        rail = host.connect()
        capacity = host.rings[LANES[0]].capacity
        post = rail._pair.post
        rail._pair.post = lambda works: (posted.append(list(works)), post(works))  # type: ignore[func-returns-value]
        rail.submit(host.segment(capacity - MIB // 2, noise(MIB)))  # around the end of the ring: header and two pieces
        host.until(lambda: host.came)
        assert host.came[0][2] == noise(MIB)
        host.complete()
        (segment,) = (works for works in posted if works[-1].immediate is not None)
        assert len(segment) == -(-3 // gather) and all(work.remote for work in segment)
        assert [work.signaled for work in segment] == [False] * (len(segment) - 1) + [True]

    both(scenario)


def test_a_ring_that_grows_is_registered_as_far_as_it_is_used():
    def scenario(host: Host) -> None:
        host.rings = {key: Memfd.create(4 * MIB, MIB) for key in LANES}
        rail = host.connect()
        ring = host.rings[LANES[0]]
        assert list(host.nics[0]._rings[ring]) == [0]
        rail.submit(host.segment(2 * MIB - MIB // 2, noise(MIB)))  # in two extents
        rail.submit(host.segment(4 * MIB, noise(1000)))
        host.until(lambda: len(host.came) == 2)
        assert [body for _, _, body in host.came] == [noise(MIB), noise(1000)]
        host.complete()
        assert sorted(host.nics[0]._rings[ring]) == [0, 1, 2]

        def refuse(*_: object, **__: object) -> None:
            raise VerbsError("cannot register 1048576 bytes with the RDMA device: Cannot allocate memory")

        if host.side == "a":
            host.nics[0].device.register = refuse
            rail.submit(host.segment(3 * MIB, noise(MIB)))
            host.until(lambda: host.failures)
            assert "cannot register 1048576 bytes" in host.failures["rdma0"]
            with pytest.raises(VerbsError, match="cannot register"):  # not again and again
                host.nics[0].ring(ring)
        host.swap()

    both(scenario)


def test_what_is_declined_lands_nowhere():
    def scenario(host: Host) -> None:
        rail = host.connect()
        for lane in LANES:
            host.receive_rings[lane].write(0, b"\x55" * (2 * MIB))
        host.declined = {0, MIB}
        host.swap()
        for size in (100, MIB):
            rail.submit(host.segment(0 if size == 100 else MIB, noise(size)))
        rail.submit(host.segment(3 * MIB, noise(MIB, 2)))
        host.until(lambda: len(host.came) == 3)
        assert host.receive_rings[LANES[0]].read(0, 2 * MIB) == b"\x55" * (2 * MIB)
        assert host.came[2][2] == noise(MIB, 2)
        host.complete()

    both(scenario)


def test_a_chunk_whose_bytes_are_not_in_the_ring_travels_too():
    """So that rails can be wrapped by something that changes the bytes of a frame."""

    def scenario(host: Host) -> None:
        rail = host.connect(slots=16)
        frame = host.segment(64, bytes(MIB))
        frame.body = [noise(MIB)[:1000], memoryview(noise(MIB))[1000:]]
        rail.submit(frame)
        host.until(lambda: host.came)
        assert host.came[0][2] == noise(MIB)
        host.complete()

    both(scenario)


def test_a_slow_wire_carries_many_chunks_at_once():
    def scenario(host: Host) -> None:
        rail = host.connect()
        host.swap()
        if host.side == "a":
            wires.fault(0, "delay", "30ms", "limit", "100000")
        host.swap()
        count, size = 20, 128 << 10
        if host.side == "a":
            began = time.monotonic()
            for index in range(count):
                rail.submit(host.segment(index * size, noise(size, index)))
            host.complete()
            elapsed = time.monotonic() - began
            assert 0.06 <= elapsed < count * 0.06, f"{elapsed:.2f} s: one after the other"
        else:
            host.until(lambda: len(host.came) == count)
            assert [body for _, _, body in host.came] == [noise(size, index) for index in range(count)]
        host.swap()

    both(scenario)


def test_a_lossy_wire_loses_nothing():
    def scenario(host: Host) -> None:
        rail = host.connect()
        host.swap()
        if host.side == "a":
            wires.fault(0, "loss", "1%")
        host.swap()
        count, size = 12, 256 << 10
        for index in range(count):
            rail.submit(host.segment(index * size, noise(size, index)))
            rail.submit(host.small(noise(50, index), index))
        host.until(lambda: len(host.came) == 2 * count, "everything", 40)
        for index in range(count):
            assert host.came[2 * index][2] == noise(size, index) and host.came[2 * index + 1][2] == noise(50, index)
        host.complete()
        assert not host.failures

    both(scenario)


def _goes_on(host: Host, name: str, message: int = 0) -> None:
    """A segment each way over the rail; the other process calls this too, sooner or later."""
    host.expected[name] += 1
    host.rails[name].submit(host.segment(message, noise(MIB, message + 1)))
    host.until(lambda: len(host.over(name)) >= host.expected[name], f"segment {host.expected[name]} over {name}")
    assert host.over(name)[host.expected[name] - 1] == noise(MIB, message + 1)
    host.until(lambda: host.rails[name].backlog == 0)


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_cut_wire_ends_its_rail_and_comes_back_with_a_new_one(side):
    def scenario(host: Host) -> None:
        for wire in range(2):
            host.connect(wire)
        for name in ("rdma0", "rdma1"):
            _goes_on(host, name)
        host.swap()
        began = time.monotonic()
        if host.side == side:
            wires.cut(0, side)
        # no traffic is needed at the end whose port is down
        if host.side != side:
            host.rails["rdma0"].submit(host.segment(0, noise(MIB)))
        host.until(lambda: "rdma0" in host.failures, "the end of rdma0", 10)
        if host.side == side:
            assert "port down" in host.failures["rdma0"] and time.monotonic() - began < 1
        host.rails["rdma0"].submit(host.small())  # dropped
        _goes_on(host, "rdma1", MIB)
        if host.side == side:
            with pytest.raises(VerbsError, match="its port is down"):
                host.connect(0)
        host.swap()
        if host.side == "a":
            wires.mend(0)
        host.swap()
        host.connect(0)
        host.expected["rdma0"] = len(host.over("rdma0"))  # what went in while the wire was cut may have come through
        host.swap()
        _goes_on(host, "rdma0", 2 * MIB)
        _goes_on(host, "rdma1", 0)
        assert list(host.failures) == ["rdma0"]

    both(scenario)


def test_a_black_hole_ends_the_rail_and_the_other_one_goes_on():
    def scenario(host: Host) -> None:
        for wire in range(2):
            host.connect(wire)
        _goes_on(host, "rdma0")
        host.swap()
        if host.side == "a":
            wires.fault(0, "loss", "100%")
        host.swap()
        began = time.monotonic()
        host.rails["rdma0"].submit(host.segment(0, noise(MIB)))
        _goes_on(host, "rdma1", MIB)
        host.until(lambda: "rdma0" in host.failures, "the end of rdma0", 10)
        assert "no acknowledgement from the remote end" in host.failures["rdma0"]
        assert 0.5 < time.monotonic() - began < 6
        _goes_on(host, "rdma1", 2 * MIB)

    both(scenario)


def test_a_peer_that_is_killed_ends_the_rail():
    def scenario(host: Host) -> None:
        rail = host.connect()
        _goes_on(host, "rdma0")
        if host.side == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        until = time.monotonic() + 15
        while not host.failures:
            # more than one: the kernel may answer for a process that is still being taken down
            assert time.monotonic() < until
            rail.submit(host.small())
            host.idle(0.2)

    with started(scenario) as running:
        (_, report), _ = running
        assert report.poll(40)
        error = report.recv()
        assert "the other process has ended" in error or "reset" in error or "Broken pipe" in error, error


def test_offers_that_make_no_sense_are_refused():
    def scenario(host: Host) -> None:
        rail = host.connect()
        good = host.swap(rail.offer())
        for field, value in (
            ("number", -1),
            ("psn", 1 << 24),
            ("mtu", "4096"),
            ("version", 3),
            ("slots", True),
            ("key", None),
        ):
            with pytest.raises(VerbsError, match=f"the offer of rail rdma0 has {field}"):
                rail.accept({**good, field: value})
        with pytest.raises(VerbsError, match="has the address ''"):
            rail.accept({**good, "gid": ""})
        host.swap()

    both(scenario)


def test_frames_that_make_no_sense_end_the_rail():
    def scenario(host: Host) -> None:
        rail = host.connect()
        host.swap()
        if host.side == "a":
            frame = host.small(b"body")
            frame.header.lane = 9
            rail.submit(frame)
            host.until(lambda: rail.backlog == 0)
        else:
            host.until(lambda: host.failures)
            assert host.failures["rdma0"] == "what came is no frame: a frame is for lane 9; there are 1"
        host.swap()

    both(scenario)


def test_a_chunk_that_fits_nowhere_is_told():
    def scenario(host: Host) -> None:
        rail = host.connect(landing_bytes=MIB)
        if host.side == "a":
            rail.submit(host.segment(0, bytes(2 * MIB)))
            host.until(lambda: host.failures)
            assert host.failures["rdma0"] == "a segment of 2097152 bytes does not fit into the other end's 1048576"
        host.swap()

    both(scenario)


def test_everything_is_given_back():
    def scenario(host: Host) -> None:
        for _ in range(3):
            rail = host.connect()
            _goes_on(host, "rdma0")
            host.swap()
            rail.close()
            rail.close()
            host.nics.pop(0).close()
            assert event_descriptors() == set()

    both(scenario)
