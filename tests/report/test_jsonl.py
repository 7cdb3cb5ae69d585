"""The JSONL file: bounded, never blocking, never failing."""

from __future__ import annotations

import itertools
import json
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptra_plugin.report import JsonlWriter
from adaptra_plugin.report.jsonl import encode
from adaptra_plugin.report.worker import BatchWorker

NEWS_S = 10.0  # longest wait for another thread; none of the tests gets near it


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + NEWS_S
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def test_one_file_per_rank_in_order(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "new" / "folder", 7, "r1")
    for i in range(100):
        writer.write({"type": "iteration", "iteration": i})
    assert writer.close(NEWS_S)
    assert writer.path.name == "rank00007.jsonl" and writer.files() == [writer.path]
    assert [record["iteration"] for record in read(writer.path)] == list(range(100))


def test_records_are_in_the_file_without_close(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path, 0, "r1")
    writer.write({"type": "event"})
    until(lambda: writer.path.exists() and writer.path.read_text() == '{"type":"event"}\n')
    writer.close(NEWS_S)


def test_a_restarted_job_appends_after_a_line_cut_short(tmp_path: Path) -> None:
    (tmp_path / "rank00000.jsonl").write_text('{"a":1}\n{"b":')
    writer = JsonlWriter(tmp_path, 0, "r1")
    writer.write({"c": 3})
    writer.close(NEWS_S)
    assert writer.path.read_text() == '{"a":1}\n{"b":\n{"c":3}\n'


def test_rotation_keeps_one_older_file(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path, 0, "r1", max_file_mib=0.01)
    for i in range(1000):
        writer.write({"iteration": i, "text": "x" * 80})
    writer.close(NEWS_S)
    older, newer = writer.files()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank00000.jsonl", "rank00000.jsonl.1"]
    assert max(older.stat().st_size, newer.stat().st_size) <= 0.01 * (1 << 20)
    numbers = [record["iteration"] for record in read(older) + read(newer)]
    assert numbers == list(range(numbers[0], 1000)) and len(numbers) > 90


def test_the_oldest_go_when_the_disk_is_too_slow_and_nobody_waits() -> None:
    gate, done = threading.Event(), []
    worker: BatchWorker[int] = BatchWorker(
        "slow", lambda batch: (gate.wait(NEWS_S), done.extend(batch)), lambda: None, limit=16
    )
    worker.put(0)
    until(lambda: not worker._records)  # the thread holds the first
    start = time.monotonic()
    for i in range(1, 100_001):
        worker.put(i)
    assert time.monotonic() - start < 5
    gate.set()
    assert worker.close(NEWS_S)
    assert done == [0, *range(100_001 - 16, 100_001)]
    assert worker.take_dropped() == 100_000 - 16 and worker.take_dropped() == 0


def test_closing_keeps_its_deadline() -> None:
    gate = threading.Event()
    worker: BatchWorker[int] = BatchWorker("stuck", lambda batch: gate.wait(NEWS_S), lambda: None, limit=16)
    worker.put(0)
    assert not worker.close(0.05)
    gate.set()
    assert worker.close(NEWS_S) and worker.close(0)
    worker.put(1)  # after the end: no error, no effect


def test_a_forked_child_neither_waits_nor_writes(tmp_path: Path) -> None:
    """Another thread may have held the lock when it was forked."""
    writer = JsonlWriter(tmp_path, 0, "r1")
    with writer._worker._news:
        child = os.fork()
        if not child:
            signal.alarm(10)
            writer.write({"type": "child"})
            os._exit(0 if writer.close(5.0) else 1)
    assert os.waitpid(child, 0)[1] == 0
    writer.write({"type": "parent"})
    assert writer.close(NEWS_S)
    assert [record["type"] for record in read(writer.path)] == ["parent"]


class Disk:
    """Stands in for the file: full or not."""

    def __init__(self) -> None:
        self.full = True
        self.attempts = 0

    def write(self, real: Callable[[Any], int], data: bytes) -> int:
        self.attempts += 1
        if self.full:
            real(data[:5])
            raise OSError(28, "No space left on device")
        return real(data)


def test_a_full_disk_is_logged_once_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, now = Disk(), [0.0]
    from adaptra_plugin.report import jsonl

    class Full(jsonl.FileIO):
        def write(self, data: Any) -> int:  # type: ignore[override]
            return disk.write(super().write, data)

    monkeypatch.setattr(jsonl, "FileIO", Full)
    with caplog.at_level(logging.WARNING):
        writer = JsonlWriter(tmp_path, 0, "r1", clock=lambda: 5.0, monotonic=lambda: now[0])
        for i in range(3):  # each within another pause: 1, 2, 4 s
            writer.write({"i": i})
            until(lambda pause=2.0 ** (i + 1): writer._pauses.pause_s == pause)
            now[0] += 100.0
        disk.full = False
        now[0] += 100.0
        writer.write({"i": 3})
        assert writer.close(NEWS_S)
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    lines = writer.path.read_text().splitlines()
    assert lines[-2:] == ['{"type":"dropped","time":5.0,"rank":0,"run":"r1","records":3}', '{"i":3}']


def test_a_limit_of_file_sizes_rotates_sooner_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        writer = JsonlWriter(tmp_path, 0, "r1")
        for n in range(200):
            writer.write({"n": n, "filler": "x" * 40})
        assert writer.close()
        assert not caplog.records and json.loads(writer.path.read_text().splitlines()[-1])["n"] == 199
        writer = JsonlWriter(tmp_path, 1, "r1")
        writer.write({"filler": "x" * 5000})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "may have 4096 bytes (RLIMIT_FSIZE)" in caplog.text


def test_pauses_grow(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    now = [0.0]
    writer = JsonlWriter(tmp_path / "file" / "below", 0, "r1", monotonic=lambda: now[0])  # a folder that cannot be made
    writer.close(NEWS_S)  # from here on the test is the thread
    times = []
    for step in range(2000):
        now[0] = float(step)
        before = writer._retry_at
        writer._write([{"i": step}])
        if writer._retry_at != before:
            times.append(step)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[:5] == [1, 2, 4, 8, 16] and max(gaps) == 300


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    writer = JsonlWriter(tmp_path, 0, "r1")
    writer.write({})
    assert writer.close(NEWS_S) and writer.files() == []


def test_values_that_json_does_not_know() -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd"

    line = encode(
        {"inf": float("inf"), "nan": np.float32("nan"), "array": np.arange(3), "odd": Odd(), 3: (1, 2), "umlaut": "ä"}
    )
    expected = {"inf": None, "nan": None, "array": [0, 1, 2], "odd": "odd", "3": [1, 2], "umlaut": "ä"}
    assert json.loads(line) == expected and line.count(b"\n") == 1


def test_a_record_that_cannot_be_written_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no")

    writer = JsonlWriter(tmp_path, 0, "r1")
    writer.write({"type": "a", "value": Hostile()})
    writer.write({"type": "b"})
    writer.close(NEWS_S)
    assert [record["type"] for record in read(writer.path)] == ["unwritable", "b"] and "type 'a'" in caplog.text
