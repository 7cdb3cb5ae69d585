"""What a fresh clone is checked with: stages of `make`, several at a time, with their times at the end.

Each stage's output is printed when it ends. A stage that fails fails the whole, and the others are still run. A test that has
passed in the stage `fast` is left out by the parts that it belongs to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# each with an environment of its own
FIRST = ("install", "fast")
# longest first; two at a time, because tests wait about as much as they compute
TOGETHER = (
    *("megatron", "wheel", "deepspeed", "versions", "transport", "proxy", "runtime", "schedule"),
    *("pythons", "report", "detect"),
)
# at the end, beside nothing that keeps both cores busy: the guest kernel has one, what measures time the other, and after it
# what is one process at a time
QUIET = ("rdma", "timing", "demo", "doctor", "whole", "lint", "docs")
PASSED = "ADAPTRA_PASSED"
"""Variable with a file for the tests that have passed, see `tests/conftest.py`."""
ONCE = ("fast", "schedule", "detect", "report", "whole")
"""Stages that share tests."""
DEADLINE_S = 2700
"""Longest time of a stage."""


def stage(name: str, passed: Path) -> tuple[str, int, float]:
    """Runs one stage; its name, exit code and seconds. `passed`: where tests are noted."""
    target = name if name in ("install", "lint") else f"test-{name}"
    command = ["make", "--no-print-directory", target]
    if name not in ("rdma", "timing"):
        command.append('SELECT=-m "not (timing or matrix)"')
    environment = {**os.environ, PASSED: str(passed)} if name in ONCE else None
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, code = process.communicate(timeout=DEADLINE_S)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # make, and all that it has started
        said, code = process.communicate()[0] + f"not finished after {DEADLINE_S} s\n".encode(), 124
    seconds = time.monotonic() - began
    sys.stdout.buffer.write(f"\n===== {name}: {' '.join(command)}\n".encode() + said)
    sys.stdout.buffer.write(f"===== {name}: exit code {code}, {seconds:.0f} s\n".encode())
    sys.stdout.buffer.flush()
    return name, code, seconds


def together(names: tuple[str, ...], workers: int, passed: Path) -> list[tuple[str, int, float]]:
    with ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in as_completed([pool.submit(stage, name, passed) for name in names])]


def everything(passed: Path) -> list[tuple[str, int, float]]:
    results = together(FIRST, 2, passed)
    if all(code == 0 for name, code, _ in results if name == "install"):
        # a kernel that has to be built first takes both cores
        quiet = 2 if "ADAPTRA_GUEST_KERNEL" in os.environ else 1
        results += together(TOGETHER, 2, passed) + together(QUIET, quiet, passed)
    return results


def main() -> int:
    # a guest kernel that lies beside the clone saves building one
    beside = ROOT.parent / "shared" / "guest" / "linux-uml.xz"
    if beside.is_file():
        os.environ.setdefault("ADAPTRA_GUEST_KERNEL", str(beside))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = everything(Path(folder) / "passed")
    print(f"\n{'stage':<12} seconds")
    for name, code, seconds in results:
        print(f"{name:<12} {seconds:7.0f}  {'ok' if code == 0 else f'FAILED with exit code {code}'}")
    print(f"{'all':<12} {time.monotonic() - began:7.0f}", flush=True)
    return int(any(code for _, code, _ in results))


if __name__ == "__main__":
    sys.exit(main())
