"""pyverbs, its errors, and the words for them.

It comes from this Python, or else from the system's own packages (Debian: python3-pyverbs), because it has to match the
system's rdma-core.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from adaptra_plugin.errors import TransportError

SYSTEM_PACKAGES = ("/usr/lib/python3/dist-packages", "/usr/lib64/python3/site-packages")
"""Where distributions put pyverbs; looked at when Python's path has none."""
_STATUS = {
    1: "local length error",
    2: "local QP operation error",
    4: "local protection error",
    5: "flushed: the queue pair has failed or its port went down",
    6: "memory window bind error",
    7: "bad response",
    8: "local access error",
    9: "remote end refused the request",
    10: "remote access error: wrong key or range",
    11: "remote operation error",
    12: "no acknowledgement from the remote end within all retries",
    13: "remote end had no receive buffer posted within all retries",
    21: "fatal error of the device",
    22: "response timed out",
}


@dataclass(frozen=True, slots=True)
class Gid:
    """An entry of a port's address table. `kind`: ib, roce1 or roce2; `interface`: network interface, if any."""

    index: int
    address: str
    """IPv4 if the entry maps one, else IPv6; text."""
    kind: str
    interface: str | None
    raw: str
    """All 128 bits, as pyverbs reads and writes them."""


class VerbsError(TransportError):
    """`code` is an errno, or the status of a work completion; 0 if neither is known."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


def status_text(status: int) -> str:
    """A work completion's status in words, with its number."""
    return f"{_STATUS.get(status, 'work completion error')} (status {status})"


_loaded: SimpleNamespace | None = None


def _find_package() -> None:
    """Imports the top package, from the system's packages if it is not on the path. The path stays as it is: the other
    packages in that folder are not ours to use. Raises ImportError."""
    try:
        importlib.import_module("pyverbs")
        return
    except ImportError:
        pass
    spec = importlib.machinery.PathFinder.find_spec("pyverbs", list(SYSTEM_PACKAGES))
    if spec is None or spec.loader is None:
        raise ImportError("pyverbs is not installed (Debian: apt-get install python3-pyverbs ibverbs-providers)")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyverbs"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["pyverbs"]
        raise


def load() -> SimpleNamespace:
    """pyverbs' modules. Raises VerbsError with the reason why there are none."""
    global _loaded
    if _loaded is not None:
        return _loaded
    try:
        _find_package()
        names = ("device", "pd", "cq", "qp", "mr", "addr", "wr", "pyverbs_error")
        modules = {name: importlib.import_module(f"pyverbs.{name}") for name in names}
        try:
            enums = importlib.import_module("pyverbs.enums")
        except ImportError:
            enums = importlib.import_module("pyverbs.libibverbs_enums")
    except (ImportError, AttributeError, OSError) as error:
        origin = getattr(sys.modules.get("pyverbs"), "__path__", None)
        where = f" (found in {next(iter(origin))}; this is Python {sys.version.split()[0]})" if origin else ""
        raise VerbsError(f"pyverbs cannot be used: {error}{where}") from None
    _loaded = SimpleNamespace(enums=enums, **modules)
    return _loaded


@contextlib.contextmanager
def told(what: str, remedy: str = "") -> Iterator[None]:
    """Turns pyverbs' errors into VerbsError: `what` could not be done."""
    try:
        yield
    except load().pyverbs_error.PyverbsError as error:
        code = getattr(error, "error_code", 0) or 0
        raise VerbsError(f"cannot {what}: {error}{remedy}", max(code, 0)) from None
    except OSError as error:
        raise VerbsError(f"cannot {what}: {error}{remedy}", error.errno or 0) from None


def event_descriptors() -> set[int]:
    """Those of this process through which an RDMA device reports events."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{entry}"):  # noqa: PTH115
                found.add(int(entry))
    return found
