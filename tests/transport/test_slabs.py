"""Memory that is received into again and again."""

from __future__ import annotations

import gc

import torch

from adaptra_plugin.transport.slabs import Slabs

MIB = 1 << 20


def test_a_slab_is_used_again_once_its_last_tensor_is_gone_and_never_before():
    slabs = Slabs(8 * MIB)
    first = slabs.empty((256, 1024), torch.float32)
    first.fill_(1.0)
    view, address = first[3:5], first.data_ptr()
    del first
    gc.collect()
    other = slabs.empty((MIB,), torch.uint8)
    assert other.data_ptr() != address, "a view still uses it"
    assert torch.equal(view, torch.ones(2, 1024))
    del view
    again = slabs.empty((512, 1024), torch.bfloat16)
    assert again.data_ptr() == address and again.shape == (512, 1024) and again.dtype == torch.bfloat16


def test_what_is_kept_is_bounded():
    slabs = Slabs(4 * MIB)
    for size in range(1, 30):
        held = [slabs.empty((size * MIB // 4,), torch.float32) for _ in range(3)]
        del held
    assert len(slabs._free) <= 8
    assert all(sum(len(area) for area in free) <= max(4 * MIB, size) for size, free in slabs._free.items())


def test_it_is_a_tensor_like_any_other():
    tensor = Slabs(4 * MIB).empty((1024, 512), torch.float32)
    assert tensor.is_contiguous() and tensor._base is None and tensor.is_leaf and not tensor.requires_grad
    tensor.normal_().requires_grad_()
    (tensor * 2).sum().backward()
    assert torch.equal(tensor.grad, torch.full((1024, 512), 2.0))
