"""What a fresh clone is checked with: stages of `make`, several at a time, with their times at the end.

Each stage's output is printed when it ends. A stage that fails fails the whole, and the others are still run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# longest first; two at a time, because tests wait about as much as they compute
TOGETHER = (
    *("deepspeed", "wheel", "megatron", "transport", "demo", "schedule", "runtime", "versions", "proxy"),
    *("pythons", "fast", "report", "lint", "docs", "whole", "doctor", "detect"),
)
# at the end, beside nothing that keeps both cores busy: the guest kernel has one, what measures time the other
QUIET = ("rdma", "timing")
DEADLINE_S = 1800
"""Longest time of a stage."""


def stage(name: str) -> tuple[str, int, float]:
    """Runs one stage; its name, exit code and seconds."""
    target = name if name in ("install", "lint") else f"test-{name}"
    command = ["make", "--no-print-directory", target]
    if name in TOGETHER:
        command.append('SELECT=-m "not timing"')
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
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


def together(names: tuple[str, ...], workers: int) -> list[tuple[str, int, float]]:
    with ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in as_completed([pool.submit(stage, name) for name in names])]


def main() -> int:
    # a guest kernel that lies beside the clone saves building one
    beside = ROOT.parent / "shared" / "guest" / "linux-uml.xz"
    if beside.is_file():
        os.environ.setdefault("ADAPTRA_GUEST_KERNEL", str(beside))
    began = time.monotonic()
    results = [stage("install")]
    if results[0][1] == 0:
        # a kernel that has to be built first takes both cores
        results += together(TOGETHER, 2) + together(QUIET, 2 if "ADAPTRA_GUEST_KERNEL" in os.environ else 1)
    print(f"\n{'stage':<12} seconds")
    for name, code, seconds in results:
        print(f"{name:<12} {seconds:7.0f}  {'ok' if code == 0 else f'FAILED with exit code {code}'}")
    print(f"{'all':<12} {time.monotonic() - began:7.0f}", flush=True)
    return int(any(code for _, code, _ in results))


if __name__ == "__main__":
    sys.exit(main())
