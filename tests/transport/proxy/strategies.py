"""Injected faults as hypothesis draws them, for rails of memory and for real ones."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

KINDS = ["latency", "jitter", "bandwidth", "stall", "corruption", "death"]
names = st.sampled_from(["any", "tcp", "tcp0", "tcp1", "rdma0", "shm"])


def moments(until_s: float) -> st.SearchStrategy[float]:
    """Seconds since the start, to the millisecond."""
    return st.floats(0.0, until_s).map(lambda when: round(when, 3))


@st.composite
def faults(draw: st.DrawFn, until_s: float, *, mild: bool = False) -> dict[str, Any]:
    """One entry of `simulate.faults`. Those that let nothing pass end after `until_s` at the latest.

    Args:
        mild: nothing that takes long in real time.
    """
    kind = draw(st.sampled_from(KINDS))
    found: dict[str, Any] = {"kind": kind, "src": 0, "dst": 1, "rail": draw(names), "seed": draw(st.integers(0, 99))}
    begins, ends = sorted((draw(moments(until_s)), draw(moments(until_s))))
    total = kind == "stall" or (kind == "death" and draw(st.booleans()))
    if total or draw(st.booleans()):
        found |= {"from_s": begins, "to_s": ends + 0.001}
    if kind in ("latency", "jitter"):
        found["ms"] = draw(st.sampled_from([0.05, 1.0, 5.0] if mild else [0.05, 1.0, 20.0, 300.0]))
    if kind == "bandwidth":
        found["mb_per_s"] = draw(st.sampled_from([50.0, 200.0] if mild else [5.0, 50.0]))
    elif kind == "corruption" and draw(st.booleans()):
        found |= {"part": "header", "rate": draw(st.sampled_from([0.001, 0.01]))}
    elif kind == "corruption":
        found["rate"] = draw(st.sampled_from([0.01, 0.1] if mild else [0.01, 0.1, 0.3]))
    elif kind == "death" and not total:
        found["rate"] = draw(st.sampled_from([0.001, 0.01]))
    return found
