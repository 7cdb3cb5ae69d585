"""Sends in both directions that wait for each other, and what a full ring does to measured delays."""

import threading
import time

import pytest
import torch

from adaptra_plugin.config import SlowLink
from adaptra_plugin.transport import Endpoint, Message

from .support import activation, everywhere, gradient, heard, line, until

pytestmark = pytest.mark.usefixtures("either_way")

MESSAGE = torch.arange(300_000 // 8)  # 300 KB: three fill a ring of 1 MiB
COUNT = 40  # 12 MB: more than the rings hold


def lanes(endpoint: Endpoint, peer: int):
    return endpoint._links[peer]


def drained_early(endpoint: Endpoint, peer: int) -> int:
    return endpoint.stats()["peers"][peer]["directions"]["gradient"]["received"]["drained_early"]


@pytest.mark.parametrize(
    ("connections", "rail", "proxy"),
    [(1, "auto", "thread"), (2, "auto", "thread"), (2, "tcp", "thread"), (1, "auto", "process"), (1, "tcp", "process")],
)
def test_warm_ups_that_overflow_every_ring_do_not_deadlock(connections, rail, proxy):
    """Stage 0 sends all activations before it takes the first gradient; stage 1 answers each at once."""
    with line(2, connections_per_direction=connections, rail=rail, proxy=proxy, deadline_s=5.0) as (first, second):

        def earlier():
            works = [first.channel(1).recv(gradient(n)) for n in range(COUNT)]
            for n in range(COUNT):
                first.channel(1).send(activation(n), [MESSAGE + n], tag=n)
            for n, work in enumerate(works):
                message = work.wait()
                assert message.tag == 2 * n and message.delay_ms >= 0
                assert torch.equal(message.tensors[0], MESSAGE - n)
                assert work.wait() is message

        def later():
            works = [second.channel(0).recv(activation(n)) for n in range(COUNT)]
            for n, work in enumerate(works):
                assert torch.equal(work.wait().tensors[0], MESSAGE + n)
                second.channel(0).send(gradient(n), [MESSAGE - n], tag=2 * n)

        assert everywhere(earlier, later) == [None, None]
        assert 0 < drained_early(first, 1) < COUNT
        assert drained_early(second, 0) == 0
        for endpoint, peer in ((first, 1), (second, 0)):
            for lane in lanes(endpoint, peer).recv_lanes():
                assert not lane._held and not lane._arrived


def test_a_blocked_send_absorbs_only_what_is_asked_for():
    """So what it holds is bounded by the receives that are posted, whatever the peer sends."""
    with line(2, connections_per_direction=1) as (first, second):
        works = [first.channel(1).recv(gradient(n)) for n in range(2)]
        gradients = threading.Thread(
            target=lambda: [second.channel(0).send(gradient(n), [MESSAGE - n]) for n in range(COUNT)]
        )
        activations = threading.Thread(
            target=lambda: [first.channel(1).send(activation(n), [MESSAGE + n]) for n in range(COUNT)]
        )
        gradients.start()
        inbound = lanes(first, 1).receiving[gradient(0).direction][0]
        until(heard(first, lambda: inbound.peer_stuck), "full ring")
        assert drained_early(first, 1) == 0  # nobody is blocked
        activations.start()
        until(lambda: drained_early(first, 1) == 2, "absorption")
        until(lambda: inbound.peer_stuck and len(inbound._held) == 3, "full ring")
        works += [first.channel(1).recv(gradient(n)) for n in range(2, 5)]  # a receive posted late counts too
        until(lambda: drained_early(first, 1) == 5, "absorption")
        until(lambda: inbound.peer_stuck and len(inbound._held) == 3, "full ring")
        assert drained_early(first, 1) == 5
        for n in range(COUNT):
            assert torch.equal(second.channel(0).recv(activation(n)).wait().tensors[0], MESSAGE + n)
        activations.join(20)
        works += [first.channel(1).recv(gradient(n)) for n in range(5, COUNT)]
        for n, work in enumerate(works):
            assert torch.equal(work.wait().tensors[0], MESSAGE - n)
        gradients.join(20)
        assert not (gradients.is_alive() or activations.is_alive())
        assert drained_early(first, 1) == 5


def test_gradients_that_fit_their_ring_stay_in_it():
    with line(2, connections_per_direction=1) as (first, second):
        works = [first.channel(1).recv(gradient(n)) for n in range(3)]
        for n in range(3):
            second.channel(0).send(gradient(n), [MESSAGE - n])
        until(lambda: all(work.ready() for work in works), "gradients")
        sender = threading.Thread(
            target=lambda: [first.channel(1).send(activation(n), [MESSAGE]) for n in range(COUNT)]
        )
        sender.start()
        until(lambda: first.stats()["peers"][1]["directions"]["activation"]["sent"]["full"], "full ring")
        for n in range(COUNT):
            second.channel(0).recv(activation(n)).wait()
        sender.join(20)
        assert not sender.is_alive()
        assert drained_early(first, 1) == 0
        for n, work in enumerate(works):
            assert torch.equal(work.wait().tensors[0], MESSAGE - n)


def test_waiting_for_room_is_no_delay_of_the_link():
    """Each message holds its place in the sender's ring for the latency: the later ones wait for room, not longer."""
    latency_ms, count = 400.0, 7
    slow = SlowLink(src=0, dst=1, latency_ms=latency_ms)
    with line(2, links=[slow], connections_per_direction=1) as (first, second):
        works = [second.channel(0).recv(activation(n)) for n in range(count)]
        sender = threading.Thread(
            target=lambda: [first.channel(1).send(activation(n), [MESSAGE]) for n in range(count)]
        )
        sender.start()
        delays = [work.wait().delay_ms for work in works]
        sender.join(20)
        assert first.stats()["peers"][1]["directions"]["activation"]["sent"]["blocked_ms"] > latency_ms
        # stamped before the wait for room, the seventh would have taken two latencies at least
        assert all(latency_ms - 20 <= delay < 1.75 * latency_ms for delay in delays)


def test_a_slow_consumer_is_no_slow_link():
    """Whatever is staged has room at the receiver, so the wait for a consumer is the sender's, before it stages."""
    stall_s, count = 1.0, 20
    with line(2, connections_per_direction=1) as (first, second):
        works = [second.channel(0).recv(activation(n)) for n in range(count)]
        sender = threading.Thread(
            target=lambda: [first.channel(1).send(activation(n), [MESSAGE]) for n in range(count)]
        )
        sender.start()
        until(lambda: first.stats()["peers"][1]["directions"]["activation"]["sent"]["full"], "full ring")
        time.sleep(stall_s)
        delays = [work.wait().delay_ms for work in works]
        sender.join(20)
        assert not sender.is_alive()
        assert max(delays) < stall_s * 500


def test_a_moved_message_keeps_what_is_known_of_it():
    moved = Message((torch.ones(2),), 5, 1.5).to("meta")
    assert (moved.tensors[0].device.type, moved.tag, moved.delay_ms) == ("meta", 5, 1.5)
