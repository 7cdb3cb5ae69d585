"""Kernels: compiled where numba is there, also where nothing can be cached; collection is put back as it was."""

from __future__ import annotations

import gc

import pytest

from adaptra_plugin.schedule import compiled as module


def double(x: int) -> int:
    return 2 * x


def test_without_numba_the_kernel_is_the_function(monkeypatch):
    monkeypatch.setattr(module, "numba", None)
    assert module.compiled(double) is double


def test_where_nothing_can_be_cached_it_is_compiled_all_the_same(monkeypatch):
    numba = pytest.importorskip("numba")

    class Uncached:
        @staticmethod
        def njit(function=None, *, cache=False):
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return numba.njit(function)

        config = numba.config

    monkeypatch.setattr(module, "numba", Uncached)
    assert module.compiled(double)(21) == 42


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_put_back(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError), module.no_collection():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
