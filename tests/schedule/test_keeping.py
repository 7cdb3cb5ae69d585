"""Compiled kernels are kept where there is room; trouble with that costs time and is said, and never costs a plan."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from adaptra_plugin.schedule import compiled as module
from adaptra_plugin.schedule import keeping
from adaptra_plugin.schedule.keeping import Keeper
from adaptra_plugin.schedule.planner import plan
from tests.schedule.helpers import even

pytest.importorskip("numba")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No folder of the usual ones can be made: a file is in the way. Root may write everywhere else."""
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "folder"
    monkeypatch.setattr(keeping, "__file__", str(blocked / "keeping.py"))
    monkeypatch.setenv("HOME", str(blocked))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(blocked))
    return blocked


def test_the_users_choice_comes_first(tmp_path, nowhere):
    assert Keeper(str(tmp_path / "mine"), "p").folder.parent == tmp_path / "mine"


@pytest.mark.parametrize("place", ["beside", "xdg", "home", "temporary"])
def test_the_first_place_that_can_be_written(tmp_path, monkeypatch, nowhere, place):
    good = tmp_path / "good"
    good.mkdir()
    if place == "beside":
        monkeypatch.setattr(keeping, "__file__", str(good / "keeping.py"))
    elif place == "temporary":
        monkeypatch.setattr(tempfile, "tempdir", str(good))
    else:
        monkeypatch.setenv({"xdg": "XDG_CACHE_HOME", "home": "HOME"}[place], str(good))
    found = Keeper(str(nowhere), "p")
    assert good in found.folder.parents and found.troubles == []


def test_a_reason_for_each_place(monkeypatch, nowhere):
    found = Keeper(str(nowhere), "p")
    assert found.folder is None and len(found.troubles) == 4
    assert all("Not a directory" in why for why in found.troubles)
    assert [why.split(" ")[0].rstrip(":") for why in found.troubles] == [
        *("NUMBA_CACHE_DIR", str(nowhere / "__pycache__"), "~/.cache", "the")
    ]


def test_no_home_and_no_temporary_directory(monkeypatch, nowhere):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # of whom no file of the system's knows
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(nowhere)])
    found = Keeper("", "p")
    assert found.folder is None
    assert "home directory" in found.troubles[1] and "No usable temporary directory" in found.troubles[2]


def test_a_disk_without_room_is_found_out_before(tmp_path, monkeypatch, nowhere):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        found = Keeper(str(tmp_path / "small"), "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.folder is None and "File too large" in found.troubles[0]


def test_kinds_of_processor_do_not_share_a_folder(tmp_path):
    assert Keeper(str(tmp_path), "one").folder == Keeper(str(tmp_path), "one").folder
    assert Keeper(str(tmp_path), "one").folder != Keeper(str(tmp_path), "other").folder


@pytest.mark.parametrize("trap", ["link", "open", "theirs"])
def test_what_others_have_laid_in_the_temporary_directory_is_not_loaded(tmp_path, monkeypatch, nowhere, trap):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"adaptra-{os.getuid()}"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        if trap == "open":
            folder.chmod(0o777)
        elif os.getuid() == 0:
            os.chown(folder, 65534, 65534)
        else:
            pytest.skip("only root can give a folder away")
    found = Keeper("", "p")
    assert found.folder is None and "belongs to somebody else" in found.troubles[-1]


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Makes a kernel anew, as the next process would; returns it and what it was kept by."""
    source = tmp_path / "adaptra_test_kernel.py"
    source.write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.setattr(module, "KERNELS", [])

    def make():
        spec = importlib.util.spec_from_file_location("adaptra_test_kernel", source)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        monkeypatch.setitem(sys.modules, "adaptra_test_kernel", loaded)
        keeper = Keeper(str(tmp_path / "cache"), "p")
        monkeypatch.setattr(module, "keeper", lambda: keeper)
        return module.compiled(loaded.double), keeper

    return make


def kept(tmp_path: Path, suffix: str) -> Path:
    (found,) = (tmp_path / "cache").rglob(f"*.{suffix}")
    return found


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x80\x05K\x01."])
def test_a_damaged_file_is_replaced(tmp_path, kernel, suffix, damage):
    first, _ = kernel()
    assert first(21) == 42 and first.stats.cache_misses
    kept(tmp_path, suffix).write_bytes(damage)
    second, keeper = kernel()
    assert second(21) == 42 and second.stats.cache_misses and keeper.troubles == []
    third, _ = kernel()
    assert third(21) == 42 and third.stats.cache_hits and not third.stats.cache_misses


def test_what_cannot_be_replaced_is_said(tmp_path, kernel):
    first, _ = kernel()
    first(21)
    index = kept(tmp_path, "nbi")
    index.unlink()
    index.mkdir()
    second, keeper = kernel()
    assert second(21) == 42
    assert len(keeper.troubles) == 1 and "Is a directory" in keeper.troubles[0]


def test_a_disk_that_becomes_full_costs_no_plan(kernel):
    made, keeper = kernel()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        assert made(21) == 42
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert keeper.troubles


PLANS = """
import json, logging, resource, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
exec(sys.argv[2])
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.prepare import prepare
from adaptra_plugin.schedule.profile import Profile
prepare()
print(json.dumps(plan(Profile.from_json(json.loads(sys.argv[1]))).ranks))
"""


def planned(before: str, **environment: str) -> str:
    """Stderr of a process that gets ready and plans; its plan must be the one of this process."""
    profile = even(3, 5, (3, 4, 2), links=[(1, 2, 9.0)], cap=3)
    done = subprocess.run(
        [sys.executable, "-c", PLANS, json.dumps(profile.to_json()), before],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == plan(profile).ranks
    return done.stderr


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_where_nothing_can_be_written_it_is_compiled_and_that_is_said():
    """Not even a temporary directory is there."""
    said = planned("resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))")
    (line,) = [line for line in said.splitlines() if "planner" in line]
    assert "and will be at every start, because the result cannot be kept" in line
    assert "File too large" in line and "No usable temporary directory" in line and "NUMBA_CACHE_DIR" in line


def test_a_compiler_that_fails_leaves_the_plain_planner(tmp_path):
    said = planned(
        "import numba.core.compiler as c\ndef fail(*_, **__): raise RuntimeError('out of order')\nc.compile_extra = fail",
        NUMBA_CACHE_DIR=str(tmp_path),  # where nothing has been kept
    )
    assert "the planner runs uncompiled, and slower: numba fails with RuntimeError: out of order" in said


def test_a_broken_numba_leaves_the_plain_planner(tmp_path):
    (tmp_path / "numba.py").write_text("raise AttributeError('numpy has no attribute')")
    said = planned("", PYTHONPATH=str(tmp_path))
    assert "numba cannot be used, and the planner runs uncompiled: AttributeError: numpy has no attribute" in said
