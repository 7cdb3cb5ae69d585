"""Exact refinement beside training: a worker process at low priority improves a plan while the old one runs.

The worker is a process, not a thread: the solver must neither hold the interpreter lock of a training rank nor take it
down with it. It hears the problem on its standard input and writes one JSON line for every better schedule; it ends
when it is done, when it is told to, and when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from adaptra_plugin.errors import PlanError
from adaptra_plugin.isolated import isolated_command, isolated_environment
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import assess
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.schedule.schedule import Schedule
from adaptra_plugin.schedule.tables import tabulate

MOST_S = 7 * 86400.0
"""Longest refinement (s)."""
GRACE_S = 30.0
"""How long a worker may take beyond its time limit (starting up, building the model) before it is ended."""
_TICK_S = 0.5
_WORDS = 4096
"""Of what a worker says on its standard error, the last bytes are kept."""
_WORKER = """
import os
os.nice(19)  # before the other imports: they are work too
from adaptra_plugin.schedule.refine_worker import main
main()
"""


class Refinement:
    """A running refinement of a plan. Use as a context manager, or call ``cancel``; both end the worker."""

    def __init__(self, profile: Profile, plan: Plan, *, seconds: float, seed: int = 0, workers: int = 2) -> None:
        """Starts the worker. Plans that are already optimal are done at once. Raises PlanError for a time limit
        that is not positive, for plans that do not fit the profile, and if no worker can be started."""
        if not 0 < seconds <= MOST_S:
            raise PlanError(f"exact planning for {seconds} s: expected a time above zero and at most {MOST_S:.0f} s")
        self._tables = tabulate(profile, plan.schedule.stage_rank)
        self._first = self._best = plan
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._error: str | None = None
        self._cancelled = False
        self._process: subprocess.Popen[bytes] | None = None
        self._done = threading.Event()
        if plan.optimal:
            self._done.set()
            return
        job = {
            "profile": profile.to_json(),
            "ranks": plan.ranks,
            "parent": os.getpid(),
            "until_unix": time.time() + seconds,  # starting the worker is part of its time
            "seed": seed,
            "workers": workers,
        }
        self._limit = seconds + GRACE_S
        self._start(json.dumps(job).encode() + b"\n")

    def _start(self, job: bytes) -> None:
        try:
            self._process = subprocess.Popen(
                isolated_command(_WORKER),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=isolated_environment(),
            )
        except OSError as error:
            raise PlanError(f"exact planning: no worker can be started ({error})") from None
        try:
            threading.Thread(target=self._listen, args=(job,), name="adaptra-refine", daemon=True).start()
        except RuntimeError as error:
            self._process.kill()
            self._process.wait()
            self._let_go()
            raise PlanError(f"exact planning: no thread can be started ({error})") from None

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

    def _listen(self, job: bytes) -> None:
        assert self._process is not None
        try:
            self._converse(self._process, job)
        except Exception as error:  # noqa: BLE001 - nobody may wait for a refinement whose listener has ended
            self._error = self._error or f"{type(error).__name__}: {error}"
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._let_go()

    def _let_go(self) -> None:
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        self._done.set()

    def _converse(self, process: subprocess.Popen[bytes], job: bytes) -> None:
        """Hands over the job and hears the worker until it ends."""
        words, finished = bytearray(), False
        for line in _talk(process, job, words, until=self._began + self._limit):
            finished = self._hear_line(line) or finished
        if process.poll() is None and time.perf_counter() >= self._began + self._limit:
            self._error = self._error or f"the worker has not ended within {self._limit:.0f} s"
            return
        process.wait()  # it has closed its output
        if not finished and not self._cancelled:
            self._error = self._error or _obituary(process.returncode, words)

    def _hear_line(self, line: bytes) -> bool:
        """Takes one line of the worker. True if it was its last one."""
        try:
            message = json.loads(line)
        except ValueError:
            return False  # a library that prints
        if not isinstance(message, dict):
            return False
        self._hear(message)
        return bool(message.get("done"))

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
            tie_broken = message["done"] and new.makespan_ms == old.makespan_ms < self._first.makespan_ms
            if new.makespan_ms >= old.makespan_ms and not tie_broken:
                new = assess(name, old.schedule, self._tables, bound_ms=message["bound_ms"], began=self._began)
            self._best = new


def refine(profile: Profile, plan: Plan, *, seconds: float, seed: int = 0, workers: int = 2) -> Plan:
    """The plan after at most ``seconds`` of exact refinement in a worker process, with bound and gap."""
    with Refinement(profile, plan, seconds=seconds, seed=seed, workers=workers) as refinement:
        return refinement.result()


def _talk(process: subprocess.Popen[bytes], job: bytes, words: bytearray, until: float) -> Iterator[bytes]:
    """Gives `job` to the process and yields the lines of its output, to its end or until then; `words` gets the last of what
    it says on its standard error. Nothing blocks: a process may be stopped, or full of words that nobody reads."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        for pipe, event in (
            (process.stdin, selectors.EVENT_WRITE),
            (process.stdout, selectors.EVENT_READ),
            (process.stderr, selectors.EVENT_READ),
        ):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, event)
        outputs = 2
        while outputs and time.perf_counter() < until:
            ready = selector.select(_TICK_S)
            if not ready and process.poll() is not None:
                return  # whoever else holds its pipes has nothing to say
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    job = job[_write(key.fd, job) :]
                    if not job:  # left open: its end tells the worker that nobody waits any more
                        selector.unregister(process.stdin)
                    continue
                read = os.read(key.fd, 1 << 16)
                if not read:
                    selector.unregister(key.fileobj)
                    outputs -= 1
                elif key.fileobj is process.stderr:
                    words += read
                    del words[:-_WORDS]
                else:
                    *lines, rest = (rest + read).split(b"\n")
                    yield from lines


def _write(fd: int, data: bytes) -> int:
    """Bytes written; all of them if nobody reads any more, which its exit code explains."""
    try:
        return os.write(fd, data[: 1 << 16])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(data)


def _obituary(code: int, words: bytearray) -> str:
    said = words.decode(errors="replace").strip()[-500:] or "without a word"
    if code >= 0:
        return f"the worker ended with exit code {code} ({said})"
    names = {number.value: number.name for number in signal.Signals}
    return f"the worker was killed by {names.get(-code, f'signal {-code}')} ({said})"
