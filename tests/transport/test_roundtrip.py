"""What goes in comes out: any dtype, any shape, any layout, in any order of asking."""

import random
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport import Direction, Key
from adaptra_plugin.transport.tensors import _DTYPES

from .support import activation, gradient, line

DTYPES = [dtype for dtype in _DTYPES.values() if dtype != torch.complex32]


@pytest.fixture(
    scope="module",
    params=[("thread", "directly"), ("thread", "tcp"), ("process", "directly"), ("process", "shm"), ("process", "tcp")],
    ids=lambda param: "-".join(param),
)
def pair(request):
    """Messages by reference to shared memory, and in pieces over TCP, which wrap around in the receive ring as in the ring."""
    proxy, way = request.param
    rail = {"directly": "auto"}.get(way, way)
    with line(2, proxy=proxy, rail=rail, direct=way == "directly", segment_kib=64) as endpoints:
        yield endpoints


@pytest.fixture(autouse=True)
def _nothing_leaks():
    """The endpoints of this module live from test to test; `test_lifecycle` looks for leaks."""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, NaNs included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = 1
    for size in shape:
        count *= size
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


tensors = st.builds(
    random_tensor,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 7), max_size=5).map(tuple),
    st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(tensors, max_size=5), st.integers(-(2**63), 2**63 - 1), st.integers(0, 9), st.sampled_from(Direction))
def test_any_tensors(pair, sent, tag, microbatch, direction):
    key = Key(1, direction, 1, microbatch)
    pair[0].channel(1).send(key, sent, tag)
    message = pair[1].channel(0).recv(key).wait()
    assert message.tag == tag
    assert message.delay_ms >= 0
    assert len(message.tensors) == len(sent)
    assert all(same(a, b) for a, b in zip(sent, message.tensors, strict=True))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6).t(),
        torch.arange(24.0)[::3],
        torch.ones(3, 1).expand(3, 5),
        torch.arange(60).reshape(3, 4, 5).permute(2, 0, 1),
        torch.randn(4, 4, dtype=torch.complex64).conj(),
        torch.randn(4, 4, dtype=torch.complex64).imag,
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.ones(2, 2, requires_grad=True),
        torch.nn.Parameter(torch.ones(3)),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    ids=[
        "transposed",
        "strided",
        "expanded",
        "permuted",
        "conjugated",
        "imaginary",
        "scalar",
        "empty",
        "requires_grad",
        "parameter",
        "channels_last",
    ],
)
def test_layouts(pair, tensor):
    key = gradient(0, step_id=2)
    pair[1].channel(0).send(key, [tensor])
    (got,) = pair[0].channel(1).recv(key).wait().tensors
    assert same(tensor, got)
    assert not got.requires_grad
    assert got.is_contiguous()


def test_the_tensor_may_be_overwritten_after_send_and_the_received_one_is_the_callers(pair):
    key = activation(0, step_id=3)
    x = torch.zeros(1000)
    for number in range(5):
        x.fill_(number)
        pair[0].channel(1).send(key, [x])
    x.fill_(-1)
    got = [pair[1].channel(0).recv(key).wait().tensors[0] for _ in range(5)]
    got[0].add_(100)  # writable, and nobody else's memory
    assert [int(t[0]) for t in got] == [100, 1, 2, 3, 4]


def test_receives_are_matched_by_key_in_whatever_order_they_are_posted(pair):
    keys = [activation(m, step_id=4) for m in range(12)]
    random.Random(0).shuffle(keys)
    works = {key: pair[1].channel(0).recv(key) for key in keys[:6]}
    for key in sorted(keys, key=lambda k: k.microbatch):
        pair[0].channel(1).send(key, [torch.tensor(key.microbatch)], tag=key.microbatch)
    works |= {key: pair[1].channel(0).recv(key) for key in keys[6:]}
    for key in keys:
        message = works[key].wait()
        assert (int(message.tensors[0]), message.tag) == (key.microbatch, key.microbatch)
    assert works[keys[0]].wait() is works[keys[0]].wait()


def test_messages_of_one_key_arrive_in_order_and_both_ways_at_once(pair):
    def talk(here, there, key):
        for number in range(200):
            here.channel(there).send(key, [torch.full((100,), number)], tag=number)

    threads = [
        threading.Thread(target=talk, args=(pair[0], 1, activation(3, step_id=5))),
        threading.Thread(target=talk, args=(pair[1], 0, activation(3, step_id=5))),
    ]
    for thread in threads:
        thread.start()
    for number in range(200):
        for here, there in ((pair[0], 1), (pair[1], 0)):
            message = here.channel(there).recv(activation(3, step_id=5)).wait()
            assert message.tag == number == int(message.tensors[0][99])
    for thread in threads:
        thread.join()


def test_ready_tells_whether_wait_would_block(pair):
    key = activation(1, step_id=6)
    work = pair[1].channel(0).recv(key)
    assert not work.ready()
    sent = pair[0].channel(1).send(key, [torch.ones(3)])
    sent.wait()
    assert sent.ready()
    work.wait()
    assert work.ready()


def test_no_random_numbers_are_drawn(pair):
    states = torch.get_rng_state().clone(), random.getstate()
    key = activation(2, step_id=7)
    pair[0].channel(1).send(key, [torch.ones(1000)])
    pair[1].channel(0).recv(key).wait()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_torchs_default_device_and_dtype_do_not_matter(pair):
    key = activation(2, step_id=8)
    pair[0].channel(1).send(key, [torch.ones(4, dtype=torch.bfloat16)])
    with torch.device("meta"):
        (got,) = pair[1].channel(0).recv(key).wait().tensors
    assert got.device.type == "cpu"
    assert got.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(2, device="meta"),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
    ids=["meta", "sparse", "quantized"],
)
def test_what_cannot_travel_is_refused_and_leaves_the_link_as_it_was(pair, tensor):
    key = activation(2, step_id=9)
    with pytest.raises(TransportError, match=r"tensor 1 .* cannot be sent: make it a dense tensor"):
        pair[0].channel(1).send(key, [torch.ones(1), tensor])
    pair[0].channel(1).send(key, [torch.ones(1)])
    assert pair[1].channel(0).recv(key).wait().tensors[0].item() == 1


def test_numbers_that_do_not_fit_the_header_are_refused(pair):
    with pytest.raises(TransportError, match="a number is too large"):
        pair[0].channel(1).send(activation(0, step_id=2**70), [])
    with pytest.raises(TransportError, match="a number is too large"):
        pair[0].channel(1).send(activation(0), [], tag=2**63)


def test_message_moves_to_a_device(pair):
    key = activation(4, step_id=10)
    pair[0].channel(1).send(key, [torch.ones(2)], tag=5)
    message = pair[1].channel(0).recv(key).wait()
    moved = message.to("meta")
    assert moved.tensors[0].is_meta
    assert (moved.tag, moved.delay_ms) == (5, message.delay_ms)
