"""Markers by where a test lies: what it needs. Files that measure real time say so themselves (`timing`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
collect_ignore = [] if find_spec("wandb") else ["report/test_wandb_own.py", "report/test_wandb_real.py"]
MARKERS = {
    "host": ("patches", "megatron", "compat", "launch", "install", "rdma/test_rdma_training.py"),
    "multiprocess": ("install", "rdma/test_rdma_training.py"),
    "network": ("compat", "install"),
    "slow": ("compat", "install", "rdma", "launch/test_demo.py"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, places in MARKERS.items():
            if any(item.path.is_relative_to(HERE / place) for place in places):
                item.add_marker(marker)
