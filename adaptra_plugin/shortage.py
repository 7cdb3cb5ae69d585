"""What the system has refused for want of room, in words: which limit it was, its number, and what to change.

`can't start new thread` and `File too large` name neither.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

logger = logging.getLogger("adaptra")
CGROUPS = "/sys/fs/cgroup"
_NO_THREAD = "can't start new thread"


def explain(error: BaseException, root: Path = Path("/")) -> str:
    """The error and the limit behind it. `root`: where /proc and /sys are found."""
    find = _REASONS.get(_code(error) or 0)
    return f"{error}: {find(root)}" if find else str(error) or type(error).__name__


@contextmanager
def told(what: str, kind: type[Exception], otherwise: str = "") -> Iterator[None]:
    """Turns what the system refuses into one error that says what could not be done, and why. Other errors pass, except
    those of the system if there is something to be said of them: `otherwise`."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if _code(error) in _REASONS:
            raise kind(f"{what} ({explain(error)})") from None
        if isinstance(error, OSError) and otherwise:
            raise kind(f"{what} ({error}): {otherwise}") from None
        raise


def begin(thread: threading.Thread, otherwise: str) -> bool:
    """Starts a thread that training can do without. Where there is no room for one: False, and a warning says what is lost."""
    try:
        thread.start()
    except RuntimeError as error:
        logger.warning("%s: %s", otherwise, explain(error))
        return False
    return True


def tasks(read: Callable[[str], str | None]) -> tuple[int, int] | None:
    """Limit and number of processes and threads of the tightest control group; None: no limit. `read`: gives the content of a
    file, or None."""
    found = []
    for folder, _ in groups(read, "pids"):
        top, used = read(f"{folder}/pids.max"), read(f"{folder}/pids.current")
        if top is not None and top.isdigit():
            found.append((int(top), int(used) if used is not None and used.isdigit() else 0))
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def groups(read: Callable[[str], str | None], controller: str) -> Iterator[tuple[str, int]]:
    """Folders of this process's control group and of all above it, each with its version (1 or 2). In a container the path
    may be the host's: only its top is seen then."""
    for line in (read("/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            base, version = CGROUPS, 2
        elif controller in names.split(","):
            base, version = f"{CGROUPS}/{controller}", 1
        else:
            continue
        inside = PurePosixPath("/" + path.strip("/"))
        for place in (inside, *inside.parents):
            yield f"{base}{place}".rstrip("/"), version


def _code(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return errno.EAGAIN if isinstance(error, RuntimeError) and _NO_THREAD in str(error) else None


def _reader(root: Path) -> Callable[[str], str | None]:
    def read(place: str) -> str | None:
        try:
            return (root / place.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    return read


def _tasks(root: Path) -> str:
    found = []
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if soft != resource.RLIM_INFINITY:
        found.append(
            f"this user may have {soft} processes and threads and has {_own_tasks(root)} (RLIMIT_NPROC): `ulimit -u`"
        )
    group = tasks(_reader(root))
    if group is not None:
        found.append(
            f"the control group may have {group[0]} and has {group[1]} (pids.max): Docker's --pids-limit, Slurm's or "
            "Kubernetes' limit of processes"
        )
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        found.append(_space(root))
    words = (
        "; ".join(found)
        or "neither RLIMIT_NPROC nor pids.max is set: see kernel.threads-max, and whether memory is left"
    )
    return f"{words}. Raise what is reached, or start fewer threads (OMP_NUM_THREADS, workers of data loaders)"


def _own_tasks(root: Path) -> int:
    """Threads of all processes of this user."""
    found, me = 0, os.getuid()
    for entry in root.glob("proc/[0-9]*"):
        try:
            if entry.stat().st_uid == me:
                found += sum(1 for _ in (entry / "task").iterdir())
        except OSError:
            pass  # it has ended
    return found


def _files(root: Path) -> str:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"this process may have {soft} files open and has {_open_files()} (RLIMIT_NOFILE): raise `ulimit -n`"


def _open_files() -> str:
    try:
        return str(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
    except OSError:
        return "as many"  # to count them takes one more


def _all_files(root: Path) -> str:
    return f"the whole machine may have {_reader(root)('/proc/sys/fs/file-max')} files open (fs.file-max): raise it"


def _file_size(root: Path) -> str:
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if soft == resource.RLIM_INFINITY:
        return "the file system has no larger files"
    return f"a file, shared memory included, may have {soft} bytes (RLIMIT_FSIZE): `ulimit -f unlimited`"


def _memory(root: Path) -> str:
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return _space(root)
    return "the system has no memory left to promise: see `free`, the control group's limit and vm.overcommit_memory"


def _space(root: Path) -> str:
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = (_reader(root)("/proc/self/statm") or "0").split()[0]
    used = int(pages) * resource.getpagesize()
    return f"a process may use {soft >> 20} MiB of addresses, this one uses {used >> 20} MiB (RLIMIT_AS): `ulimit -v unlimited`"


_REASONS: dict[int, Callable[[Path], str]] = {
    errno.EAGAIN: _tasks,
    errno.EMFILE: _files,
    errno.ENFILE: _all_files,
    errno.EFBIG: _file_size,
    errno.ENOMEM: _memory,
    errno.ENOSPC: lambda root: "there is no room left: free some, or choose another place",
    errno.EDQUOT: lambda root: "this user's quota is used up: free some, or choose another place",
}
