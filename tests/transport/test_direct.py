"""Messages that pass the proxies by: when they do, what a broken path costs, and what a peer may say over it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time

import pytest
import torch

from adaptra_plugin.config import SlowLink
from adaptra_plugin.errors import PeerLostError, TransportError
from adaptra_plugin.transport import Direction, Endpoint, direct
from adaptra_plugin.transport.bridge import RECORD, Op
from adaptra_plugin.transport.direct import DirectPath
from adaptra_plugin.transport.event_pump import EventPump, Source, put
from adaptra_plugin.transport.frames import split
from adaptra_plugin.transport.memfd import Memfd
from adaptra_plugin.transport.tensors import describe

from .support import activation, config, connect_line, endpoint, everywhere, gradient, heard, line, until

SMALL = torch.arange(10)
MESSAGE_BYTES = 192  # of one with that tensor, at least


def delivered(end: Endpoint, peer: int) -> int:
    """Bytes that the proxies have carried to a peer."""
    return sum(rail["delivered_bytes"] for rail in end.stats()["peers"][peer]["rails"].values())


def is_direct(end: Endpoint, peer: int) -> bool:
    return all(lane.direct is not None for lane in end._links[peer].lanes())


def idle(end: Endpoint) -> None:
    """A thread waits there for something else: then there is time to tell others what room they have."""
    end._pump.wait(lambda: False, time.monotonic() + 0.001)


def break_path(end: Endpoint, peer: int, *, one_way: bool = False) -> None:
    """As if somebody had closed the descriptor; `one_way`: only the peer notices at once."""
    sock = end._links[peer]._path.sock
    if one_way:
        sock.send(b"")  # reads like an end
    else:
        sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("proxy", ["thread", "process"])
def test_the_proxies_carry_nothing_between_two_ranks_of_one_host(proxy):
    with line(3, proxy=proxy) as ends:
        for number in range(20):
            for rank in (0, 1):
                ends[rank].channel(rank + 1).send(activation(number, stage=rank + 1), [SMALL + number], tag=number)
                message = ends[rank + 1].channel(rank).recv(activation(number, stage=rank + 1)).wait()
                assert torch.equal(message.tensors[0], SMALL + number) and message.tag == number
                assert message.delay_ms == 0
        assert all(is_direct(ends[rank], peer) for rank, peer in ((0, 1), (1, 0), (1, 2), (2, 1)))
        assert max(delivered(ends[0], 1), delivered(ends[1], 2)) < MESSAGE_BYTES  # a word about the rings
        idle(ends[1])
        until(heard(ends[0], lambda: not any(len(lane.allocator) for lane in ends[0]._links[1].send_lanes())), "room")


def test_clocks_of_the_endpoints_count():
    with line(2, offsets={1: 1000.0}) as (first, second):
        first.channel(1).send(activation(0), [SMALL])
        message = second.channel(0).recv(activation(0)).wait()
        assert second._shared.clock() - 5 < message.came_s <= second._shared.clock()


@pytest.mark.parametrize("why", ["one end does not want it", "another rail", "a simulated link"])
def test_the_proxies_carry_what_does_not_go_directly(why):
    slow = [SlowLink(src=0, dst=1, latency_ms=1.0)] if why == "a simulated link" else []
    settings = [config(rail="tcp" if why == "another rail" else "auto"), config()]
    if why == "one end does not want it":
        settings[1] = config(direct=False)
    ends = []
    try:
        if slow:
            with line(2, links=slow) as pair:
                _through_proxies(pair)
            return
        ends = [endpoint(rank, settings[rank]) for rank in (0, 1)]
        assert connect_line(ends) == [None, None]
        _through_proxies(ends)
    finally:
        everywhere(*(end.close for end in ends))


def _through_proxies(ends) -> None:
    assert not is_direct(ends[0], 1) and not is_direct(ends[1], 0)
    ends[0].channel(1).send(activation(0), [SMALL]).wait()
    assert torch.equal(ends[1].channel(0).recv(activation(0)).wait().tensors[0], SMALL)


def test_a_slow_link_elsewhere_leaves_the_others_direct():
    with line(3, links=[SlowLink(src=0, dst=1, latency_ms=1.0)]) as ends:
        assert not is_direct(ends[1], 0) and is_direct(ends[1], 2) and is_direct(ends[2], 1)


@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("breaker", [0, 1])
@pytest.mark.parametrize("read", [0, 3, 12])
def test_a_broken_path_loses_and_doubles_nothing(breaker, read, one_way):
    """Messages in the socket, messages that have arrived and are not taken, messages that are taken and not heard of."""
    count = 12
    with line(2) as ends:
        first, second = ends
        works = [second.channel(0).recv(activation(number)) for number in range(count)]
        for number in range(count):
            first.channel(1).send(activation(number), [SMALL + number])
        if read:
            until(works[read - 1].ready, "arrival")
        taken = [work.wait().tensors[0] for work in works[: read // 2]]
        break_path(ends[breaker], 1 - breaker, one_way=one_way)
        links = [first._links[1], second._links[0]]
        until(lambda: [end._pump.drain() for end in ends] and all(it.path_ended for it in links), "end of the path")
        assert not is_direct(first, 1) and not is_direct(second, 0)
        taken += [work.wait().tensors[0] for work in works[read // 2 :]]
        for number, tensor in enumerate(taken):
            assert torch.equal(tensor, SMALL + number)
        for lane in first._links[1].send_lanes():
            until(heard(first, lambda lane=lane: idle(second) or not len(lane.allocator)), "room of all")
        for number in range(count, count + 4):  # and from now on
            first.channel(1).send(activation(number), [SMALL + number])
            second.channel(0).send(gradient(number), [SMALL - number])
            assert torch.equal(second.channel(0).recv(activation(number)).wait().tensors[0], SMALL + number)
            assert torch.equal(first.channel(1).recv(gradient(number)).wait().tensors[0], SMALL - number)
        lanes = [lane for end, peer in ((first, 1), (second, 0)) for lane in end._links[peer].recv_lanes()]
        assert not any(lane._held or lane._arrived or lane._posted for lane in lanes)
        assert sum(lane.counters.messages for lane in lanes) == count + 8


def test_a_path_that_breaks_again_and_again_in_a_storm_of_both_directions():
    """Each pair of ends breaks at another moment; what comes is compared with what was sent."""
    for moment in range(6):
        with line(2, ring_mib=1, connections_per_direction=1) as (first, second):
            data = torch.arange(20_000)

            def traffic(end, other, mine, theirs, breaks, data=data):
                works = [end.channel(other).recv(theirs(number)) for number in range(24)]
                for number in range(24):
                    if breaks and number == 4 * breaks:
                        break_path(end, other)
                    end.channel(other).send(mine(number), [data + number], tag=number)
                for number, work in enumerate(works):
                    message = work.wait()
                    assert message.tag == number and torch.equal(message.tensors[0], data + number)

            errors = everywhere(
                lambda moment=moment: traffic(first, 1, activation, gradient, moment),
                lambda: traffic(second, 0, gradient, activation, 0),
            )
            assert errors == [None, None]


def test_a_producer_that_waits_for_room_says_so_again_when_the_path_breaks():
    """Both ends are blocked in a send; only what they drain early makes room, and they drain for a peer that is known to wait."""
    with line(2, connections_per_direction=1, deadline_s=10.0) as (first, second):
        big = torch.arange(300_000 // 8)

        def traffic(end, other, mine, theirs):
            works = [end.channel(other).recv(theirs(number)) for number in range(16)]
            for number in range(16):
                if number == 8 and end is first:
                    break_path(end, other)
                end.channel(other).send(mine(number), [big + number])
            for number, work in enumerate(works):
                assert torch.equal(work.wait().tensors[0], big + number)

        errors = everywhere(
            lambda: traffic(first, 1, activation, gradient), lambda: traffic(second, 0, gradient, activation)
        )
        assert errors == [None, None]


def test_a_full_socket_blocks_until_the_peer_reads_and_blocks_nobody_for_ever(monkeypatch: pytest.MonkeyPatch):
    """Both send more than the sockets take before either one reads."""
    count, blocked = 200, []
    monkeypatch.setattr(direct, "_BUFFER_BYTES", 4096)
    monkeypatch.setattr(direct, "put", lambda *arguments: blocked.append(arguments) or put(*arguments))
    with line(2, ring_mib=4, connections_per_direction=1) as (first, second):
        both = threading.Barrier(2)

        def traffic(end, other, mine, theirs):
            both.wait()
            for number in range(count):
                end.channel(other).send(mine(number), [SMALL], tag=number)
            for number in range(count):
                assert end.channel(other).recv(theirs(number)).wait().tag == number

        errors = everywhere(
            lambda: traffic(first, 1, activation, gradient), lambda: traffic(second, 0, gradient, activation)
        )
        assert errors == [None, None]
        assert len(blocked) > 10


def test_news_of_room_never_blocks_and_comes_when_there_is_time():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    bell, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pump = EventPump(bell, lambda packet: None)
    path = DirectPath(near, 0, pump, 5.0, 1 << 18)
    pump.add(Source(near, lambda packet: None, flush=path.flush))
    try:
        for position in range(5000):
            path.consumed(0, 0, position * 64, 64, urgent=True)
        assert path._late  # more than the socket holds
        got: list[int] = []
        far.setblocking(False)

        def read() -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    got.extend(record[5] for record in RECORD.iter_unpack(far.recv(1 << 16)))
            return len(got) == 5000

        until(lambda: pump.wait(read, time.monotonic() + 0.05), "all news")
        assert got == [position * 64 for position in range(5000)]
    finally:
        pump.close()
        path.close()
        far.close()
        other.close()


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ((Op.ARRIVED, 0, 9, 1, 0, 0, 200, 0.0, 0), "connection 9"),
        ((Op.ARRIVED, 7, 0, 1, 0, 0, 200, 0.0, 0), "direction 7"),
        ((Op.ARRIVED, 0, 0, 1, 5, 0, 200, 0.0, 0), "rank 5"),
        ((Op.SEND, 0, 0, 1, 0, 0, 200, 0.0, 0), "op 1 came"),
        ((Op.LOST, 0, 0, 1, 0, 0, 200, 0.0, 0), "op 20 came"),
        ((99, 0, 0, 1, 0, 0, 200, 0.0, 0), "op 99 came"),
        ((Op.ARRIVED, 0, 0, 1, 0, 1 << 63, 200, 0.0, 0), "starts with"),
        ((Op.ARRIVED, 0, 0, 1, 0, 0, 1 << 62, 0.0, 0), "does not fit"),
    ],
)
def test_nonsense_of_a_peer_ends_that_link_only(record, says):
    with line(3) as ends:
        ends[0]._links[1]._path.sock.send(RECORD.pack(*record))
        work = ends[1].channel(0).recv(activation(0))
        with pytest.raises(TransportError, match="malformed message") as caught:
            work.wait()
        assert says in str(caught.value)
        ends[1].channel(2).send(activation(0, stage=2), [SMALL])
        assert torch.equal(ends[2].channel(1).recv(activation(0, stage=2)).wait().tensors[0], SMALL)


def test_a_packet_that_holds_no_whole_record_ends_the_link():
    with line(2) as (first, second):
        first._links[1]._path.sock.send(struct.pack("<I", 7))
        with pytest.raises(TransportError, match="malformed message"):
            second.channel(0).recv(activation(0)).wait()


def test_a_message_that_came_twice_is_refused():
    with line(2, connections_per_direction=1) as (first, second):
        path = first._links[1]._path
        for number in range(3):
            first.channel(1).send(activation(number), [SMALL])
            second.channel(0).recv(activation(number)).wait()
        path.arrived(0, 0, 0, 192)  # long ago
        with pytest.raises(TransportError, match="a message at 0 came after one at"):
            second.channel(0).recv(activation(9)).wait()


def test_the_last_message_of_a_peer_that_leaves_at_once_is_received():
    for _ in range(10):
        with line(2) as (first, second):
            works = [second.channel(0).recv(activation(number)) for number in range(20)]
            for number in range(20):
                first.channel(1).send(activation(number), [SMALL + number])
            first.close()
            late = second.channel(0).recv(activation(20))
            with pytest.raises(PeerLostError, match="has ended"):
                late.wait()
            for number, work in enumerate(works):
                assert torch.equal(work.wait().tensors[0], SMALL + number)


def test_a_killed_peer_is_lost_and_what_it_had_sent_stays(monkeypatch: pytest.MonkeyPatch):
    ready, go = os.pipe(), os.pipe()
    settings = config(proxy="process", reconnect_s=0.5)
    addresses = [os.pipe(), os.pipe()]
    child = os.fork()
    if child == 0:
        try:
            _play(1, settings, addresses, ready[1], go[0])
        finally:
            os._exit(1)
    first = endpoint(0, settings)
    try:
        _connect(first, 0, addresses)
        os.read(ready[0], 1)
        works = [first.channel(1).recv(gradient(number)) for number in range(5)]
        os.kill(child, 9)
        os.waitpid(child, 0)
        with pytest.raises(PeerLostError, match="rank 1"):
            first.channel(1).recv(gradient(5)).wait()
        assert [work.wait().tag for work in works] == list(range(5))
    finally:
        first.close()
        for pipe in (ready, go, *addresses):
            for fd in pipe:
                os.close(fd)


def _connect(end: Endpoint, rank: int, addresses) -> None:
    from adaptra_plugin.transport import EndpointInfo

    from .support import info

    text = end.endpoint_info.to_text().encode()
    os.write(addresses[rank][1], struct.pack("<I", len(text)) + text)
    (length,) = struct.unpack("<I", os.read(addresses[1 - rank][0], 4))
    other = EndpointInfo.parse(os.read(addresses[1 - rank][0], length).decode())
    peer = info(1 - rank)
    end.connect({1 - rank: (type(peer)(1 - rank, 1 - rank, "n"), other)}, neighbours=[1 - rank], coordinator=0)
    assert is_direct(end, 1 - rank)


def _play(rank: int, settings, addresses, ready: int, go: int) -> None:
    """The other process: sends, and is killed."""
    end = endpoint(rank, settings)
    _connect(end, rank, addresses)
    for number in range(5):
        end.channel(0).send(gradient(number), [SMALL], tag=number)
    os.write(ready, b"x")
    os.read(go, 1)


def test_a_pair_that_came_before_makes_way_and_room_is_told_where_messages_come_from(fake_pair):
    """The exchange of rings may be made twice before the links stand; and the peer may go directly where this rank does not."""
    first, fake = fake_pair()
    channel = first.channel(1)
    rings = [Memfd.create(1 << 20) for _ in Direction]
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for mine, _ in pairs:
        before = len([told for told in fake.heard if told["op"] == "mapped"])
        fake.tell("memfds", [*(ring.fd for ring in rings), mine.fileno()], rank=1, direct=True)
        until(lambda before=before: len([t for t in fake.heard if t["op"] == "mapped"]) > before, "mapped")
    far = pairs[1][1]
    far.settimeout(10)
    position = 0
    for number in range(3):
        meta, payload = describe([SMALL])
        (part,) = split(gradient(number), 0, 1, len(meta), payload, payload)
        raw = part.pack() + meta + SMALL.numpy().tobytes().ljust(payload, b"\0")
        rings[Direction.GRADIENT].write(position, raw)
        far.send(RECORD.pack(Op.ARRIVED, Direction.GRADIENT, 0, 1, 1, position, len(raw), 0.0, 0))
        assert torch.equal(channel.recv(gradient(number)).wait().tensors[0], SMALL)
        first._links[1].flush()
        (record,) = RECORD.iter_unpack(far.recv(4096))
        assert (record[0], record[1], record[5]) == (Op.CONSUMED, Direction.GRADIENT, position)
        position += len(raw)
    channel.send(activation(0), [SMALL])
    assert fake.expect(Op.SEND)[5] == 0  # this rank was not told that it may go directly
    for ring in rings:
        ring.close()
    for mine, theirs in pairs:
        mine.close()
        theirs.close()


class Failing:
    """A socket that fails to send, once."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.failures = 1

    def send(self, data: bytes) -> int:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOBUFS, "no buffer space")
        return self._sock.send(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


def test_a_record_that_does_not_go_out_ends_the_path_and_nothing_is_left_out():
    with line(2, connections_per_direction=1) as (first, second):
        path = first._links[1]._path
        works = [second.channel(0).recv(activation(number)) for number in range(6)]
        for number in range(6):
            if number == 2:
                path.sock = Failing(path.sock)
            first.channel(1).send(activation(number), [SMALL + number])
        for number, work in enumerate(works):
            until(lambda work=work: first._pump.drain() or work.ready(), "arrival")
            assert torch.equal(work.wait().tensors[0], SMALL + number)
        assert first._links[1].path_ended
        (lane,) = [lane for lane in first._links[1].send_lanes() if lane.direction == Direction.ACTIVATION]
        until(heard(first, lambda: idle(second) or not len(lane.allocator)), "room of all")


def test_free_room_is_not_held_back_until_it_is_much():
    """The receiver reads nothing after it has taken the messages, and says nothing else."""
    with line(2, ring_mib=1, connections_per_direction=1) as (first, second):
        (lane,) = [lane for lane in first._links[1].send_lanes() if lane.direction == Direction.ACTIVATION]
        for number in range(8):
            first.channel(1).send(activation(number), [torch.zeros(5000)])
        for number in range(8):
            second.channel(0).recv(activation(number)).wait()
        until(heard(first, lambda: len(lane.allocator) < 8), "room of some")


def test_a_message_that_no_ring_of_that_size_could_hold_is_refused():
    with line(2, ring_mib=1, connections_per_direction=1) as (first, second):
        first.channel(1).send(activation(0), [SMALL])
        until(heard(second, lambda: second._links[0].receiving[0][0]._held), "arrival")
        second._links[0].receiving[0][0].remote.memfd.write(
            1 << 20, second._links[0].receiving[0][0].remote.memfd.read(0, 192)
        )
        first._links[1]._path.arrived(Direction.ACTIVATION, 0, 1 << 20, 192)
        with pytest.raises(TransportError, match="does not fit into a ring"):
            second.channel(0).recv(activation(1)).wait()
