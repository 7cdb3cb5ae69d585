"""Other versions of the hosts than the installed ones, each in a folder to be put in front of `sys.path`.

They are kept in `.cache/hosts`. Wheels of newer Megatron-core ask for Python 3.12; their Python part runs on 3.11, so they are
unpacked rather than installed.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "hosts"
DEADLINE_S = 100.0


def folder_of(host: str, version: str) -> Path:
    """Folder with that version; fetched with pip if it is not there yet.

    Raises:
        subprocess.CalledProcessError: the package index does not give it.
    """
    folder = CACHE / f"{host}-{version}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            made = Path(name) / "made"
            (_unpacked if host == "megatron-core" else _installed)(host, version, Path(name), made)
            shutil.move(made, folder)  # whole or not at all
    return folder


def _unpacked(host: str, version: str, work: Path, made: Path) -> None:
    machine = os.uname().machine
    platforms = [f"--platform=manylinux_2_{glibc}_{machine}" for glibc in (39, 35, 34, 31, 28, 17)] + ["--platform=any"]
    _pip("download", "--only-binary=:all:", "--python-version=3.12", *platforms, f"--dest={work}", f"{host}=={version}")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made)


def _installed(host: str, version: str, work: Path, made: Path) -> None:
    _pip("install", "--no-build-isolation", "--no-compile", f"--target={made}", f"{host}=={version}")


def _pip(command: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", command, "--no-deps", *arguments],
        check=True,
        timeout=DEADLINE_S,
        env={**os.environ, "DS_BUILD_OPS": "0"},
        stdout=subprocess.DEVNULL,
    )


def run(host: str, version: str) -> str:
    """Runs `tests.compat.smoke` with a version of a host in a process of its own; its output.

    Raises:
        AssertionError: it failed; with the end of its output.
    """
    paths = [ROOT] if metadata.version(host) == version else [folder_of(host, version), ROOT]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.compat.smoke", host, version],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def pretend_triton() -> None:
    """Megatron-core imports Triton, which there is none of for CPUs."""
    for name in ("torch._dynamo", "torch._inductor.runtime.hints", "torch._inductor.runtime.triton_compat"):
        importlib.import_module(name)  # before there is a Triton to be found: they would want the real one
    sys.path.append(str(Path(__file__).parent / "stand_ins"))
