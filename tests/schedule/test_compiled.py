"""Kernels: compiled where numba is there, also where nothing can be cached; collection is put back as it was."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
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
        def njit(*, cache=False, **options):
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return numba.njit(**options)

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


def test_other_threads_run_while_a_kernel_does():
    pytest.importorskip("numba")

    @module.compiled
    def wait(told, most):
        for n in range(most):
            if told[n % 1024]:
                return n
        return -1

    told = np.zeros(1024, dtype=np.int64)
    wait(told, 1)  # compiled
    found = []
    thread = threading.Thread(target=lambda: found.append(wait(told, 1 << 36)))
    thread.start()
    time.sleep(0.05)
    told[:] = 1  # a kernel that held the interpreter lock would go on for a minute, and not find this
    thread.join(50)
    assert found and found[0] > 0


def test_every_kernel_lets_other_threads_run():
    pytest.importorskip("numba")
    assert module.KERNELS and all(kernel.targetoptions["nogil"] for kernel in module.KERNELS)
