import gc
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.transport import support
from tests.transport.fake_proxy import connected


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """Forked ranks must not inherit a pool of OpenMP threads that a copy has started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_descriptors() -> set[str]:
    """Sockets, doorbells, selectors and rings of this process, by number and what they are."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue  # the descriptor of the listing itself
        if any(kind in target for kind in ("socket", "eventfd", "eventpoll", "adaptra-ring")):
            found.add(f"{entry.name} {target}")
    return found


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("adaptra")]


def proxies() -> list[int]:
    """Proxy processes of this one, dead ones that nobody has waited for included."""
    found = []
    for child in psutil.Process().children():
        try:
            if child.status() == psutil.STATUS_ZOMBIE or any("transport.proxy" in part for part in child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            pass
    return found


@pytest.fixture(autouse=True)
def _nothing_leaks():
    """No test may leave a thread, a proxy or a socket behind."""
    before = open_descriptors()
    yield
    until = time.monotonic() + 5
    while (our_threads() or proxies()) and time.monotonic() < until:
        time.sleep(0.01)  # a proxy's thread has let go of its sockets a moment before it ends
    assert our_threads() == []
    assert proxies() == []
    if open_descriptors() - before:
        gc.collect()  # slow: only if what is left might be garbage
    assert open_descriptors() - before == set()


@pytest.fixture
def fake_pair():
    made = []

    def make(**changes):
        made.append(connected(**changes))
        return made[-1]

    yield make
    for endpoint, fake in made:
        endpoint.close()
        fake.close()


@pytest.fixture
def by_proxies(monkeypatch: pytest.MonkeyPatch):
    """Messages in shared memory are told of through the proxies, too."""
    monkeypatch.setitem(support.DEFAULTS, "direct", False)


@pytest.fixture(params=["directly", "by proxies"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Messages in shared memory are told of in both ways."""
    monkeypatch.setitem(support.DEFAULTS, "direct", request.param == "directly")
