"""Helper processes: no file of the user's stands in for Python's own or for an installed one, and everything is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adaptra_plugin import isolated
from tests.transport.support import activation, line

SHADOWS = (
    *(
        "signal",
        "json",
        "queue",
        "socket",
        "logging",
        "struct",
        "select",
        "selectors",
        "types",
        "enum",
        "random",
        "site",
    ),
    *("runpy", "dataclasses", "ssl", "hashlib", "secrets", "typing", "string", "io", "os", "copy", "heapq", "time"),
    *("sitecustomize", "usercustomize", "xxhash", "psutil", "numpy", "pyverbs"),
)
"""Names that users give to files, all of them imported by a helper or on its way."""


@pytest.fixture
def hostile(tmp_path, monkeypatch) -> Path:
    """A folder full of such files: the working directory, on PYTHONPATH, and the first one of this process's path."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the user was imported')\n")
    (tmp_path / "me.egg-info").mkdir()  # as a project that is installed in place
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    return tmp_path


def ran(code: str, *arguments: str, **options) -> str:
    command, environment = isolated.isolated_command(code, *arguments), isolated.isolated_environment()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_proxy_among_the_users_files_moves_messages(hostile):
    with line(2, proxy="process", checksum="on") as (first, second):
        first.channel(1).send(activation(0), [torch.arange(5.0)])
        assert second.channel(0).recv(activation(0)).wait().tensors[0].tolist() == [0, 1, 2, 3, 4]


def test_modules_are_pythons_own_and_installed_ones(hostile):
    names = [name for name in SHADOWS if name not in ("sitecustomize", "usercustomize", "pyverbs")]
    code = "import sys, importlib\nfor name in sys.argv[1:]: print(importlib.import_module(name).__spec__.origin)"
    assert str(hostile) not in ran(code, *names)


def test_what_only_the_users_folder_has_is_found(hostile):
    (hostile / "theirs.py").write_text("print('theirs')")
    assert ran("import theirs") == "theirs"


def test_the_package_is_the_one_that_this_process_has_loaded(hostile):
    (hostile / "adaptra_plugin").mkdir()
    (hostile / "adaptra_plugin" / "__init__.py").write_text("raise SystemExit('another one')")
    (hostile / "other-1.dist-info").mkdir()  # and it is first in the path of this process
    home = str(Path(isolated.__file__).parent)
    assert ran("import adaptra_plugin.errors as e; print(e.__file__)") == str(Path(home, "errors.py"))


def test_installed_packages_keep_their_order(tmp_path, monkeypatch):
    """Clusters put other versions of packages in front, by PYTHONPATH."""
    for name in ("first", "second"):
        (tmp_path / name / f"thing-{name}.dist-info").mkdir(parents=True)
        (tmp_path / name / "adaptra_test_thing.py").write_text(f"print('{name}')")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "adaptra_test_thing.py").write_text("print('code')")
    folders = [str(tmp_path / name) for name in ("code", "first", "second")]
    monkeypatch.setattr(sys, "path", [*folders, *sys.path])
    assert ran("import adaptra_test_thing") == "first"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    assert ran("import adaptra_test_thing") == "first"


def test_paths_that_are_none_and_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, 3, None, "no/such/folder", "\udc80", sys.path[-1]])
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = json.loads(ran("import json, sys; print(json.dumps(sys.path))"))
    assert len(found) == len(set(found)) and "no/such/folder" not in found


def test_a_module_runs_as_main_with_its_arguments(tmp_path, monkeypatch):
    (tmp_path / "adaptra_test_main.py").write_text("import sys; print(__name__, sys.argv[1:])")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    process = isolated.start("adaptra_test_main", "a b", "", stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=60)[0].strip() == "__main__ ['a b', '']"


def test_warnings_of_the_training_are_no_errors_of_helpers(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("PYTHONINSPECT", "1")
    assert ran("import warnings; warnings.warn('x'); print('on')", stdin=subprocess.DEVNULL) == "on"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_deaf_one_does_not_hear_signals(tmp_path, monkeypatch, number):
    (tmp_path / "adaptra_test_deaf.py").write_text("print('here', flush=True); print(input())")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = isolated.start("adaptra_test_deaf", deaf=True, **pipes)
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    assert process.communicate("still here\n", timeout=60)[0] == "still here\n"
    assert process.returncode == 0


def test_without_a_known_python_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(OSError, match=r"sys\.executable is empty"):
        isolated.start("adaptra_plugin.errors")
