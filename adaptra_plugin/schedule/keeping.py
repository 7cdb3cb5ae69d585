"""Where compiled kernels are kept between runs: the first of several folders that can be written.

numba looks for one by itself, but says nothing where it finds none, fails in the middle of a plan when a disk is full or a
file in its folder is damaged, and lets machines with different processors that share a folder overwrite each other's code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NEEDED_BYTES = 4 << 20
"""More than all kernels take."""


class Keeper:
    """A folder for compiled code of one kind.

    Args:
        chosen: the folder that the user has set for numba, if any.
        kind: the processor, and how the code was compiled. Code of another kind is not found.
    """

    def __init__(self, chosen: str, kind: str) -> None:
        self.troubles: list[str] = []
        """Why code is not kept: a reason for each folder, or for what failed later."""
        self.folder: Path | None = None
        digest = hashlib.sha256(kind.encode()).hexdigest()[:16]
        for place, find in _places(chosen):
            try:
                folder = find() / f"adaptra-planner-{digest}"
                _try(folder)
            except (OSError, RuntimeError) as error:
                self.troubles.append(f"{place}: {getattr(error, 'strerror', None) or error}")
            else:
                self.folder = folder
                self.troubles.clear()
                return

    def guard(self, cache: Any) -> Any:
        """numba's cache of one kernel, whose troubles are noted and cost nothing else."""
        return _Guarded(cache, self.troubles)


def _places(chosen: str) -> Iterator[tuple[str, Callable[[], Path]]]:
    if chosen:
        yield f"NUMBA_CACHE_DIR ({chosen})", lambda: Path(chosen)
    beside = Path(__file__).parent / "__pycache__"
    yield str(beside), lambda: beside
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # noqa: PTH117  a relative one is to be ignored, says the specification
        yield f"XDG_CACHE_HOME ({xdg})", lambda: Path(xdg)
    else:
        yield "~/.cache", lambda: Path.home() / ".cache"
    yield "the temporary directory", _private


def _private() -> Path:
    """A folder that everybody else can neither read nor have laid there. Raises OSError."""
    folder = Path(tempfile.gettempdir()) / f"adaptra-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(0, f"{folder} belongs to somebody else, or others may write to it")
    return folder


def _try(folder: Path) -> None:
    """Raises OSError if there is no room for all kernels."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, NEEDED_BYTES)


class _Guarded:
    def __init__(self, cache: Any, troubles: list[str]) -> None:
        self._cache = cache
        self._troubles = troubles

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return self._cache.load_overload(*arguments)
        except Exception:  # noqa: BLE001  what unpickling damaged bytes raises is anybody's guess
            with contextlib.suppress(Exception):
                self._cache.flush()  # the kernel is compiled again, and kept in the place of what is damaged
            return None

    def save_overload(self, *arguments: Any) -> None:
        try:
            self._cache.save_overload(*arguments)
        except Exception as error:  # noqa: BLE001  a full disk; or a kernel that was damaged and cannot be replaced
            self._troubles.append(f"{self._cache.cache_path}: {error}")
