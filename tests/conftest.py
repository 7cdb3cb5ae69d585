"""Markers by where a test lies: what it needs. Files that measure real time say so themselves (`timing`).

Runs that share tests may share a file (`ADAPTRA_PASSED`, see `.ci/stages.py`): what has passed in one is left out by the next.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).parent
collect_ignore = [] if find_spec("wandb") else ["report/test_wandb_own.py", "report/test_wandb_real.py"]
MARKERS = {
    "host": ("patches", "megatron", "compat", "launch", "install", "rdma/test_rdma_training.py"),
    "multiprocess": ("install", "rdma/test_rdma_training.py"),
    "network": ("compat", "install"),
    "slow": ("compat", "install", "rdma", "launch/test_demo.py"),
}


PASSED = Path(os.environ["ADAPTRA_PASSED"]) if os.environ.get("ADAPTRA_PASSED") else None


settings.register_profile("steady", deadline=None)  # how long an example takes depends on what else the machine does
settings.load_profile("steady")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for marker, places in MARKERS.items():
            if any(item.path.is_relative_to(HERE / place) for place in places):
                item.add_marker(marker)
    if PASSED is not None and PASSED.exists():
        passed = set(PASSED.read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # of several processes the one that hears of all tests
    if PASSED is not None and "PYTEST_XDIST_WORKER" not in os.environ and report.when == "call" and report.passed:
        with PASSED.open("a") as file:
            file.write(f"{report.nodeid}\n")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if PASSED is not None and PASSED.exists() and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # all have passed before
