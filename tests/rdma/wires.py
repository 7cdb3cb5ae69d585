"""The wires of the guest (`guest/rails.sh`) and what can befall them. Wire i joins a<i> (device rxa<i>) and b<i> (rxb<i>)."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

COUNT = 2
_touched: set[int] = set()


def device(side: str, wire: int) -> str:
    return f"rx{side}{wire}"


def address(side: str, wire: int) -> str:
    return f"198.18.{wire}.{1 if side == 'a' else 2}"


def _run(*command: str, check: bool = True) -> None:
    subprocess.run(command, check=check, timeout=10, stderr=None if check else subprocess.DEVNULL)


def cut(wire: int, side: str) -> None:
    """Takes the interface of one side down: its own port goes down; the other port of a veth pair loses its carrier."""
    _touched.add(wire)
    _run("ip", "link", "set", f"{side}{wire}", "down")


def mend(wire: int) -> None:
    """Both ends up, no faults, the routes that a lost link took with it, ports active (waits for them)."""
    _touched.discard(wire)
    for side in "ab":
        _run("tc", "qdisc", "del", "dev", f"{side}{wire}", "root", check=False)
        _run("ip", "link", "set", f"{side}{wire}", "up")
    for side, other in ("ab", "ba"):
        _run(
            *("ip", "route", "replace", f"{address(other, wire)}/32", "dev", f"{side}{wire}"),
            *("src", address(side, wire), "table", "99"),
        )
    until = time.monotonic() + 10
    for side in "ab":
        state = Path(f"/sys/class/infiniband/{device(side, wire)}/ports/1/state")
        while "ACTIVE" not in state.read_text():
            assert time.monotonic() < until, f"{device(side, wire)} does not become active"
            time.sleep(0.01)


def mend_all() -> None:
    for wire in list(_touched):
        mend(wire)


def fault(wire: int, *netem: str, sides: str = "ab") -> None:
    """What leaves the sides of this wire suffers from `netem` arguments: `delay 10ms`, `loss 1%`, `loss 100%`."""
    _touched.add(wire)
    for side in sides:
        _run("tc", "qdisc", "replace", "dev", f"{side}{wire}", "root", "netem", *netem)


def touched() -> None:
    """Processes that are about to be forked may do anything to all wires."""
    _touched.update(range(COUNT))
