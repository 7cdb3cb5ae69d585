"""The process of a W&B run of our own; run as a file, it needs nothing of the package.

It ends when it is told to, and when its parent is gone, whatever W&B's server does: at most UPLOAD_S later, and what has
not been uploaded by then lies in the run's folder.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROBE_S = 3.0
"""Longest time for the server to answer anything at all."""
INIT_S = 20.0
"""Longest time for it to open a run."""
LOGIN_S = 2.0
UPLOAD_S = 5.0
"""Longest time at the end for it to take what is left."""
LAST_S = 15
"""After this time the process ends even if W&B does not come back."""


def main() -> None:
    task = json.loads(sys.argv[1])
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # the trainer's to handle; its end is ours
    commands, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # W&B prints, and may ask
        os.dup2(nothing, standard)
    # W&B is the one that the parent has; before it there is only the standard library
    sys.path[:] = [path for path in sys.path if is_standard(path)] + task["paths"]
    say = Speaker(answers)
    try:
        live(opened(task, say), messages(commands, task["parent"]), say)
    except BaseException as error:  # noqa: BLE001 - a broken installation may raise anything; the parent logs it
        say(failed=f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)  # W&B's exit handler would wait again


def live(run: Any, commands: Iterator[dict[str, Any]], say: Speaker) -> None:
    code = 1  # of a trainer that was killed
    for message in commands:
        if "end" in message:
            code = 0
            break
        obey(run, message)
    signal.alarm(LAST_S)  # its default action needs nothing of the interpreter
    began = time.monotonic()
    run.finish(exit_code=code)
    if time.monotonic() - began >= UPLOAD_S:
        say(late=UPLOAD_S, where=folder(run))


def is_standard(path: str) -> bool:
    standard = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    return Path(path).suffix == ".zip" or Path(path).name == "lib-dynload" or path in standard


class Speaker:
    """Writes JSON lines to a parent that may be gone."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __call__(self, **message: Any) -> None:
        try:
            os.write(self._file, json.dumps(message).encode() + b"\n")
        except OSError:
            pass


def opened(task: dict[str, Any], say: Speaker) -> Any:
    """The run: online if that can be had, else offline."""
    wandb = importlib.import_module("wandb")
    mode, why = task["mode"], None
    settings = wandb.setup().settings
    if settings.mode == "disabled":
        mode = settings.mode  # in whatever way it is started
    if mode == "auto":
        mode = settings.mode
        if mode not in ("offline", "dryrun", "disabled"):
            mode, why = "online", unreachable(str(settings.base_url))
            if why is None:
                try:
                    return announced(begin(wandb, task, "online"), "online", None, say)
                except Exception as error:  # noqa: BLE001 - no login, no network, no server: each has an error type of its own
                    why = f"{type(error).__name__}: {error}"
            mode = "offline"
    return announced(begin(wandb, task, mode), mode, why, say)


def begin(wandb: Any, task: dict[str, Any], mode: str) -> Any:
    basic = {"console": "off", "login_timeout": LOGIN_S, "init_timeout": INIT_S}
    try:
        settings = wandb.Settings(**basic, finish_timeout=UPLOAD_S)
    except Exception:  # noqa: BLE001 - before W&B 0.27: LAST_S is the only limit
        settings = wandb.Settings(**basic)
    run = wandb.init(project=task["project"], mode=mode, settings=settings)
    axis = "adaptra/iteration"
    run.define_metric(axis, hidden=True)
    run.define_metric("adaptra/*", step_metric=axis)
    return run


def announced(run: Any, mode: str, why: str | None, say: Speaker) -> Any:
    say(open=mode, where=run.url if mode == "online" else folder(run), why=why)
    return run


def folder(run: Any) -> str:
    return str(Path(run.dir).parent)


def unreachable(base_url: str) -> str | None:
    """Why the server does not answer; None: it does. W&B itself would try for a long time, and leave an empty run behind."""
    requests = importlib.import_module("requests")
    try:
        requests.get(base_url, timeout=PROBE_S, allow_redirects=False, stream=True).close()
    except requests.exceptions.SSLError:
        pass  # W&B has settings of its own for certificates
    except requests.exceptions.RequestException as error:
        return f"{base_url} does not answer: {str(error)[:300]}"
    return None


def messages(file: int, parent: int) -> Iterator[dict[str, Any]]:
    """What the parent says, until it has gone. Its forked children may hold the pipe open, so the pipe's end is not enough."""
    rest = b""
    while True:
        ready, _, _ = select.select([file], [], [], 1.0)
        data = os.read(file, 65536) if ready else b""
        if not data and (ready or os.getppid() != parent):
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def obey(run: Any, message: dict[str, Any]) -> None:
    if "alert" in message:
        title, text, level = message["alert"]
        run.alert(title, text, level=level)
        return
    row = {key: value for key, value in message["row"].items() if value is not None}
    table = message.get("table")
    if table is not None:
        row[table["name"]] = importlib.import_module("wandb").Table(columns=table["columns"], data=table["data"])
    run.log(row)


if __name__ == "__main__":
    main()
