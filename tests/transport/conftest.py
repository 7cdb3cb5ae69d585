import gc
import threading
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """Forked ranks must not inherit a pool of OpenMP threads that a copy has started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_descriptors() -> set[str]:
    """Sockets, doorbells and selectors of this process, by number and what they are."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue  # the descriptor of the listing itself
        if any(kind in target for kind in ("socket", "eventfd", "eventpoll")):
            found.add(f"{entry.name} {target}")
    return found


@pytest.fixture(autouse=True)
def _nothing_leaks():
    """No test may leave a proxy thread or a socket behind."""
    before = open_descriptors()
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("adaptra")] == []
    if open_descriptors() - before:
        gc.collect()  # slow: only if what is left might be garbage
    assert open_descriptors() - before == set()
