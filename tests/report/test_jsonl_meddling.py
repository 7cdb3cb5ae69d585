"""The JSONL file while others remove, rename, rotate and write it, and the trainer changes its directory."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptra_plugin.report import JsonlWriter
from adaptra_plugin.report import jsonl as module
from tests.report.test_jsonl import NEWS_S, read, until

ROOT = Path(__file__).parents[2]


def numbers(path: Path) -> list[int]:
    return [record["i"] for record in read(path) if "i" in record]


def write(writer: JsonlWriter, number: int, path: Path | None = None) -> None:
    """... and waits until it is in the file."""
    writer.write({"i": number})
    until(lambda: (path or writer.path).exists() and number in numbers(path or writer.path))


@pytest.mark.parametrize(
    "meddle",
    [
        lambda folder: shutil.rmtree(folder),
        lambda folder: folder.rename(folder.with_name("elsewhere")),
        lambda folder: (folder / "rank00000.jsonl").rename(folder / "rank00000.jsonl.old"),
        lambda folder: (folder / "rank00000.jsonl").unlink(),
        lambda folder: ((folder / "rank00000.jsonl").unlink(), (folder / "rank00000.jsonl").write_text("")),
    ],
    ids=["removed folder", "renamed folder", "renamed file", "removed file", "replaced file"],
)
def test_a_file_that_is_gone_is_begun_anew(
    tmp_path: Path, meddle: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    writer = JsonlWriter(folder, 0, "r1")
    write(writer, 0)
    for i in (1, 2):  # said once, done each time
        meddle(folder)
        with caplog.at_level(logging.WARNING):
            write(writer, i)
        assert numbers(writer.path) == [i]
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    assert writer.close(NEWS_S) and writer.files() == [folder / "rank00000.jsonl"]
    (record,) = caplog.records
    assert str(writer.path) in record.getMessage()


def test_a_file_that_is_emptied_in_place_goes_on(tmp_path: Path) -> None:
    """As `copytruncate` of logrotate does it. Its size counts anew."""
    writer = JsonlWriter(tmp_path, 0, "r1", max_file_mib=0.001)
    for i in range(3):
        writer.write({"i": i, "text": "x" * 600})
        until(lambda i=i: writer.path.exists() and numbers(writer.path)[-1:] == [i])
        os.truncate(writer.path, 0)
    writer.write({"i": 3})
    assert writer.close(NEWS_S)
    assert numbers(writer.path) == [3] and writer.files() == [writer.path]


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    writer = JsonlWriter("logs", 0, "r1", max_file_mib=0.001)
    monkeypatch.chdir(tmp_path / "other")
    for i in range(10):
        write(writer, i)
        writer.write({"text": "x" * 300})  # makes it rotate
    assert writer.close(NEWS_S)
    assert writer.files() == [tmp_path / "logs" / name for name in ("rank00000.jsonl.1", "rank00000.jsonl")]
    assert list((tmp_path / "other").iterdir()) == []


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    writer = JsonlWriter("logs", 0, "r1")
    writer.write({"i": 0})
    assert writer.close(NEWS_S) and writer.files() == []
    writer = JsonlWriter(tmp_path / "logs", 0, "r1")
    write(writer, 0)
    assert writer.close(NEWS_S)


def test_two_at_once_have_files_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two engines of a process, or two jobs: neither writes into, nor renames, what the other writes."""
    caplog.set_level(logging.INFO)
    first = JsonlWriter(tmp_path, 0, "aaaa", max_file_mib=0.01)
    write(first, 0)
    second = JsonlWriter(tmp_path, 0, "bbbb", max_file_mib=0.01)
    write(second, 1000)  # each has its file before the first one is rotated, when its name is free for a moment
    for i in range(1, 400):
        first.write({"i": i, "text": "x" * 80})
        second.write({"i": 1000 + i, "text": "x" * 80})
    assert first.close(NEWS_S) and second.close(NEWS_S)
    assert [path.name for path in first.files()] == ["rank00000.jsonl.1", "rank00000.jsonl"]
    assert [path.name for path in second.files()] == ["rank00000-bbbb.jsonl.1", "rank00000-bbbb.jsonl"]
    for writer, last in ((first, 399), (second, 1399)):
        found = list(itertools.chain(*map(numbers, writer.files())))
        assert found == list(range(found[0], last + 1)) and len(found) > 90
    assert sum("rank00000-bbbb.jsonl" in record.getMessage() for record in caplog.records) == 1
    third = JsonlWriter(tmp_path, 0, "cccc")  # a restart appends to the usual one
    write(third, 2000)
    assert third.close(NEWS_S) and third.path.name == "rank00000.jsonl" and numbers(third.path)[-2:] == [399, 2000]


def test_another_process_has_it_until_it_is_killed(tmp_path: Path) -> None:
    """... and a worker that it has forked does not keep it once it has closed it."""
    script = f"""
import os, sys, time
from adaptra_plugin.report import JsonlWriter
writer = JsonlWriter({str(tmp_path)!r}, 0, "aaaa")
writer.write({{"i": 0}})
while not writer.path.exists(): time.sleep(0.01)
print(flush=True)
sys.stdin.readline()
child = os.fork()
if child == 0: time.sleep(100)
writer.close()
print(child, flush=True)
time.sleep(100)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child = 0
    try:
        assert other.stdin is not None and other.stdout is not None
        other.stdout.readline()
        writer = JsonlWriter(tmp_path, 0, "bbbb")
        writer.write({"i": 1})
        assert writer.close(NEWS_S) and writer.path.name == "rank00000-bbbb.jsonl"
        other.stdin.write(b"\n")
        other.stdin.flush()
        child = int(other.stdout.readline())
        writer = JsonlWriter(tmp_path, 0, "cccc")
        writer.write({"i": 2})
        assert writer.close(NEWS_S) and numbers(tmp_path / "rank00000.jsonl") == [0, 2]
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        other.kill()
        other.communicate()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    writer = JsonlWriter(tmp_path, 0, "aaaa")
    write(writer, 0, tmp_path / "rank00000-aaaa.jsonl")
    assert writer.close(NEWS_S) and writer.files() == [tmp_path / "rank00000-aaaa.jsonl"]


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path: Path) -> None:
    """`ulimit -f`: nothing is raised or killed, one line says so, no line is torn for a reader."""
    child = os.fork()
    if not child:
        code = 1
        try:
            now = [0.0]
            messages: list[str] = []
            logger = logging.Logger("test")
            handler = logging.Handler()
            handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
            logger.addHandler(handler)
            writer = JsonlWriter(tmp_path, 0, "r1", monotonic=lambda: now[0], logger=logger)
            # lowered later: a limit that is there from the start rotates the file before it is reached
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            for i in range(10):
                writer.write({"i": i, "text": "x" * 500})
                time.sleep(0.01)
            done = writer.close(NEWS_S)
            code = 0 if done and len(messages) == 1 and "File too large" in messages[0] else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    lines = (tmp_path / "rank00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["i"] for line in lines[:3]] == [0, 1, 2]


def test_a_name_that_is_taken_costs_the_oldest_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = JsonlWriter(tmp_path, 0, "r1", max_file_mib=0.01)
    module.rotated(writer.path).mkdir(parents=True)
    for i in range(400):
        writer.write({"i": i, "text": "x" * 80})
    assert writer.close(NEWS_S)
    found = numbers(writer.path)
    assert found[-1] == 399 and found == list(range(found[0], 400)) and "cannot be renamed" in caplog.text
