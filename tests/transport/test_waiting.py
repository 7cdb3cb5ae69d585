"""Who reads the data socket, in which order records may come, and how long `send` takes."""

import statistics
import subprocess
import sys
import threading
import time
from linecache import getline

import pytest
import torch

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport import Direction
from adaptra_plugin.transport.bridge import MAX_PACKET, RECORD, Op, pairs
from adaptra_plugin.transport.event_pump import EventPump
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.types import PROTOCOL

from .support import activation, everywhere, gradient, heard, line, until

LIGHT = """
import sys
import {module}
heavy = sorted(name for name in ("torch", "pydantic", "numpy") if name in sys.modules)
sys.exit(f"imports {{heavy}}" if heavy else 0)
"""


@pytest.mark.parametrize("module", ["adaptra_plugin.transport.proxy.main", "adaptra_plugin.transport"])
def test_the_proxy_imports_nothing_heavy(module):
    result = subprocess.run([sys.executable, "-c", LIGHT.format(module=module)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# --- the event pump


def test_one_thread_reads_and_hands_the_role_on():
    (near, far), control = pairs()
    for end in control:
        end.close()
    got = []
    box = EventPump(near, got.append)
    try:
        order = []

        def waiter(number):
            assert box.wait(lambda: len(got) >= number, time.monotonic() + 10)
            order.append(number)

        threads = [threading.Thread(target=waiter, args=(number,)) for number in (3, 1, 2)]
        for thread in threads:
            thread.start()
        for number in range(1, 4):
            far.send(b"x")
            until(lambda number=number: order == list(range(1, number + 1)), "wake-up")
        for thread in threads:
            thread.join(10)
        assert not box._reading and box._followers == 0
    finally:
        box.close()
        far.close()


def test_a_record_that_comes_between_a_followers_look_and_its_sleep_wakes_it():
    (near, far), control = pairs()
    for end in control:
        end.close()
    got = []
    box = EventPump(near, got.append)
    looks = []

    def done():
        found = bool(got)
        looks.append(found)
        if len(looks) == 2:  # the look under the lock: now the record comes
            far.send(b"x")
            until(lambda: got, "dispatch")
            time.sleep(0.05)
        return found

    try:
        stop = threading.Event()
        reader = threading.Thread(target=lambda: box.wait(stop.is_set, time.monotonic() + 20))
        reader.start()
        until(lambda: box._reading, "reader")
        start = time.monotonic()
        assert box.wait(done, start + 10)
        assert time.monotonic() - start < 5
        stop.set()
        box.wake()
        reader.join(10)
        assert not box._reading and box._followers == 0
    finally:
        box.close()
        far.close()


class Interrupt(Exception):
    """What a signal handler raises."""


def interrupting(code_of, line):
    """A trace function that raises, once, in front of the `line`-th line that runs in functions that `code_of` accepts;
    it counts them in `seen`."""

    def local(frame, event, argument):
        # a line of a `with` is traced again on its way out, where no signal handler can run before the lock is free
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            local.seen += 1
            if local.seen == line:
                raise Interrupt
        return local

    def trace(frame, event, argument):
        return local if code_of(frame.f_code) else None

    local.seen = 0
    return trace, local


def test_records_that_an_interrupted_reader_has_taken_are_handled_by_the_next_one():
    (near, far), control = pairs()
    for end in control:
        end.close()
    got, interrupts = [], [2]

    def dispatch(record):
        if interrupts and len(got) == interrupts[0]:
            interrupts.pop()
            raise Interrupt
        got.append(record)

    box = EventPump(near, dispatch)
    records = [RECORD.pack(Op.ACKED, 0, 0, 0, 1, 64 * n, 0, 0.0, 0) for n in range(5)]
    far.send(b"".join(records))
    far.send(records[0])
    try:
        with pytest.raises(Interrupt):
            box.wait(lambda: False, time.monotonic() + 10)
        assert got == records[:2] and not box._reading
        assert box.wait(lambda: len(got) == 6, time.monotonic() + 10)
        assert got == [*records, records[0]]
    finally:
        box.close()
        far.close()


def test_no_place_of_an_interruption_loses_a_message(fake_pair):
    """The books of a reader that is interrupted in front of any of its lines are completed by the next one."""
    first, fake = fake_pair(ring_mib=16)
    channel = first.channel(1)

    def ours(code):
        file, name = code.co_filename, code.co_name
        return (file.endswith("pump.py") and name in ("read", "_turn", "_let_go")) or (
            file.endswith("_lane.py") and name in ("deliver", "_deliver", "_understand", "_enter", "acked", "consumed")
        )

    line, interrupted = 0, True
    while interrupted:
        line += 1
        step_id = line
        early = channel.recv(gradient(0, step_id))
        long = channel.recv(gradient(2, step_id))
        sent = channel.send(activation(0, step_id), [torch.ones(4)])
        position = fake.expect(Op.SEND)[5]
        at = fake.deliver(gradient(0, step_id), torch.full((4,), float(step_id)), 4096 * step_id)
        parts = fake.deliver(gradient(1, step_id), torch.full((4,), -float(step_id)), at)
        other = fake.deliver(gradient(2, step_id), torch.full((40,), float(step_id)), parts, step=128)
        fake.deliver(gradient(3, step_id), torch.full((40,), -float(step_id)), other, step=128)
        fake.record(Op.ACKED, position=position)
        fake.record(Op.CONSUMED, position=position)
        trace, local = interrupting(ours, line)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            first._pump.drain()
        except Interrupt:
            pass
        finally:
            sys.settrace(before)
        interrupted = local.seen >= line
        assert not first._pump._reading, f"line {line}: the role is not let go"
        assert early.wait(2).tensors[0].tolist() == [step_id] * 4, f"line {line}"
        assert channel.recv(gradient(1, step_id)).wait(2).tensors[0].tolist() == [-step_id] * 4, f"line {line}"
        assert long.wait(2).tensors[0].tolist() == [step_id] * 40, f"line {line}"
        assert channel.recv(gradient(3, step_id)).wait(2).tensors[0].tolist() == [-step_id] * 40, f"line {line}"
        sent.wait(2)
        released = [fake.expect(Op.RELEASE)[5] for _ in range(6)]
        assert released[:3] == [4096 * step_id, at, parts] and released[4] == other
        lane = first._links[1].receiving[Direction.GRADIENT][0]
        first._pump.drain()
        assert (
            not (lane._held or lane._posted or lane._arrived or lane._parts)
            and not first._links[1].sending[0][0].allocator
        )
        # the counts are entered in a line of their own, where no signal handler can run
        assert 4 * step_id - 4 <= lane.counters.messages <= 4 * step_id
    assert line > 60


def test_a_record_that_comes_again_after_its_message_was_taken_is_no_message(fake_pair):
    first, fake = fake_pair()
    channel = first.channel(1)
    work = channel.recv(gradient(0))
    fake.deliver(gradient(0), torch.ones(4), 0)
    assert work.wait().tensors[0].tolist() == [1.0] * 4
    fake.receive_ring(Direction.GRADIENT).write(0, b"\xff" * 192)  # the room is the peer's again
    fake.record(Op.ARRIVED, Direction.GRADIENT, 0, 192)
    first._pump.drain()
    lane = first._links[1].receiving[Direction.GRADIENT][0]
    assert lane.loss is None and not lane._arrived and lane.counters.messages == 1


def test_what_no_record_tells_is_noticed_by_the_reader_and_by_the_others():
    (near, far), control = pairs()
    for end in control:
        end.close()
    box = EventPump(near, lambda packet: None)
    try:
        flag = threading.Event()
        calls = [lambda: box.wait(flag.is_set, time.monotonic() + 20) or 1 / 0] * 3
        threading.Timer(0.1, lambda: (flag.set(), box.wake())).start()
        start = time.monotonic()
        assert everywhere(*calls) == [None] * 3
        assert time.monotonic() - start < 5
        start = time.monotonic()
        assert not box.wait(lambda: False, start + 0.05)
        assert 0.05 <= time.monotonic() - start < 2
    finally:
        box.close()
        far.close()


def test_a_full_socket_is_waited_for_and_a_closed_one_ends_nothing():
    (near, far), control = pairs()
    for end in control:
        end.close()
    box = EventPump(near, lambda packet: None)
    received = []
    reader = threading.Thread(target=lambda: [received.append(far.recv(MAX_PACKET)) for _ in range(5000)])
    threading.Timer(0.2, reader.start).start()
    for number in range(5000):
        box.post(Op.SEND, 1, 0, 0, 64 * number)
    reader_started = time.monotonic()
    while len(received) < 5000 and time.monotonic() - reader_started < 10:
        time.sleep(0.01)
    assert len(received) == 5000
    far.close()
    box.post(Op.SEND, 1, 0, 0)  # dropped
    assert not box.wait(lambda: False, time.monotonic() + 0.05)
    box.close()
    box.post(Op.SEND, 1, 0, 0)


# --- records


def test_room_is_free_again_from_the_oldest_message_on(fake_pair):
    first, fake = fake_pair()
    channel = first.channel(1)
    works = [channel.send(activation(n), [torch.zeros(75_000)]) for n in range(3)]
    records = [fake.expect(Op.SEND) for _ in range(3)]
    assert [r[5] for r in records] == [0, 300_160, 600_320] and {r[6] for r in records} == {300_160}
    fake.record(Op.CONSUMED, position=300_160)  # the second one: no room for the fourth yet, but it has arrived
    works[1].wait()
    assert not works[0].ready()
    sent = []
    thread = threading.Thread(target=lambda: sent.append(channel.send(activation(3), [torch.ones(75_000)])))
    thread.start()
    stuck = fake.expect(Op.STUCK)
    assert (stuck[1], stuck[2], stuck[4], stuck[6]) == (Direction.ACTIVATION, 0, 1, 1)
    assert sent == []
    fake.record(Op.CONSUMED, position=0)
    assert fake.expect(Op.STUCK)[6] == 0
    record = fake.expect(Op.SEND)
    thread.join(10)
    assert record[5] == 900_480  # around the end
    assert fake.ring(Direction.ACTIVATION).read(900_480, 4) == b"ADm3"
    works[0].wait()
    for position in (600_320, 900_480):
        fake.record(Op.ACKED, position=position)
        fake.record(Op.CONSUMED, position=position)
    works[2].wait()
    sent[0].wait()
    first._pump.drain()
    assert channel.send(activation(4), []).ready() is False
    assert fake.expect(Op.SEND)[5] == 2 << 20  # an empty ring is filled from its start again


def test_a_message_names_the_earlier_one_of_its_key_until_that_is_consumed(fake_pair):
    first, fake = fake_pair()
    channel = first.channel(1)
    for _ in range(2):
        channel.send(activation(0), [])
    channel.send(activation(1), [])
    records = [fake.expect(Op.SEND) for _ in range(3)]
    assert [(r[5], r[8]) for r in records] == [(0, 0), (64, 1), (128, 0)]
    fake.record(Op.ACKED, position=0)
    third = channel.send(activation(0), [])
    assert fake.expect(Op.SEND)[8] == 65
    fake.record(Op.ACKED, position=64)
    fake.record(Op.ACKED, position=192)
    third.wait()
    channel.send(activation(0), [])
    # the newest one has arrived, which says nothing of those before: acknowledgements come in any order
    assert fake.expect(Op.SEND)[8] == 193
    fake.record(Op.CONSUMED, position=256)  # now all of them must have been delivered
    until(heard(first, lambda: activation(0) not in first._links[1].sending[Direction.ACTIVATION][0]._newest))
    channel.send(activation(0), [])
    assert fake.expect(Op.SEND)[8] == 0


def test_messages_arrive_in_any_order_in_the_mirror_and_in_the_peers_own_ring(fake_pair):
    first, fake = fake_pair()
    channel = first.channel(1)
    rings = [Memfd.create(1 << 20) for _ in Direction]
    fake.tell("memfds", [ring.fd for ring in rings], rank=1, direct=False)
    until(lambda: {"op": "mapped", "rank": 1} in fake.heard, "mapped")
    late, early = channel.recv(gradient(1)), channel.recv(gradient(0))
    end = (1 << 20) - 128  # over the end of the ring
    fake.deliver(gradient(1), torch.arange(100.0), 5 << 20, memfd=rings[1], flags=1)
    fake.deliver(gradient(0), torch.arange(100.0) + 1, end)
    assert early.wait().tensors[0].tolist() == list(range(1, 101))
    assert fake.expect(Op.RELEASE)[5] == end
    message = late.wait()
    assert message.tensors[0].tolist() == list(range(100))
    assert fake.expect(Op.RELEASE)[5] == 5 << 20
    rings[1].write(5 << 20, b"\xff" * 600)  # the room belongs to the peer again, the tensors to the caller
    assert message.tensors[0].tolist() == list(range(100))
    for ring in rings:
        ring.close()


def test_rings_of_a_peer_that_are_too_small_are_refused(fake_pair, caplog):
    _, fake = fake_pair()
    rings = [Memfd.create(1 << 20), Memfd.create(1 << 19)]
    fake.tell("memfds", [ring.fd for ring in rings], rank=1, direct=False)
    fake.tell("memfds", [rings[0].fd], rank=1, direct=False)
    until(lambda: caplog.text.count("cannot be mapped") == 2, "warning")
    assert "524288 bytes, 1048576 were announced" in caplog.text and "1 rings came, 2 were expected" in caplog.text
    assert not [m for m in fake.heard if m["op"] == "mapped"]
    for ring in rings:
        ring.close()


def test_the_oldest_gradient_is_absorbed_whatever_arrived_first(fake_pair):
    """And only while the peer says that it waits for room."""
    first, fake = fake_pair()
    channel = first.channel(1)
    works = [channel.recv(gradient(n)) for n in (0, 1)]
    for n in range(3):
        channel.send(activation(n), [torch.zeros(75_000)])
        fake.expect(Op.SEND)
    blocked = threading.Thread(target=lambda: channel.send(activation(3), [torch.zeros(75_000)]))
    blocked.start()
    fake.expect(Op.STUCK)
    second = 192  # after the header, the description and the payload of the first
    third = fake.deliver(gradient(1), torch.ones(10), second)
    assert fake.deliver(gradient(0), torch.ones(10), 0) == second
    fake.deliver(gradient(2), torch.ones(10), third)  # nobody has asked for it
    until(works[0].ready, "arrival")
    lane = first._links[1].receiving[Direction.GRADIENT][0]
    assert lane.counters.drained_early == 0
    fake.record(Op.PEER_STUCK, Direction.GRADIENT, total=1)
    assert [fake.expect(Op.RELEASE)[5] for _ in range(2)] == [0, second]
    until(lambda: lane.counters.drained_early == 2, "count")
    late = channel.recv(gradient(2))  # a receive posted late counts too
    assert fake.expect(Op.RELEASE)[5] == third
    until(lambda: lane.counters.drained_early == 3, "count")
    fake.record(Op.PEER_STUCK, Direction.GRADIENT, total=0)
    fake.deliver(gradient(3), torch.ones(10), 1 << 20)
    kept = channel.recv(gradient(3))
    until(kept.ready, "arrival")
    assert lane.counters.drained_early == 3
    fake.record(Op.CONSUMED, position=0)
    assert fake.expect(Op.STUCK)[6] == 0
    fake.expect(Op.SEND)
    blocked.join(10)
    for work in (*works, late, kept):
        assert work.wait().tensors[0].tolist() == [1.0] * 10
    assert fake.expect(Op.RELEASE)[5] == 1 << 20


def test_stats_of_a_busy_proxy_are_the_last_known(fake_pair, monkeypatch):
    from adaptra_plugin.transport import endpoint as endpoint_module

    first, fake = fake_pair()
    fake.tell("stats", id=0, data={"refused_connections": 7, "peers": {"1": {"retries": 3}}})
    until(lambda: first.stats()["refused_connections"] == 0, "an answer of its own")
    monkeypatch.setattr(endpoint_module, "STATS_DEADLINE_S", 0.05)
    monkeypatch.setattr(fake, "_command", lambda message, descriptors: None)
    fake.tell("stats", id=0, data={"refused_connections": 7, "peers": {"1": {"retries": 3}}})
    until(lambda: first.stats()["refused_connections"] == 7, "the last known")
    assert first.stats()["peers"][1]["retries"] == 3
    monkeypatch.undo()


def test_other_settings_of_a_peer_are_refused_before_anything_is_dialled():
    from dataclasses import replace

    from adaptra_plugin.errors import HandshakeError

    from .support import config, endpoint, info

    for change, says in (
        ({"connections": 3}, "connections_per_direction 3, this rank 2"),
        ({"protocol": 1}, f"protocol version 1, this rank {PROTOCOL}"),
    ):
        first = endpoint(0, config())
        try:
            with pytest.raises(HandshakeError, match=says) as caught:
                first.connect({1: (info(1), replace(first.endpoint_info, **change))}, neighbours=[1], coordinator=0)
            assert "rank 1 (stage 1, host n1)" in str(caught.value)
        finally:
            first.close()


def test_the_smaller_ring_counts():
    from .support import config, connect_line, endpoint

    endpoints = [endpoint(rank, config(ring_mib=1 + rank)) for rank in (0, 1)]
    try:
        assert connect_line(endpoints) == [None, None]
        assert endpoints[1].channel(0)._link.sending[Direction.GRADIENT][0].capacity == 1 << 20
        with pytest.raises(TransportError, match="more than the 1048576 bytes"):
            endpoints[1].channel(0).send(gradient(0), [torch.zeros(300_000)])
        for number in range(20):
            endpoints[1].channel(0).send(gradient(number), [torch.full((75_000,), float(number))])
            (got,) = endpoints[0].channel(1).recv(gradient(number)).wait().tensors
            assert got.unique().tolist() == [float(number)]
    finally:
        everywhere(*(e.close for e in endpoints))


def test_send_returns_at_once_with_much_queued():
    with line(2, ring_mib=72, proxy="process") as (first, second):
        channel = first.channel(1)
        big, small = torch.zeros(16 << 20, dtype=torch.uint8), torch.zeros(1024)
        for number in range(4):
            channel.send(activation(number), [big])
        taken = []
        for number in range(4, 204):
            start = time.perf_counter()
            channel.send(activation(number), [small])
            taken.append((time.perf_counter() - start) * 1e6)
        assert statistics.median(taken) < 400  # a quarter of that on an idle machine
        for number in range(204):
            second.channel(0).recv(activation(number)).wait()
