"""Connecting, control messages, closing: what is reported, and that nothing is left behind."""

import gc
import json
import logging
import os
import threading
import time
from dataclasses import replace

import pytest
import torch

from adaptra_plugin.errors import PeerLostError, TransportError
from adaptra_plugin.transport import Address, Direction, Endpoint, EndpointInfo, Key, PeerInfo
from adaptra_plugin.transport import endpoint as endpoint_module
from adaptra_plugin.transport.bind import choose_bind, listen, local_address_towards

from .conftest import open_descriptors, our_threads
from .support import SECRET, activation, config, connect_line, endpoint, everywhere, info, line, table, until


def test_texts_of_names():
    key = Key(7, Direction.ACTIVATION, 2, 3)
    assert str(key) == "activation of microbatch 3 to stage 2 (step 7)"
    assert str(Key(0, Direction.GRADIENT, 0, 1)) == "gradient of microbatch 1 to stage 0 (step 0)"
    assert str(PeerInfo(2, 1, "n1")) == "rank 2 (stage 1, host n1)"


@pytest.mark.parametrize("address", [Address("10.0.0.1", 80), Address("fe80::1", 4711), Address("n1.example", 65535)])
def test_addresses_print_and_parse(address):
    assert Address.parse(address.to_text()) == address


@pytest.mark.parametrize("text", ["", "host", ":1", "host:", "host:0", "host:65536", "host:-1", "host:x"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(TransportError, match="is not an address"):
        Address.parse(text)


ENDPOINT_INFO = EndpointInfo(
    addresses=(Address("10.0.0.1", 80), Address("fe80::1", 4711)),
    ring_bytes=1 << 20,
    connections=2,
    boot="4a5c",
    unix="adaptra-1",
    rdma=({"device": "mlx5_0", "gid": "fe80::1"},),
)


def test_cards_print_and_parse():
    assert EndpointInfo.parse(ENDPOINT_INFO.to_text()) == ENDPOINT_INFO
    plain = EndpointInfo((Address("n1", 1),), 4096, 1)
    assert EndpointInfo.parse(plain.to_text()) == plain
    assert str(ENDPOINT_INFO) == "10.0.0.1:80, [fe80::1]:4711"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("addresses", [], "addresses"),
        ("addresses", ["x"], "is not an address"),
        ("addresses", "n1:80", "addresses"),
        ("ring_bytes", 0, "ring_bytes 0"),
        ("ring_bytes", 5000, "ring_bytes 5000"),
        ("ring_bytes", True, "ring_bytes True"),
        ("connections", 0, "connections 0"),
        ("connections", 99, "connections 99"),
        ("boot", None, "boot None"),
        ("unix", 3, "unix 3"),
        ("rdma", ["x"], "rdma"),
        ("protocol", 1, "speaks protocol version 1, this side 4: install the same release"),
    ],
)
def test_what_is_no_card_is_refused(field, value, says):
    with pytest.raises(TransportError, match=says):
        EndpointInfo.parse(json.dumps(json.loads(ENDPOINT_INFO.to_text()) | {field: value}))


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "3", "null"])
def test_what_is_no_json_object_is_no_card(text):
    with pytest.raises(TransportError, match="the info of an endpoint is no"):
        EndpointInfo.parse(text)


def test_bind_address_configured_given_routed(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert choose_bind("10.1.2.3", "127.0.0.1") == "10.1.2.3"
    assert choose_bind("auto", "127.0.0.2") == "127.0.0.2"
    assert choose_bind("auto", None) == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert choose_bind("auto", None) in ("127.0.0.1", "::1")
    assert local_address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(TransportError, match=r"no local address leads to 'no\.such\.host\.invalid'"):
        local_address_towards("no.such.host.invalid")
    with pytest.raises(TransportError, match=r"cannot listen on '192\.0\.2\.1'.*adaptra\.transport\.bind"):
        listen("192.0.2.1", 1)


def test_a_wildcard_bind_publishes_an_address_that_peers_can_dial(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    e = Endpoint(info(0), config(bind="0.0.0.0"), SECRET)
    try:
        assert e.address.host == "127.0.0.1" and e.address.port > 0
    finally:
        e.close()


def test_connections_over_ipv6():
    endpoints = [Endpoint(PeerInfo(r, r, "n"), config(), SECRET, bind_host="::1") for r in (0, 1)]
    try:
        assert connect_line(endpoints) == [None, None]
        endpoints[0].channel(1).send(activation(0), [torch.ones(1)])
        endpoints[1].channel(0).recv(activation(0)).wait()
    finally:
        everywhere(*(e.close for e in endpoints))


def test_missing_peers_are_named_with_the_reason():
    first = endpoint(0, config(connect_deadline_s=0.3))
    silent = listen("127.0.0.1", 8)  # it accepts, and says nothing
    port = silent.getsockname()[1]
    try:
        endpoint_info = replace(first.endpoint_info, addresses=(Address("127.0.0.1", port),), boot="another host")
        peers = {0: (first.me, first.endpoint_info), 1: (info(1), endpoint_info), 2: (info(2), endpoint_info)}
        with pytest.raises(TransportError) as caught:
            first.connect(peers, neighbours=[1], coordinator=2)
        text = str(caught.value)
        assert "rank 0 is not connected after 0.3 s" in text
        assert f"rank 1 (stage 1, host n1) at 127.0.0.1:{port} (2 connections missing" in text
        assert f"rank 2 (stage 2, host n2) at 127.0.0.1:{port} (1 connections missing" in text
        assert "no answer yet" in text and "adaptra.transport.connect_deadline_s" in text
    finally:
        first.close()
        silent.close()


def test_who_is_missing_is_said_while_it_is_waited_for(caplog, monkeypatch):
    monkeypatch.setattr(endpoint_module, "REMIND_S", 0.05)
    first, second = (endpoint(rank, config()) for rank in (0, 1))
    try:
        waiting = threading.Thread(target=lambda: first.connect(table([first, second]), neighbours=[1], coordinator=0))
        waiting.start()
        until(lambda: sum("still not connected" in line for line in caplog.messages) >= 2, "reminders")
        line = next(line for line in caplog.messages if "still not connected" in line)
        assert line.startswith("rank 0 is still not connected; missing: rank 1 (stage 1, host n) at 127.0.0.1:")
        second.connect(table([first, second]), neighbours=[0], coordinator=0)
        waiting.join(20)
        assert not waiting.is_alive()
    finally:
        everywhere(first.close, second.close)


def test_descriptors_that_found_no_room_in_the_proxy_are_an_error(monkeypatch):
    monkeypatch.setattr(endpoint_module.Link, "descriptors", lambda link: [])  # the kernel has dropped them
    first = endpoint(0, config())
    try:
        with pytest.raises(TransportError, match=r"cannot take 8 rings \(.*RLIMIT_NOFILE"):
            first.connect({**table([first]), 1: (info(1), first.endpoint_info)}, neighbours=[1], coordinator=0)
    finally:
        first.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_has_ended_before_it_was_connected_is_found_at_once(rank):
    """Rank 1 dials, rank 0, the coordinator, waits to be dialled: either finds out by itself."""
    ends = [endpoint(number, config()) for number in (0, 1)]
    peers = {end.me.rank: (end.me, replace(end.endpoint_info, boot=f"host {end.me.rank}")) for end in ends}
    ends[1 - rank].close()
    try:
        begun = time.monotonic()
        with pytest.raises(PeerLostError, match=rf"rank {1 - rank} .*nothing listens at"):
            ends[rank].connect(peers, neighbours=[1 - rank], coordinator=0)
        assert time.monotonic() - begun < 10
    finally:
        ends[rank].close()


def test_a_rank_that_starts_late_is_waited_for():
    endpoints = [endpoint(rank, config()) for rank in range(3)]
    peers = table(endpoints)

    def connect(e, pause):
        time.sleep(pause)
        e.connect(peers, neighbours=[r for r in (e.me.rank - 1, e.me.rank + 1) if r in peers], coordinator=0)

    try:
        errors = everywhere(*(lambda e=e, p=p: connect(e, p) for e, p in zip(endpoints, (0.3, 0.0, 0.15), strict=True)))
        assert errors == [None] * 3
    finally:
        everywhere(*(e.close for e in endpoints))


def test_a_peer_that_gives_up_while_others_connect_is_reported_at_once():
    endpoints = [endpoint(rank, config()) for rank in range(3)]
    peers = table(endpoints)
    try:

        def give_up():
            time.sleep(0.2)  # rank 1 has connected to rank 0 by then, rank 2 never comes
            endpoints[1].close()

        start = time.monotonic()
        errors = everywhere(
            lambda: endpoints[0].connect(peers, neighbours=[1], coordinator=0),
            lambda: endpoints[1].connect(peers, neighbours=[0, 2], coordinator=0),
            give_up,
        )
        assert time.monotonic() - start < 10
        assert isinstance(errors[0], PeerLostError) and "rank 1 (stage 1, host n) was lost while connecting" in str(
            errors[0]
        )
        assert isinstance(errors[1], TransportError)
    finally:
        everywhere(*(e.close for e in endpoints))


def test_connect_checks_its_arguments(caplog):
    first = endpoint(0, config(connect_deadline_s=0.1))
    try:
        with pytest.raises(TransportError, match=r"no address is known for ranks \[1, 2\]"):
            first.connect(table([first]), neighbours=[1, 2], coordinator=0)
    finally:
        first.close()
    second = endpoint(0, config(connect_deadline_s=0.1))
    try:
        elsewhere = PeerInfo(1, 1, "another")
        with pytest.raises(TransportError, match="missing"):
            endpoint_info = replace(second.endpoint_info, addresses=(Address("127.0.0.1", 9),))
            second.connect({1: (elsewhere, endpoint_info)}, neighbours=[1], coordinator=0)
        assert "which only its own host reaches: set adaptra.transport.bind there" in caplog.text
        with pytest.raises(TransportError, match="connect was called twice"):
            second.connect({}, neighbours=[], coordinator=0)
    finally:
        second.close()


def test_a_rank_without_neighbours():
    with line(1) as (only,):
        assert only.stats() == {"refused_connections": 0, "peers": {}}
        with pytest.raises(TransportError, match=r"rank 1 is no neighbour of rank 0"):
            only.channel(1)


@pytest.mark.parametrize("proxy", ["thread", "process"])
def test_both_directions_of_both_kinds_between_two_ranks(proxy):
    """Interleaved schedules send activations both ways between the same two ranks."""
    with line(2, proxy=proxy) as (first, second):
        keys = [Key(0, d, stage, m) for d in Direction for stage in (0, 1) for m in range(4)]
        for e, peer in ((first, 1), (second, 0)):
            for key in keys:
                e.channel(peer).send(key, [torch.tensor(e.me.rank)])
        for e, peer in ((first, 1), (second, 0)):
            for key in keys:
                assert e.channel(peer).recv(key).wait().tensors[0].item() == peer


# --- control messages


@pytest.mark.parametrize("proxy", ["thread", "process"])
def test_control_messages_go_to_and_from_the_coordinator_in_order(proxy):
    with line(4, proxy=proxy) as endpoints:
        heard = {e.me.rank: [] for e in endpoints}
        for e in endpoints:
            e.on_control = lambda rank, message, mine=heard[e.me.rank]: mine.append((rank, message))
        for number in range(50):
            endpoints[3].send_control(0, {"n": number, "text": "ü" * 100})
            endpoints[0].send_control(3, {"n": number})
            endpoints[0].send_control(1, {"n": number})
        until(lambda: len(heard[0]) == len(heard[3]) == len(heard[1]) == 50, "messages")
        assert heard[0] == [(3, {"n": n, "text": "ü" * 100}) for n in range(50)]
        assert heard[3] == heard[1] == [(0, {"n": n}) for n in range(50)]
        assert heard[2] == []


def test_large_control_messages_and_limits():
    with line(2) as (first, second):
        heard = []
        second.on_control = lambda rank, message: heard.append(message)
        big = {"x": "a" * (3 << 20)}
        first.send_control(1, big)
        first.send_control(1, {"last": True})
        until(lambda: len(heard) == 2, "messages")
        assert heard == [big, {"last": True}]
        with pytest.raises(TransportError, match=r"\['x'\] has 5242888 bytes; at most 4194304 fit"):
            first.send_control(1, {"x": "a" * (5 << 20)})
        with pytest.raises(TransportError, match="is not JSON"):
            first.send_control(1, {"x": object()})
        with pytest.raises(TransportError, match="is a dict, not list"):
            first.send_control(1, [1])


def test_control_messages_between_others_are_refused():
    with line(3) as (_, second, _), pytest.raises(TransportError, match="no control connection with rank 2"):
        second.send_control(2, {})


def test_control_messages_for_a_peer_that_does_not_read_are_bounded(monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_CONTROL_BACKLOG", 1 << 20)
    with line(2) as (first, second):
        go_on = threading.Event()
        second.on_control = lambda rank, message: go_on.wait(20)
        try:
            with pytest.raises(
                TransportError, match=r"bytes of control messages wait for rank 1: it has stopped reading"
            ):
                for _ in range(200):
                    first.send_control(1, {"x": "a" * (1 << 20)})
                    time.sleep(0.001)
        finally:
            go_on.set()


def test_control_messages_to_a_peer_that_has_left_are_dropped():
    with line(2) as (first, second):
        second.close()
        until(lambda: first._links[1].sending[0][0].loss, "goodbye")
        for _ in range(10):
            first.send_control(1, {"a": 1})


# --- closing


@pytest.mark.parametrize("proxy", ["thread", "process"])
def test_close_is_idempotent_and_ends_every_wait(proxy):
    with line(2, proxy=proxy) as (first, _):
        work = first.channel(1).recv(activation(0))
        waiting = []

        def wait():
            try:
                work.wait()
            except TransportError as error:
                waiting.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        first.close()
        first.close()
        thread.join(10)
        assert waiting == ["the endpoint of rank 0 is closed"]
        for call in (work.wait, lambda: first.channel(1).send(activation(1), []), lambda: first.send_control(1, {})):
            with pytest.raises(TransportError, match=r"rank 0 is closed"):
                call()


def test_close_from_a_callback_does_not_deadlock():
    with line(2) as (first, second):
        second.on_control = lambda rank, message: second.close()
        first.send_control(1, {})
        until(lambda: not second._thread.is_alive(), "end of the thread")


@pytest.mark.parametrize("proxy", ["thread", "process"])
def test_closing_at_the_same_time_is_quick_and_silent(proxy, caplog):
    caplog.set_level(logging.WARNING, "adaptra.transport")
    with line(4, proxy=proxy) as endpoints:
        for e in endpoints[:-1]:
            for number in range(4):
                e.channel(e.me.rank + 1).send(activation(number), [torch.zeros(50_000)])
        start = time.monotonic()
        assert everywhere(*(e.close for e in endpoints)) == [None] * 4
        assert time.monotonic() - start < 3
    assert caplog.text == ""


@pytest.mark.parametrize(("proxy", "rounds"), [("thread", 10), ("process", 3)])
def test_threads_and_descriptors_do_not_leak(proxy, rounds):
    def once():
        with line(3, connections_per_direction=2, proxy=proxy) as (first, second, third):
            first.channel(1).send(activation(0), [torch.ones(10)])
            second.channel(0).recv(activation(0)).wait()
            third.send_control(0, {})

    once()
    gc.collect()
    before = open_descriptors()
    for _ in range(rounds):
        once()
    until(lambda: not our_threads(), "end of the threads")
    gc.collect()
    assert len(open_descriptors()) <= len(before)
    assert len(endpoint_module._live) == 0


def test_the_threads_have_names():
    with line(1):
        assert sorted(our_threads()) == ["adaptra-control-0", "adaptra-proxy-0"]
    with line(1, proxy="process"):
        assert our_threads() == ["adaptra-control-0"]


@pytest.mark.parametrize("proxy", ["thread", "process"])
def test_a_forked_child_lets_go_of_the_sockets_and_leaves_the_parent_alone(proxy):
    with line(2, proxy=proxy) as (first, second):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                sockets = open_descriptors()
                try:
                    first.channel(1).send(activation(0), [])
                except TransportError as error:
                    os.write(write_end, f"{len(sockets)} {error}".encode())
                    code = 0
                first.close()
            finally:
                os._exit(code)
        os.close(write_end)
        text = os.read(read_end, 4096).decode()
        os.close(read_end)
        assert os.waitpid(pid, 0)[1] == 0
        assert text.startswith("0 this endpoint belongs to the parent process")
        first.channel(1).send(activation(0), [torch.ones(1)])
        second.channel(0).recv(activation(0)).wait()
