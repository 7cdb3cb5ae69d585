"""In which order threads take the plug-in's locks: two of them taken in both orders would end in a deadlock some day."""

from __future__ import annotations

import contextlib
import linecache
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest


class LockOrder:
    """Which locks have been taken while others were held, by name: class and attribute, for all objects of a class alike."""

    def __init__(self) -> None:
        self.edges: dict[tuple[str, str], str] = {}
        """(held, taken) -> name of the thread that did so first."""
        self._held = threading.local()

    def taken(self, lock: _Watched, *, waited: bool) -> None:
        held: list[_Watched] = self._held.__dict__.setdefault("locks", [])
        if waited and lock not in held:  # nothing waits for what is not waited for, or is taken again
            for other in held:
                self.edges.setdefault((other.name, lock.name), threading.current_thread().name)
        held.append(lock)

    def released(self, lock: _Watched) -> None:
        held: list[_Watched] = self._held.__dict__.setdefault("locks", [])
        if lock in held:  # one that was taken on another thread is not
            held.remove(lock)

    def check(self) -> None:
        """Fails if the locks cannot be put in one order."""
        left = {name for edge in self.edges for name in edge}
        while free := {name for name in left if not any(a in left and b == name for a, b in self.edges)}:
            left -= free
        circle = [f"{a} -> {b} on {thread}" for (a, b), thread in self.edges.items() if a in left and b in left]
        assert not left, f"no order of locks: {'; '.join(sorted(circle))}"


class _Watched:
    """A lock that tells when it is taken."""

    def __init__(self, lock: Any, name: str, order: LockOrder) -> None:
        self._lock = lock
        self.name = name
        self._order = order

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = bool(self._lock.acquire(blocking, timeout))
        if taken:
            self._order.taken(self, waited=blocking)
        return taken

    def release(self) -> None:
        self._lock.release()
        self._order.released(self)

    def locked(self) -> bool:
        return bool(self._lock.locked())

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()


class _WatchedAgain(_Watched):
    """One that may be taken again, with what conditions ask of it."""

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())

    def _release_save(self) -> Any:
        self._order.released(self)
        return self._lock._release_save()

    def _acquire_restore(self, state: Any) -> None:
        self._lock._acquire_restore(state)
        self._order.taken(self, waited=True)


@contextlib.contextmanager
def watched_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[LockOrder]:
    """All locks and conditions that the plug-in makes inside are watched; the order is checked at the end."""
    order = LockOrder()

    def watch(kind: str, watched: type[_Watched]) -> None:
        make = getattr(threading, kind)

        def made() -> Any:
            name = _name()
            return make() if name is None else watched(make(), name, order)

        monkeypatch.setattr(threading, kind, made)

    with monkeypatch.context() as monkeypatch:
        watch("Lock", _Watched)
        watch("RLock", _WatchedAgain)
        yield order
    order.check()


def _name() -> str | None:
    """Of the lock that the plug-in is making, or None if somebody else makes one."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == threading.__file__:
        if isinstance(frame.f_locals.get("self"), threading.Event | threading.Thread):
            return None  # Python's own
        frame = frame.f_back
    if frame is None or not frame.f_globals.get("__name__", "").startswith("adaptra_plugin."):
        return None
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    attribute = re.search(r"self\.(\w+)", line)
    owner = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else frame.f_globals["__name__"]
    return f"{owner}.{attribute[1] if attribute else frame.f_lineno}"
