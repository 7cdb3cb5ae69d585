"""On which CPUs a proxy runs, and whether it spins."""

import os

import pytest

from adaptra_plugin.transport import placement


def test_cpus_of_the_proxy(monkeypatch, tmp_path):
    for node, cpus in ((0, "0-3"), (1, "4-7,9")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(placement, "_NODES", tmp_path)
    affinity = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(affinity["process" if pid else "thread"]))

    def auto(process, thread):
        affinity.update(process=process, thread=thread)
        return placement.proxy_cpus("auto")

    assert auto(range(8), range(8)) is None  # on which node the thread runs is not known
    assert auto(range(4), range(4)) is None  # there is nothing to choose
    assert auto(range(8), range(4)) == [0, 1, 2, 3]
    assert auto(range(8), [1]) == [0, 2, 3]
    assert auto([*range(8), 9], [9]) == [4, 5, 6, 7]
    assert auto([0, 1], [0]) == [0, 1]
    allowed = set(range(8))
    monkeypatch.setattr(placement, "allowed_cpus", lambda: allowed)
    monkeypatch.setattr(placement, "_TOPOLOGY", tmp_path)
    (tmp_path / "cpu1" / "topology").mkdir(parents=True)
    (tmp_path / "cpu1" / "topology" / "thread_siblings_list").write_text("1,3\n")
    assert auto([1], [1]) == [0, 2, 3]  # called on the main thread, which is pinned
    assert auto([1, 3], [1, 3]) == [0, 2]  # to both threads of a core
    assert auto([1, 2], [1, 2]) is None  # to its share of the node
    allowed = {1, 2}
    assert auto([1], [1]) == [1, 2]
    allowed = {1}
    assert auto([1], [1]) is None
    assert placement.proxy_cpus(None) is None
    assert placement.proxy_cpus((3, 1)) == [1, 3]
    affinity["thread"] = range(4)
    assert placement.spin_s("auto") == 0
    affinity["thread"] = range(5)
    assert placement.spin_s("auto") == pytest.approx(20e-6)
    assert placement.spin_s(7) == pytest.approx(7e-6)


def test_what_the_system_allows_does_not_depend_on_where_a_thread_is_pinned():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert placement.allowed_cpus() >= before
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
