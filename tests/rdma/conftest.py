"""Tests that need RDMA devices: `make test-rdma` runs them in a guest kernel that has some, made of software."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("ADAPTRA_IN_GUEST") == "1":
        return
    skip = pytest.mark.skip(reason="needs the RDMA devices of the guest kernel: make test-rdma")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _whole_wires():
    """Every test finds, and leaves, wires that are up and without faults."""
    yield
    from tests.rdma import wires

    wires.mend_all()
