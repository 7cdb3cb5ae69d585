"""Compiles the kernels with numba where it is installed; without it they run, slower, as plain Python.

Kernels compute in whole nanoseconds, so both ways give the same plan on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

try:
    import numba
except ImportError:  # an optional dependency
    numba = None

HAVE_NUMBA = numba is not None


def compiled(kernel: Kernel) -> Kernel:
    """The kernel, compiled on first use and cached on disk; unchanged without numba."""
    if numba is None:
        return kernel
    return numba.njit(cache=True)(kernel)
