"""A W&B run of our own, in a process of its own.

In the training process it could not be kept apart from what the user does there: `wandb.init()` returns whichever run is
open, `wandb.finish()` and `wandb.teardown()` end what they find, and W&B's exit handler waits for a server that does not
answer. The process hears JSON lines on its standard input, and outlives a training process that is killed for as long
as it takes to write down what it has.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptra_plugin.report.jsonl import encode

_WORKER = Path(__file__).resolve().with_name("wandb_own_worker.py")  # now: a relative path does not outlive a chdir
_PIPE_BYTES = 1 << 20
_START_S = 60.0
"""Longest time for a run to be opened; W&B's own limit, below it, is the worker's."""
_SHORT_START_S = 6.0
"""... where training ends before that. Starting Python and loading W&B takes 2 s of it."""
_END_S = 20.0
"""Longest time that the worker may take to finish, in which W&B may upload for `wandb_own_worker.UPLOAD_S`."""
_NOT_OURS = (
    *("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_SWEEP_ID"),
    *("WANDB_SWEEP_PARAM_PATH", "WANDB_LAUNCH", "WANDB_REINIT"),
)
"""Environment variables that mean the run of the user's script: ours must not resume it, or live in its service."""


def _somewhere() -> str | None:
    """Where the files of a run can lie if its folder is gone: None: here."""
    return None if os.path.isdir(".") and os.access(".", os.W_OK) else tempfile.gettempdir()  # noqa: PTH112


class OwnRun:
    """Everything that is said to the process. One thread calls."""

    def __init__(self, project: str, directory: str | None, most: int, logger: logging.Logger) -> None:
        """Starts the process.

        Args:
            project: W&B project.
            directory: working directory, under which W&B puts its files; None: that of this process.
            most: messages kept until the run is open.
            logger: for the line that says where the run is.

        Raises:
            ImportError: W&B is not installed.
            OSError: no process can be started.
        """
        if importlib.util.find_spec("wandb") is None:
            raise ImportError("wandb is not installed: pip install 'adaptra-plugin[wandb]'")
        self._project = project
        self._directory = directory
        self._logger = logger
        self._kept: deque[bytes] = deque(maxlen=most)  # what a second process would have to hear again
        self._heard = b""
        self._open = False
        self._said_end = False
        self._tries = 0
        self.where: str | None = None
        """Address of the run, or the folder of an offline one, once it is open."""
        self._start("auto")

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Mapping[str, Any]) -> None:
        """Takes a row (with or without a table) or an alert.

        Raises:
            RuntimeError: the process has ended.
        """
        line = encode(message)
        if self._open:
            self._write(line)
        else:
            self._kept.append(line)
            self.pump()

    def pump(self) -> None:
        """Hears what the process says.

        Raises:
            RuntimeError: it cannot open a run.
        """
        self._listen(0.0)
        if not self._open and (self._ended() or time.monotonic() > self._started + _START_S):
            self._start_again(f"no answer within {_START_S:.0f} s")
        if self._open:
            while self._kept:
                self._write(self._kept.popleft())

    def finish(self) -> None:
        """Says that this was all, and waits until the run is finished, `_SHORT_START_S + _END_S` at most."""
        try:
            self._finish()
        finally:
            self.kill()

    def _finish(self) -> None:
        self.pump()
        if not self._open:
            self._say_all()  # at once: this process may end before it hears that the run is open
            until = self._started + _SHORT_START_S
            while not self._open and not self._ended() and time.monotonic() < until:
                self._listen(0.1)
            if not self._open:
                self._start_again(f"no answer within {time.monotonic() - self._started:.0f} s, and training has ended")
        if not self._said_end:
            self._say_all()
        until = time.monotonic() + _END_S
        while not self._ended() and time.monotonic() < until:
            self._listen(0.1)
        self._listen(0.0)
        if not self._open:
            raise RuntimeError(f"the process of the run {self._end()}")

    def kill(self) -> None:
        """Ends the process at once; W&B's service notices and ends too."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what it has not read is lost
                assert pipe is not None
                pipe.close()

    def _start(self, mode: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
        directory = self._directory if self._directory is not None and Path(self._directory).is_dir() else _somewhere()
        # Isolated: no name of the working directory or the user's paths takes the place of the standard library's.
        # W&B is found where this process finds it.
        paths = [str(Path(self._directory or "/") / path) for path in sys.path if isinstance(path, str) and path]
        task = {"project": self._project, "mode": mode, "parent": os.getpid(), "paths": paths}
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER), json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env=environment,
            start_new_session=True,  # a Ctrl-C is the trainer's
        )
        self._started = time.monotonic()
        self._heard = b""
        self._tries += 1
        self._said_end = False
        assert self._process.stdin is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        with contextlib.suppress(OSError):  # more than this user may have: it stays as large as it is
            fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def _start_again(self, why: str) -> None:
        """Offline, which needs nobody else; once."""
        why = why if self._process.poll() is None else f"the process of the run {self._end()}"
        self.kill()
        if self._tries > 1:
            raise RuntimeError(why)
        self._logger.warning("report: no W&B run online (%s); writing an offline one", why)
        self._start("offline")

    def _say_all(self) -> None:
        """All that is kept (and stays so until the run is open), and that there is no more."""
        with contextlib.suppress(RuntimeError):  # it has ended: found out by whoever waits for it
            for line in self._kept:
                self._write(line)
            self._write(encode({"end": True}))
        self._said_end = True

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            while data:
                data = data[os.write(self._process.stdin.fileno(), data) :]
        except BrokenPipeError:
            self._listen(0.0)  # it may have said why
            raise RuntimeError(f"the process of the run {self._end()}") from None

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"has ended with exit code {self._process.wait(1.0)}"
        return "does not listen"

    def _ended(self) -> bool:
        if self._process.poll() is None:
            return False
        self._listen(0.0)
        return True

    def _listen(self, timeout_s: float) -> None:
        """Reads what the process has said; waits for it for up to `timeout_s`."""
        assert self._process.stdout is not None
        until = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(BlockingIOError):
                data = os.read(self._process.stdout.fileno(), 65536)
                if data:
                    self._heard += data
            *lines, self._heard = self._heard.split(b"\n")
            for line in lines:
                self._hear(json.loads(line))
            if lines or time.monotonic() >= until:
                return
            time.sleep(0.02)

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "failed" in message:
            raise RuntimeError(str(message["failed"]))
        if "open" in message:
            self._open = True
            self.where = message["where"]
            if message["why"] is not None:
                self._logger.warning(
                    "report: no W&B run online (%s); writing an offline one in %s", message["why"], self.where
                )
            elif message["open"] != "disabled":
                self._logger.info("report: W&B run %s", self.where)
        elif "late" in message:
            self._logger.warning(
                "report: W&B has not taken everything within %g s; `wandb sync %s` uploads the rest",
                message["late"],
                message["where"],
            )
