"""Exact refinement beside training: a worker process at low priority improves a plan while the old one runs.

The worker is a process, not a thread: the solver must neither hold the interpreter lock of a training rank nor take it
down with it. It hears the problem on its standard input and writes one JSON line for every better schedule; it ends
when it is done, when it is told to, and when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import assess
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.tables import tabulate

MOST_S = 7 * 86400.0
"""Longest refinement (s)."""
GRACE_S = 30.0
"""How long a worker may take beyond its time limit (starting up, building the model) before it is ended."""


class Refinement:
    """A running refinement of a plan. Use as a context manager, or call ``cancel``; both end the worker."""

    def __init__(self, profile: Profile, plan: Plan, *, seconds: float, seed: int = 0, workers: int = 2) -> None:
        """Starts the worker. Plans that are already optimal are done at once. Raises PlanError for a time limit
        that is not positive and for plans that do not fit the profile."""
        if not 0 < seconds <= MOST_S:
            raise PlanError(f"exact planning for {seconds} s: expected a time above zero and at most {MOST_S:.0f} s")
        self._tables = tabulate(profile, plan.schedule.stage_rank)
        self._first = self._best = plan
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._error: str | None = None
        self._cancelled = False
        self._process: subprocess.Popen[str] | None = None
        self._done = threading.Event()
        if plan.optimal:
            self._done.set()
            return
        # the package's own parent first: the worker must find the same code, wherever the trainer was started
        home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "adaptra_plugin.schedule.refine_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )
        job = {
            "profile": profile.to_json(),
            "ranks": plan.ranks,
            "parent": os.getpid(),
            "until_unix": time.time() + seconds,  # starting the worker is part of its time
            "seed": seed,
            "workers": workers,
        }
        self._limit = seconds + GRACE_S
        threading.Thread(target=self._listen, args=(json.dumps(job),), name="adaptra-refine", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether the worker has ended."""
        return self._done.is_set()

    @property
    def best(self) -> Plan:
        """The best plan so far, with the best bound so far."""
        with self._lock:
            return self._best

    def result(self, timeout: float | None = None) -> Plan:
        """Waits until the worker has ended, at most ``timeout`` seconds; the best plan by then.

        Raises PlanError with the worker's message where it failed.
        """
        self._done.wait(self._limit if timeout is None and self._process else timeout)
        if timeout is None:
            self.cancel()
        if self._error is not None:
            raise PlanError(f"exact planning failed: {self._error}")
        return self.best

    def cancel(self) -> None:
        """Ends the worker; the best plan so far stays. Does nothing when it has ended."""
        process = self._process
        if process is not None and process.poll() is None:
            self._cancelled = True
            process.kill()
        if process is not None:
            process.wait()
            self._done.wait()

    def __enter__(self) -> Refinement:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.cancel()

    def _listen(self, job: str) -> None:
        process = self._process
        assert process is not None and process.stdin is not None
        assert process.stdout is not None and process.stderr is not None
        finished = False
        try:
            process.stdin.write(job + "\n")
            process.stdin.flush()  # left open: its end tells the worker that nobody waits any more
            for line in process.stdout:
                message = json.loads(line)
                finished = finished or bool(message.get("done"))
                self._hear(message)
            last = process.stderr.read()[-500:].strip()
            code = process.wait()
            if not finished and not self._cancelled:
                self._error = self._error or f"the worker ended with exit code {code} ({last or 'without a word'})"
        except Exception as error:  # noqa: BLE001 - nobody may wait for a refinement whose listener has ended
            if process.poll() is None:
                process.kill()
            if not self._cancelled:  # the pipes of a worker that was ended break
                self._error = f"{type(error).__name__}: {error}"
        finally:
            for pipe in (process.stdin, process.stdout, process.stderr):
                try:
                    pipe.close()
                except OSError:
                    pass  # the worker was ended with its job still in the pipe
            self._done.set()

    def _hear(self, message: dict[str, Any]) -> None:
        if "error" in message:
            self._error = message["error"]
            return
        with self._lock:
            old = self._best
            schedule = old.schedule if message["ranks"] is None else Schedule.from_text(message["ranks"])
            if any(held > cap for held, cap in zip(schedule.peak_activations, self._tables.cap.tolist(), strict=True)):
                schedule = old.schedule  # the bound still counts
            name = old.name
            new = assess(name, schedule, self._tables, bound_ms=message["bound_ms"], began=self._began)
            # an equally short schedule is no reason to change; the last one replaces those found on the way to it
            settled = message["done"] and new.makespan_ms == old.makespan_ms < self._first.makespan_ms
            if new.makespan_ms >= old.makespan_ms and not settled:
                new = assess(name, old.schedule, self._tables, bound_ms=message["bound_ms"], began=self._began)
            self._best = new


def refine(profile: Profile, plan: Plan, *, seconds: float, seed: int = 0, workers: int = 2) -> Plan:
    """The plan after at most ``seconds`` of exact refinement in a worker process, with bound and gap."""
    with Refinement(profile, plan, seconds=seconds, seed=seed, workers=workers) as refinement:
        return refinement.result()
