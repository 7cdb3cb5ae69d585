"""Compiles the kernels with numba where it is installed; without it they run, slower, as plain Python.

Kernels compute in whole nanoseconds, so both ways give the same plan on every machine.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

try:
    import numba
except ImportError:  # an optional dependency
    numba = None


@contextmanager
def no_collection() -> Iterator[None]:
    """Puts off garbage collection while hundreds of thousands of small objects without cycles are made: the
    collector would walk all objects of the process over and over, to find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


HAVE_NUMBA = numba is not None
KERNELS: list[Any] = []
"""Every kernel of the package that numba compiles."""


def compiled(kernel: Kernel) -> Kernel:
    """The kernel, compiled on first use and cached on disk; unchanged without numba."""
    if numba is None:
        return kernel
    try:
        made = numba.njit(cache=True)(kernel)
    except RuntimeError:  # neither the package's directory nor the user's cache can be written
        made = numba.njit(kernel)
    KERNELS.append(made)
    return made
