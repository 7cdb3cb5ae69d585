"""What the system refuses is said with the limit, its number and what to change."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from adaptra_plugin import shortage
from adaptra_plugin.errors import TransportError

NO_THREAD = RuntimeError("can't start new thread")


@pytest.fixture
def limits(monkeypatch):
    """Soft limits of this process as the test says; all others are unlimited."""
    found: dict[int, int] = {}

    def of(kind: int) -> tuple[int, int]:
        return found.get(kind, resource.RLIM_INFINITY), resource.RLIM_INFINITY

    monkeypatch.setattr(resource, "getrlimit", of)
    return found


@pytest.fixture
def root(tmp_path) -> Path:
    def write(place: str, text: str) -> None:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text + "\n")

    write("proc/self/cgroup", "0::/job/rank")
    write("sys/fs/cgroup/job/rank/pids.max", "max")
    write("sys/fs/cgroup/job/pids.max", "100")
    write("sys/fs/cgroup/job/pids.current", "100")
    write("proc/self/statm", "1000 1 1")
    for number in ("1", "2", "3"):
        write(f"proc/7/task/{number}/stat", "")
    return tmp_path


def test_threads_and_processes(limits, root):
    limits[resource.RLIMIT_NPROC] = 3
    limits[resource.RLIMIT_AS] = 64 << 20
    for error in (NO_THREAD, BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))):
        said = shortage.explain(error, root)
        assert said.startswith(f"{error}: ")
        assert "may have 3 processes and threads and has 3 (RLIMIT_NPROC)" in said
        assert "the control group may have 100 and has 100 (pids.max)" in said
        assert "64 MiB of addresses" in said and "OMP_NUM_THREADS" in said


def test_threads_without_a_limit_of_ours(limits, tmp_path):
    assert "kernel.threads-max" in shortage.explain(NO_THREAD, tmp_path)


def test_old_control_groups(root):
    (root / "proc/self/cgroup").write_text("4:memory:/a\n7:pids:/b\n")
    (root / "sys/fs/cgroup/pids").mkdir()
    (root / "sys/fs/cgroup/pids/pids.max").write_text("50\n")
    assert shortage.tasks(lambda place: _text(root / place[1:])) == (50, 0)


def _text(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EMFILE, r"may have 7 files open and has \d+ \(RLIMIT_NOFILE\): raise `ulimit -n`"),
        (errno.ENFILE, r"the whole machine may have \d+ files open \(fs\.file-max\)"),
        (errno.EFBIG, r"shared memory included, may have 4096 bytes \(RLIMIT_FSIZE\): `ulimit -f unlimited`"),
        (errno.ENOMEM, r"64 MiB of addresses, this one uses \d+ MiB \(RLIMIT_AS\)"),
        (errno.ENOSPC, r"there is no room left"),
        (errno.EDQUOT, r"quota is used up"),
    ],
)
def test_each_error_names_its_limit(limits, root, code, words):
    limits.update({resource.RLIMIT_NOFILE: 7, resource.RLIMIT_FSIZE: 4096, resource.RLIMIT_AS: 64 << 20})
    with (
        pytest.raises(TransportError, match=rf"^it cannot be done \(.*{words}"),
        shortage.told("it cannot be done", TransportError),
    ):
        raise OSError(code, os.strerror(code))


def test_memory_without_a_limit(limits, root):
    assert "vm.overcommit_memory" in shortage.explain(MemoryError(), root)


def test_other_errors_pass_or_are_said_as_told(limits):
    with pytest.raises(PermissionError), shortage.told("x", TransportError):
        raise PermissionError(errno.EPERM, "no")
    with (
        pytest.raises(TransportError, match=r"^x \(.*no\): do something else$"),
        shortage.told("x", TransportError, "do something else"),
    ):
        raise PermissionError(errno.EPERM, "no")
    with pytest.raises(RuntimeError, match=r"^unrelated$"), shortage.told("x", TransportError, "y"):
        raise RuntimeError("unrelated")
    assert shortage.explain(ValueError()) == "ValueError"
