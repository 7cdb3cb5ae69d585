"""The verbs layer on software devices: bytes both ways, and links that break."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptra_plugin.transport.proxy.rails.rdma import verbs
from adaptra_plugin.transport.proxy.rails.rdma.verbs import Device, VerbsError, Work
from tests.rdma import wires
from tests.rdma.pairs import MIB, PATIENCE_S, End, ends, noise

FLUSHED, NO_ACKNOWLEDGEMENT = 5, 12


def test_devices_are_listed_with_their_addresses():
    assert verbs.unavailable() is None
    found, problems = verbs.ports()
    assert problems == []
    assert [p.device for p in found] == sorted(wires.device(s, w) for s in "ab" for w in range(wires.COUNT))
    port = next(p for p in found if p.device == "rxb1")
    assert port.active and port.link_layer == "ethernet" and port.mtu == 4096 and port.numa_node is None
    # the address of the wire is preferred over the link-local one that comes first in the table
    assert (port.gid().address, port.gid().kind, port.gid().interface) == ("198.18.1.2", "roce2", "b1")
    assert port.gid("198.18.1.2") == port.gid()
    with pytest.raises(VerbsError, match=r"rxb1 port 1 has no address 10\.9\.8\.7; it has: .*198\.18\.1\.2 \(roce2\)"):
        port.gid("10.9.8.7")


def test_mistakes_are_told():
    with pytest.raises(VerbsError, match=r"cannot open the RDMA device nix.*this machine has: rxa0, rxa1, rxb0, rxb1"):
        Device("nix")
    device = Device("rxa0")
    with pytest.raises(VerbsError, match="writable, contiguous memory"):
        device.register(memoryview(b"read only"))
    pair = device.queue_pair(device.completions(8), 4, 4)
    with pytest.raises(VerbsError, match=r"retries 7 \(0 to 6\)"):
        pair.connect(device.port().gid(), 1, 1, device.port().gid().raw, 0, 4096, retries=7)
    with pytest.raises(VerbsError, match="cannot have 1500 bytes"):
        pair.connect(device.port().gid(), 1, 1, device.port().gid().raw, 0, 1500)
    assert pair.state == "INIT"
    queue = device.completions(8)
    device.close()
    device.close()
    # pyverbs itself ends the process here
    calls = [lambda: pair.state, pair.fail, queue.drain, device.port, device.active, device.events]
    calls += [lambda: pair.post([]), lambda: device.completions(8), lambda: device.register(memoryview(bytearray(8)))]
    for call in calls:
        with pytest.raises(VerbsError, match="has been closed"):
            call()


def test_send_carries_bytes_both_ways():
    with ends() as (a, b):
        for sender, receiver, seed in ((a, b, 1), (b, a, 2)):
            data = noise(5000, seed)
            sender.memory[:5000] = data
            receiver.pair.post_receive(7, receiver.region, 8192, 6000)
            sender.pair.post([Work(8, sender.region, 0, 5000)])
            (sent,), (received,) = sender.wait(), receiver.wait()
            assert (sent.request, sent.status, sent.received) == (8, 0, False)
            assert (received.request, received.status, received.received, received.nbytes) == (7, 0, True, 5000)
            assert received.immediate is None and received.pair == receiver.pair.number
            assert receiver.memory[8192 : 8192 + 5000] == data
            assert bytes(receiver.memory[8192 + 5000 : 8192 + 6000]) == bytes(1000)


def test_write_with_immediate_carries_bytes_both_ways():
    with ends(nbytes=16 * MIB) as (a, b):
        for sender, receiver, seed in ((a, b, 3), (b, a, 4)):
            data = noise(16 * MIB - 100, seed)
            sender.memory[100:] = data
            receiver.pair.post_receive(1, receiver.region, 0, 64)
            remote = (receiver.region.address + 100, receiver.region.rkey)
            sender.pair.post([Work(2, sender.region, 100, len(data), remote, immediate=0xFEED0000 + seed)])
            (sent,), (received,) = sender.wait(), receiver.wait()
            assert sent.status == 0 and sent.request == 2
            assert (received.status, received.immediate, received.nbytes) == (0, 0xFEED0000 + seed, len(data))
            assert receiver.memory[100:] == data
            assert bytes(receiver.memory[:100]) == bytes(sender.memory[:100])


def test_a_send_after_unsignaled_writes_is_seen_after_their_bytes():
    with ends(nbytes=8 * MIB) as (a, b):
        data = noise(6 * MIB)
        a.memory[: len(data)] = data
        half = len(data) // 2
        for first, second in ((0, half), (half, 0)):
            b.memory[:] = bytes(b.memory.nbytes)
            b.pair.post_receive(1, b.region, 7 * MIB, 64)
            works = [
                Work(10 + at, a.region, at, half, (b.region.address + at, b.region.rkey), signaled=False)
                for at in (first, second)
            ]
            a.pair.post([*works, Work(99, a.region, 0, 64)])
            (received,) = b.wait()
            assert received.nbytes == 64 and b.memory[: len(data)] == data
            # one completion for three requests
            assert [c.request for c in a.wait()] == [99]


def test_a_write_outside_of_the_region_fails_on_both_sides():
    with ends() as (a, b):
        b.pair.post_receive(1, b.region, 0, 64)
        a.pair.post([Work(5, a.region, 0, 64, (b.region.address + MIB, b.region.rkey), immediate=1)])
        (sent,) = a.wait()
        assert sent.request == 5 and "remote access error" in verbs.status_text(sent.status)
        assert a.pair.state == "ERR"


def test_failing_a_pair_flushes_what_is_posted():
    with ends() as (a, _):
        a.pair.post_receive(3, a.region, 0, 64)
        assert a.pair.state == "RTS"
        a.pair.fail()
        assert [(c.request, c.status) for c in a.wait()] == [(3, FLUSHED)]
        assert a.pair.state == "ERR"


def _reconnected(a: End, b: End) -> None:
    """New queue pairs work over the wire after it has been mended, with the memory registered before."""
    wires.mend(0)
    for end in (a, b):
        end.device.forget(end.pair)
        end.completions.drain()  # of the old pair
        end.new_pair()
    a.join(b)
    b.join(a)
    data = noise(MIB, 9)
    a.memory[:] = data
    b.pair.post_receive(1, b.region, 0, 64)
    a.pair.post([Work(2, a.region, 0, MIB, (b.region.address, b.region.rkey), immediate=77)])
    assert a.wait()[0].status == 0
    assert b.wait()[0].immediate == 77
    assert b.memory == data


def _write(end: End, other: End, request: int = 1) -> None:
    end.pair.post([Work(request, end.region, 0, 64, (other.region.address, other.region.rkey))])


def _next_event(end: End) -> list[str]:
    assert select.select([end.device.events_fd], [], [], PATIENCE_S)[0]
    return end.device.events()


def test_local_link_down():
    with ends() as (a, b):
        assert a.device.events_fd is not None and a.device.events() == []
        wires.cut(0, "a")
        # the device tells at once, and what is posted is flushed at once
        assert "port down" in _next_event(a)
        assert not a.device.active() and not a.device.port().active
        began = time.monotonic()
        _write(a, b)
        assert a.wait()[0].status in (FLUSHED, NO_ACKNOWLEDGEMENT)
        assert time.monotonic() - began < 2
        _reconnected(a, b)
        assert "port up" in a.device.events()


def test_remote_link_down():
    with ends() as (a, b):
        wires.cut(0, "b")
        began = time.monotonic()
        _write(a, b)
        assert a.wait()[0].status in (FLUSHED, NO_ACKNOWLEDGEMENT)
        assert time.monotonic() - began < 3
        _reconnected(a, b)


def test_black_hole_and_another_wire_goes_on():
    with ends(wire=0) as (a, b), ends(wire=1) as (c, d):
        wires.fault(0, "loss", "100%")
        began = time.monotonic()
        _write(a, b)
        for number in range(5):
            _write(c, d, number)
            assert c.wait()[0].status == 0
        assert a.wait()[0].status == NO_ACKNOWLEDGEMENT
        assert 0.1 < time.monotonic() - began < 3
        assert a.device.events() == [] and a.device.active()  # nobody but the retries tells of it
        _reconnected(a, b)


def test_loss_costs_time_and_no_bytes():
    with ends(nbytes=MIB) as (a, b):
        wires.fault(0, "loss", "0.5%")
        data = noise(MIB, 5)
        a.memory[:] = data
        b.pair.post_receive(1, b.region, 0, 64)
        a.pair.post([Work(2, a.region, 0, len(data), (b.region.address, b.region.rkey), immediate=1)])
        assert a.wait()[0].status == 0 and b.wait()[0].status == 0
        assert b.memory == data


def test_what_a_destroyed_pair_has_sent_still_lands():
    """Why the rail does not write into memory that is used again (`rails/rdma.py`)."""
    with ends() as (a, b):
        a.memory[:64] = b"\x22" * 64
        _write(a, b)
        assert a.wait()[0].status == 0
        wires.fault(0, "delay", "300ms", sides="a")
        _write(a, b)
        a.device.forget(a.pair)
        b.memory[:64] = b"\x33" * 64
        time.sleep(0.1)
        assert b.memory[0] == 0x33
        time.sleep(0.5)
        assert b.memory[0] == 0x22


def test_everything_is_given_back():
    before = {entry.name for entry in Path("/proc/self/fd").iterdir()}
    for _ in range(3):
        with ends():
            pass
    assert {entry.name for entry in Path("/proc/self/fd").iterdir()} == before


WITHOUT = """
import sys
from adaptra_plugin.transport.proxy.rails.rdma import verbs, verbs_library
{change}
assert verbs.ports() == ([], [verbs.unavailable()])
print(verbs.unavailable())
assert not any("dist-packages" in folder for folder in sys.path)
assert "torch" not in sys.modules and "pydantic" not in sys.modules
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("verbs_library.SYSTEM_PACKAGES = ()", "pyverbs is not installed (Debian: apt-get install python3-pyverbs"),
        ("verbs._SYSFS = verbs.Path('/nix')", "this machine has no RDMA device (/nix has none)"),
    ],
)
def test_without_pyverbs_or_devices_there_is_a_reason(change, said):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(change=change)], capture_output=True, text=True, timeout=60
    )
    assert said in done.stdout, done.stderr
