"""Starts helper processes that no file of the user's can break.

`python -m` and `-c` look into the working directory, and into the folders of PYTHONPATH, before the standard library: a
`signal.py` or `queue.py` that lies there would be imported instead of Python's. A helper looks where this process looks,
in another order: the standard library, what has been installed, then everything else. Its own package is the one that this
process has loaded, wherever that lies.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_HOME = str(Path(__file__).resolve().parents[1])
"""Where the package lies."""
_BOOT = """
import sys  # a part of the interpreter, as _signal is: neither is looked for
library = sys.path[:] = [path for path in sys.path if path]
import site
site.main()  # hooks of installed packages
import importlib.machinery, importlib.util, json
home, paths = sys.argv[-2], json.loads(sys.argv[-1])
del sys.argv[-2:]
sys.path[:] = library + [path for path in paths if path not in library]
spec = importlib.machinery.PathFinder.find_spec("adaptra_plugin", [home])
package = sys.modules["adaptra_plugin"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
"""
_DEAF = """
import _signal
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
    _signal.signal(getattr(_signal, name), _signal.SIG_IGN)
"""
_MODULE = """
import runpy
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_KEPT = frozenset(
    {"PYTHONHOME", "PYTHONPLATLIBDIR", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED"}
    | {"PYTHONNOUSERSITE", "PYTHONUSERBASE", "PYTHONUTF8", "PYTHONCOERCECLOCALE"}
)


def start(module: str, *arguments: str, deaf: bool = False, **options: Any) -> subprocess.Popen[Any]:
    """Runs a module as `python -m` does. `deaf`: signals to the whole job (Ctrl-C, a scheduler's SIGTERM) are ignored from the
    first moment on. `options`: of `Popen`, whose `env` is `isolated_environment()` otherwise.

    Raises:
        OSError: no process can be started.
    """
    options.setdefault("env", isolated_environment())
    command = isolated_command(_MODULE, module, *arguments)
    if deaf:
        command[command.index("-c") + 1] = _DEAF + command[command.index("-c") + 1]
    return subprocess.Popen(command, **options)


def isolated_command(code: str, *arguments: str) -> list[str]:
    """The command that runs code as `python -c` does; `sys.argv[1:]` are the arguments there. Run it with
    `isolated_environment`. Raises OSError."""
    if not sys.executable:
        raise OSError(errno.ENOENT, "this process does not know its Python (sys.executable is empty)")
    flags = {"-s": sys.flags.no_user_site, "-E": sys.flags.ignore_environment, "-B": sys.dont_write_bytecode}
    return [
        *(sys.executable, *(flag for flag, given in flags.items() if given)),
        *("-S", "-c", _BOOT + code, *arguments, _HOME, json.dumps(search_path())),
    ]


def isolated_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what changes how an interpreter starts, but for where its own files lie."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") or name in _KEPT}
    return kept | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} | changes  # a helper that meets torch loads no plug-ins


def search_path() -> list[str]:
    """The folders of `sys.path`: those that packages have been installed into, then the others, each in their order."""
    found = []
    for entry in sys.path:
        try:
            found.append(os.path.abspath(entry))  # noqa: PTH100  keeps links: what lies beside a link counts
        except (OSError, TypeError):
            pass  # a relative one, and the working directory is gone; or nothing that the import system would use
    return sorted(dict.fromkeys(found), key=lambda folder: not _is_installation(folder))


def _is_installation(folder: str) -> bool:
    """A folder into which things are installed. That of a project which is installed in place is none, though it has an
    `.egg-info`: the user's own files lie there."""
    if os.path.basename(folder) in ("site-packages", "dist-packages") or folder.endswith(".egg"):  # noqa: PTH119
        return True
    try:
        return any(name.endswith(".dist-info") for name in os.listdir(folder))  # noqa: PTH208
    except OSError:
        return False
