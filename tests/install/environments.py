"""Clean environments with the project's wheel in them, made by the commands of README.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r'^ {4}(pip install torch (\S+) && pip install "\.\[\S+\]")$', re.MULTILINE)


def commands() -> dict[str, str]:
    """README's command of each host, by the host's distribution."""
    return {match[2]: match[1] for match in COMMAND.finditer((ROOT / "README.md").read_text())}


@dataclass(frozen=True)
class Environment:
    """A virtual environment. `log` is what its installation said."""

    folder: Path
    log: str = ""

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def run(self, command: str, cwd: Path, deadline_s: float = 600.0, **more: str) -> str:
        """What a shell command says, with this environment in front of the path and nothing of the one around it.
        Fails the test if it ends with an error."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.folder),
        }
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **more}
        began = time.monotonic()
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, code = process.communicate(timeout=deadline_s)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # launchers and ranks, too
            said, code = process.communicate()[0], None
        took = f"{time.monotonic() - began:.0f} s"
        print(f"{took}: {command}")
        assert code == 0, f"{command}\nended with {code} after {took}:\n{said[-6000:]}"
        return said

    def json(self, command: str, cwd: Path) -> Any:
        """As `run`, for what prints JSON on standard output."""
        return json.loads(self.run(f"{command} 2>{cwd / 'stderr.txt'}", cwd))


def build_wheel(folder: Path) -> Path:
    """A wheel, made of a source distribution, made of what git would commit: nothing that lies around gets in."""
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file() or path.is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, source / name, follow_symlinks=False)
    _python(source, "setup.py", "-q", "sdist", "--dist-dir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    _python(folder, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-deps", str(archive))
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(folder: Path, command: str) -> Environment:
    """A new environment in which the command was run. torch and what it requires were there already, as `make install` has
    installed and Python compiled them: unpacking that takes longer than all else."""
    _python(folder.parent, "-m", "venv", "--without-pip", str(folder))
    environment = Environment(folder)
    for distribution in map(metadata.distribution, ("pip", *_required("torch"))):
        home = Path(str(distribution.locate_file("")))
        # `__pycache__`: that of modules without a folder, of all distributions
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if (home / name).is_dir():
                shutil.copytree(home / name, environment.packages / name, copy_function=_link)
            else:
                _link(home / name, environment.packages / name)
        for entry in distribution.entry_points.select(group="console_scripts"):
            module, _, function = entry.value.partition(":")
            script = folder / "bin" / entry.name
            script.write_text(f"#!{environment.python}\nimport {module}, sys\nsys.exit({module}.{function}())\n")
            script.chmod(0o755)
    return Environment(folder, environment.run(command, folder, PIP_NO_COMPILE="1"))


_COMPILER = """#!/bin/sh
source= object= before=
for word; do
    case "$before" in -c) source=$word ;; -o) object=$word ;; esac
    before=$word
done
[ -n "$source" ] && cp "{kept}/$object" "$object" 2>/dev/null || exec {real} "$@"
"""


def compiler(folder: Path, kept: Path) -> Path:
    """A compiler that takes objects from the folder `kept` where they are there, for sources and flags that are the same: those
    of DeepSpeed's all-reduce take a minute and a half of CPU. It compiles all else."""
    folder.mkdir()
    script = folder / "g++"
    script.write_text(_COMPILER.format(kept=kept.resolve(), real=shutil.which("g++")))
    script.chmod(0o755)
    return script


def _required(name: str, found: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The distribution and all that it requires, without extras."""
    found += (name,)
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        other = canonicalize_name(requirement.name)
        if other not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found = _required(other, found)
    return found


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _python(cwd: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
