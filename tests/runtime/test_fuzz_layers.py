"""Single layers, split against stock: a part of what `python -m benchmarks.fuzz_layers` runs by the million."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fuzz_layers import ITERATIONS, Kind, difference

KINDS = 140


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("part", range(4))
def test_no_bit_differs(part):
    assert KINDS * sum(ITERATIONS) > 5000, "thousands of cases"
    found = {number: difference(Kind.draw(number)) for number in range(part, KINDS, 4)}
    assert {number: what for number, what in found.items() if what is not None} == {}


def test_a_difference_is_found(monkeypatch):
    """The fuzzer sees what an earlier version did wrong: the gradients of the bias of a four-dimensional input."""
    from adaptra_plugin.runtime import split

    stock = split._SplitLinear.backward

    def wrong(ctx, *grads):
        x, bias, *more = stock(ctx, *grads)
        return x, None if bias is None else grads[0].double().sum_to_size(bias.shape).to(bias.dtype), *more

    monkeypatch.setattr(split._SplitLinear, "backward", staticmethod(wrong))
    assert any(difference(Kind.draw(number)) is not None for number in range(40))
