"""Gets the planner ready before training, so that no plan of a running job waits for a compiler."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

from adaptra_plugin.schedule.compiled import HAVE_NUMBA, KERNELS, interpret, keeper
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile

logger = logging.getLogger("adaptra")
NEWS_S = 5.0
"""Getting ready is worth a line of the log if it took this long."""
PATIENCE_S = 60.0
"""A process that has waited this long for another one to compile does it itself."""


@cache
def prepare() -> None:
    """Compiles everything that plans are made with, or loads what an earlier run has kept: about 20 s on the first run of an
    installation, well below 1 s on all others. Does nothing without numba. Never raises: what cannot be compiled is interpreted.

    The processes of a host take turns: the first one compiles, the others find its results.
    """
    if not HAVE_NUMBA:
        return
    began = time.monotonic()
    try:
        with _turn() if keeper().folder is not None else nullcontext():
            _plan_everything()
    except Exception as error:  # noqa: BLE001  whatever a compiler fails with, plans can be made without one
        interpret()
        logger.warning("the planner runs uncompiled, and slower: numba fails with %s: %s", type(error).__name__, error)
        return
    _tell(time.monotonic() - began)


def _plan_everything() -> None:
    # a rank that is slower than the others, behind a slow link, within a limit: no shortcut leads to the best plan
    for chunks in (1, 2):
        stages = tuple(StageProfile(3.0 + n, 4.0 + n % 2, 2.0, 3 if n % 3 == 1 else None) for n in range(3 * chunks))
        links = tuple(LinkProfile(src, dst, 9.0, 0.0) for src, dst in ((0, 1), (1, 0)))
        plan(Profile(5, stages, links, virtual_stages=chunks))


def _tell(took_s: float) -> None:
    compiled = any(kernel.stats.cache_misses for kernel in KERNELS)
    if compiled and keeper().troubles:
        logger.warning(
            "the planner was compiled in %.0f s, and will be at every start, because the result cannot be kept (%s): set "
            "NUMBA_CACHE_DIR to a folder that can be written",
            took_s,
            "; ".join(keeper().troubles),
        )
    elif compiled and took_s > NEWS_S:
        logger.info(
            "the planner was compiled in %.0f s; the result is kept for later runs in %s", took_s, keeper().folder
        )
    elif took_s > NEWS_S:
        logger.info("the planner was ready after %.0f s: another process of this host has compiled it", took_s)


@contextmanager
def _turn(path: Path | None = None) -> Iterator[None]:
    """Waits for this process's turn, if that can be had."""
    try:
        path = path or Path(tempfile.gettempdir()) / f"adaptra-planner-{os.getuid()}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield  # taking turns only saves work
        return
    try:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(lock)
