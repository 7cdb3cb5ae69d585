"""The machine as the checks see it. Every field can be replaced, so that tests describe machines they do not have."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptra_plugin.isolated import isolated_command, isolated_environment

CHILD_SECONDS = 120.0
"""Longest wait for a probe in a process of its own (s): importing torch from a cold network disk takes a minute."""
UNLIMITED = resource.RLIM_INFINITY


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_requirements() -> list[str]:
    """What this package requires, extras included, as its metadata has it; empty where it is not installed."""
    try:
        return importlib.metadata.requires("adaptra-plugin") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def locate(module: str) -> Path | None:
    """The folder of a top-level package, found without importing it."""
    spec = importlib.machinery.PathFinder.find_spec(module)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def run_child(code: str, *arguments: str) -> dict[str, Any]:
    """Runs Python code in a process of its own: a library that crashes, hangs or takes the GPU does so there.

    The last line that the code prints is a JSON object. Raises RuntimeError: it ended otherwise, or too late.
    """
    environment = isolated_environment(ADAPTRA_AUTOLOAD="0")
    try:
        command = isolated_command(code, *arguments)
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {CHILD_SECONDS:.0f} s") from None
    except OSError as error:
        raise RuntimeError(f"no process can be started: {error}") from None
    if ended.returncode:
        said = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(f"ended with code {ended.returncode}: {said[0]}")
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    if not isinstance(found, dict):
        raise RuntimeError(f"answered {found!r}")
    return found


def _eventfd() -> None:
    """By the C library: Python has the function from 3.10 on only where it was built on a system that has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.eventfd(0, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(fd)


def _memfd() -> None:
    fd = os.memfd_create("adaptra-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)


def _pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


FEATURES: Mapping[str, Callable[[], None]] = {"eventfd": _eventfd, "memfd_create": _memfd, "pidfd_open": _pidfd}
"""Kernel features in use: each function returns if the feature works and raises OSError or AttributeError if not."""


@dataclass(frozen=True)
class Machine:
    """`root` is where /sys, /proc, /dev, /usr and /var are found."""

    root: Path = Path("/")
    limit: Callable[[int], tuple[int, int]] = resource.getrlimit
    """Soft and hard limit (bytes, descriptors) of a RLIMIT_*; UNLIMITED for none."""
    affinity: Callable[[], set[int]] = lambda: os.sched_getaffinity(0)
    version: Callable[[str], str | None] = installed_version
    requirements: Callable[[], list[str]] = own_requirements
    locate: Callable[[str], Path | None] = locate
    child: Callable[..., dict[str, Any]] = run_child
    disk: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage
    """Total, used, free bytes of the file system at a path."""
    features: Mapping[str, Callable[[], None]] = field(default_factory=lambda: FEATURES)
    python: tuple[int, int, int] = sys.version_info[:3]

    def path(self, place: str) -> Path:
        return self.root / place.lstrip("/")

    def text(self, place: str) -> str | None:
        """Content of a file without the white space around it; None if it cannot be read (sysfs answers so, too)."""
        try:
            return self.path(place).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def number(self, place: str) -> int | None:
        text = self.text(place)
        try:
            return int(text) if text is not None else None
        except ValueError:
            return None

    def names(self, place: str) -> list[str]:
        """Names in a folder, numbers in their order; empty if there is no such folder."""
        try:
            found = [entry.name for entry in self.path(place).iterdir()]
        except OSError:
            return []
        return sorted(found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))

    def real(self, place: str) -> str:
        """Where links lead, from the root of the machine."""
        return "/" + str(self.path(place).resolve().relative_to(self.root.resolve()))

    def fields(self, place: str) -> dict[str, str]:
        """A file of lines such as `MemAvailable:   14159268 kB`."""
        lines = (self.text(place) or "").splitlines()
        return {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}

    def kib(self, place: str, key: str) -> int | None:
        """Bytes of a field that is given in kB."""
        words = self.fields(place).get(key, "").split()
        return int(words[0]) << 10 if words and words[0].isdigit() else None
