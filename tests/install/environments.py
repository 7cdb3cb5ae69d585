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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
"""What `make install` installs first, and for the same reason."""
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


def torch_alone(folder: Path) -> Environment:
    """An environment with torch and what it requires; unpacking that takes longer than all else."""
    _python(folder.parent, "-m", "venv", str(folder))
    environment = Environment(folder)
    environment.run(f"pip install -q {TORCH}", folder, PIP_NO_COMPILE="1")
    return environment


def installed(base: Environment, folder: Path, command: str) -> Environment:
    """A new environment in which the command was run; torch was there already, in files shared with `base`."""
    _python(folder.parent, "-m", "venv", "--without-pip", str(folder))
    environment = Environment(folder)
    shutil.copytree(base.packages, environment.packages, copy_function=os.link, dirs_exist_ok=True)
    for script in (base.folder / "bin").iterdir():
        target = folder / "bin" / script.name
        if not target.exists() and script.read_bytes().startswith(b"#!"):
            target.write_text(script.read_text().replace(str(base.folder), str(folder)))
            target.chmod(0o755)
    return Environment(folder, environment.run(command, folder, PIP_NO_COMPILE="1"))


def _python(cwd: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
