"""Traces: every action, transfer and bubble is there, and no two events of one thread overlap."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

from adaptra_plugin.report.trace import trace_events, write_trace
from adaptra_plugin.schedule.catalogue.zb_h1 import zb_h1
from adaptra_plugin.schedule.simulator import simulate
from tests.schedule.helpers import even


def timeline():
    return simulate(zb_h1(3, 4), even(3, 4, (2, 2, 1), links=[(0, 1, 7.0)]))


def test_everything_is_there_once():
    made = timeline()
    events = trace_events([("plan", made)])
    complete = [e for e in events if e["ph"] == "X"]
    by_category = defaultdict(list)
    for event in complete:
        by_category[event["cat"]].append(event)
    assert len(by_category["forward"]) == len(by_category["backward weight"]) == 12
    assert len(by_category["idle"]) == len(made.idle)
    assert len(by_category["transfer"]) == 8  # four activations and four gradients over the slow link
    assert sum(e["args"]["critical"] for e in by_category["forward"]) == sum(
        a.kind.value == "F" for a in made.critical_path
    )
    arrows = [e for e in events if e["ph"] in "sf"]
    assert len(arrows) == 16
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} >= {"plan", "rank 2", "link 0 → 1", "link 0 → 1 (2)"}


def test_events_of_one_thread_do_not_overlap():
    threads = defaultdict(list)
    for event in trace_events([("a", timeline()), ("b", timeline())]):
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len({pid for pid, _ in threads}) == 2
    for spans in threads.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(spans))


def test_the_file_is_a_chrome_trace(tmp_path):
    write_trace([("plan", timeline())], tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
