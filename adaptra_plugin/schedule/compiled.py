"""Compiles the kernels with numba where it is installed; without it they run, slower, as plain Python.

Kernels compute in whole nanoseconds, so both ways give the same plan on every machine.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from adaptra_plugin.schedule.keeping import Keeper

logger = logging.getLogger("adaptra")
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

try:
    import numba
except ImportError:  # an optional dependency
    numba = None
except Exception as error:  # noqa: BLE001  ... which may be broken in many ways, by a version of numpy for one
    logger.warning("numba cannot be used, and the planner runs uncompiled: %s: %s", type(error).__name__, error)
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
OPTIONS = {"nogil": True}
"""Of every kernel: the training thread goes on while a plan is computed on another one."""
KERNELS: list[Any] = []
"""Every kernel of the package that numba compiles."""


@cache
def keeper() -> Keeper:
    """Where this process keeps compiled kernels."""
    from llvmlite import binding

    # the options belong to it: numba would load code that was compiled with others
    kind = f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()} {OPTIONS}"
    return Keeper(numba.config.CACHE_DIR, kind)


def compiled(kernel: Kernel) -> Kernel:
    """The kernel, compiled on first use and kept on disk where there is room; unchanged without numba."""
    if numba is None:
        return kernel
    made: Kernel = _kept(kernel) if keeper().folder is not None else numba.njit(**OPTIONS)(kernel)
    if made is not kernel:  # as it is with NUMBA_DISABLE_JIT
        KERNELS.append(made)
    return made


def _kept(kernel: Kernel) -> Any:
    chosen = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(keeper().folder)
    try:
        made = numba.njit(cache=True, **OPTIONS)(kernel)
    except RuntimeError as error:  # NUMBA_CACHE_LOCATOR_CLASSES may leave no way to a folder
        keeper().troubles.append(str(error))
        return numba.njit(**OPTIONS)(kernel)
    finally:
        numba.config.CACHE_DIR = chosen
    if hasattr(made, "_cache"):
        made._cache = keeper().guard(made._cache)
    return made


def interpret() -> None:
    """Runs all kernels as plain Python from now on: same plans, later."""
    plain = {id(kernel): kernel.py_func for kernel in KERNELS}
    for name, module in list(sys.modules.items()):
        if name.startswith("adaptra_plugin.schedule."):
            for attribute, value in list(vars(module).items()):
                if id(value) in plain:
                    setattr(module, attribute, plain[id(value)])
