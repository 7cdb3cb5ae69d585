"""Rank 0's side of a coordinator that runs in a process of its own.

In large jobs the reports of all ranks, and what is judged and planned from them, would take rank 0's interpreter from its
training thread. Here they are handed on as they come, unread. What the coordinator says comes back: messages to ranks, events,
and metrics. All that can be lost with the process is what a job can do without: the running plan goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from adaptra_plugin import isolated
from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.errors import TransportError
from adaptra_plugin.report import StragglerEvent
from adaptra_plugin.runtime.coordinator_frames import Frame, FrameReader, frame, json_frame, message_frames
from adaptra_plugin.runtime.messages import Abort, Commit, Message, Prepare, Refused, read
from adaptra_plugin.runtime.parts import Parts
from adaptra_plugin.runtime.switching import PlanBook
from adaptra_plugin.runtime.topology import COORDINATOR, Topology
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.shortage import told

logger = logging.getLogger("adaptra")

LOOK_S = 1.0
"""How often it is looked whether the process is still there, while it says nothing."""
STUCK_S = 60.0
"""A process that takes nothing for so long is given up. So no more than that waits for it."""
_WORKER = "adaptra_plugin.runtime.coordinator_worker"
_PART = "coordinator"


class CoordinatorProcess:
    """As `Coordinator` to who owns it. Args are those of `Coordinator`; `microbatches`: of an iteration."""

    def __init__(
        self,
        topology: Topology,
        config: AdaptraConfig,
        hosts: Mapping[int, str],
        *,
        send: Callable[[int, Message], None],
        on_event: Callable[[StragglerEvent], None],
        on_plan: Callable[[int, int, Plan, Profile, str], None],
        on_overview: Callable[[dict[str, Any]], None],
        book: PlanBook,
        microbatches: int,
    ) -> None:
        self._topology = topology
        self._hello = {
            "pipelines": topology.pipelines,
            "chunks": topology.chunks,
            "config": config.model_dump_json(),
            "hosts": [hosts[rank] for rank in range(topology.world_size)],
            "microbatches": microbatches,
            "schedule": None,
        }
        self._host = hosts[COORDINATOR]
        self._send, self._on_event, self._on_plan, self._on_overview = send, on_event, on_plan, on_overview
        self._book = book
        self._parts = Parts(self._part_event)
        self._waiting: deque[tuple[int, dict[str, Any]] | bytes | None] = deque()
        """Messages of ranks, and frames; None: the end."""
        self._bell = threading.Event()
        self._prepared: Prepare | None = None  # the newest plan that the ranks were sent
        self._undecided = False  # whether they wait for commit or abort of it
        self._asked_at = 0.0  # when they were sent it
        self._patience_s = min(STUCK_S, config.transport.deadline_s / 2)  # well before theirs ends
        self._complete = -1
        self._closing = self._over = False
        self._sock = socket.socket(socket.AF_UNIX)  # until `start`
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []

    # --- life

    def start(self) -> None:
        """Raises TransportError if no process can be started."""
        with told("the coordinator's process cannot be started", TransportError, 'set adaptra.coordinator to "thread"'):
            self._sock.close()
            self._sock, theirs = socket.socketpair()
            with theirs:
                self._sock.settimeout(STUCK_S)
                arguments = (str(theirs.fileno()), str(os.getpid()))
                self._process = isolated.start(
                    _WORKER, *arguments, deaf=True, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL
                )
            names = {"adaptra-coordinator": self._write, "adaptra-coordinator-news": self._listen}
            for name, target in names.items():
                thread = threading.Thread(target=target, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def close(self, last: int = -1, patience_s: float = 2.0, deadline_s: float = 5.0) -> None:
        """Ends the process; before that, waits up to `patience_s` for the ranks' reports of iteration `last`, which may
        still be on their way when this rank has finished."""
        until = time.monotonic() + patience_s
        while self._process is not None and not self._over and self.complete < last and time.monotonic() < until:
            time.sleep(0.01)
        self._closing = True
        self._put(None)
        if self._process is not None:
            try:
                self._process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel does not let go of it
                    self._process.wait(deadline_s)
        for thread in self._threads:
            thread.join(deadline_s)
        self._sock.close()

    def keep(self, schedule: str) -> None:
        """Before the first iteration: another schedule than configured is run."""
        self._put(frame(Frame.KEEP, 0, schedule.encode()))

    @property
    def complete(self) -> int:
        """The newest iteration that all ranks have reported."""
        return self._complete

    # --- to the process

    def relay(self, rank: int, data: dict[str, Any]) -> None:
        """A report or a vote of a rank, as it came; returns at once."""
        if not self._over:
            self._put((rank, data))

    def _write(self) -> None:
        """On a thread of its own: what waits goes in one piece, because each call lets go of the interpreter."""
        ended = False
        try:
            self._write_all(json_frame(Frame.HELLO, self._hello))
            while not ended:
                ended = self._write_waiting()
        except OSError as error:
            if isinstance(error, TimeoutError) and self._process is not None:
                logger.error("the coordinator's process has taken nothing for %.0f s and is ended", STUCK_S)
                self._process.kill()

    def _write_waiting(self) -> bool:
        """Waits for something to write. True at the end."""
        self._bell.wait()
        self._bell.clear()  # before anything is taken: what comes later rings again
        items = [self._waiting.popleft() for _ in range(len(self._waiting))]
        frames = [frame(Frame.BEGUN, self._book.begun), *(item for item in items if isinstance(item, bytes))]
        frames += message_frames([item for item in items if isinstance(item, tuple)])
        if None in items:
            frames.append(frame(Frame.CLOSE))
        self._write_all(b"".join(frames))
        return None in items

    def _write_all(self, data: bytes) -> None:
        """Raises TimeoutError: nothing is taken for `STUCK_S`."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._sock.send(rest) :]

    def _put(self, item: tuple[int, dict[str, Any]] | bytes | None) -> None:
        self._waiting.append(item)
        if not self._bell.is_set():
            self._bell.set()

    # --- from the process

    def _listen(self) -> None:
        reader = FrameReader(self._sock)
        news = select.poll()
        news.register(self._sock, select.POLLIN)
        why: Exception | str = "its process has ended"
        while True:
            try:
                if not news.poll(LOOK_S * 1e3):
                    self._look_after()
                    continue
                for kind, number, payload in reader.receive():
                    with self._parts.guard("news of the coordinator", "one is passed over"):
                        self._take(kind, number, payload)
            except (EOFError, OSError):
                break
            except ValueError as error:
                why = error
                break
        self._over = True
        if not self._closing:
            self._lost(why)

    def _look_after(self) -> None:
        """Ranks that wait for commit or abort would do so in vain if the process stood still. Raises EOFError: it has ended, and its
        end of the socket is held by a child that was forked from this process meanwhile."""
        process = self._process
        assert process is not None
        if process.poll() is not None:
            raise EOFError
        if self._undecided and time.monotonic() - self._asked_at > self._patience_s:
            logger.error(
                "the coordinator's process has not decided on a plan for %.0f s and is ended", self._patience_s
            )
            process.kill()

    def _take(self, kind: Frame, number: int, payload: bytes) -> None:
        if kind is Frame.COMPLETE:
            self._complete = number
            return
        data = json.loads(payload)
        if kind is Frame.SEND:
            message = read(data["message"])
            if isinstance(message, Refused):
                raise ValueError(f"the coordinator's own message is refused: {message.why}")
            self._send_all(message, data["ranks"])
        elif kind is Frame.EVENT:
            self._on_event(StragglerEvent.from_json(data))
        elif kind is Frame.OVERVIEW:
            self._on_overview(data)
        elif kind is Frame.PLAN and self._prepared is not None and self._prepared.version == number:
            made = self._prepared
            self._on_plan(number, data["first_iteration"], made.plan, made.profile, data["reason"])

    def _send_all(self, message: Message, ranks: list[int]) -> None:
        if isinstance(message, Prepare):
            self._prepared, self._undecided, self._asked_at = message, True, time.monotonic()
        elif isinstance(message, Commit | Abort):
            self._undecided = False
        for rank in ranks:
            # whatever one rank does not get, the others need: commit and abort hold for all
            with self._parts.guard(f"messages to rank {rank}", "it did not get one"):
                self._send(rank, message)

    def _lost(self, why: Exception | str) -> None:
        """The process is gone. Nobody is left waiting for commit or abort."""
        process = self._process
        assert process is not None
        process.kill()  # in case it only says nonsense
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(STUCK_S)
        if self._undecided and self._prepared is not None:
            self._send_all(Abort(version=self._prepared.version), list(range(self._topology.world_size)))
        instead = "nothing is detected or planned any more, and training goes on with the running plan"
        logger.error("the coordinator's process is lost: %s: %s (exit code %s)", instead, why, code)
        self._parts.lost(_PART, instead, f"{why} (exit code {code})")

    def _part_event(self, part: str, state: Any, text: str) -> None:
        version = self._prepared.version if self._prepared is not None else 0
        common = {"iteration": max(self._complete, 0), "action": text, "plan_version": version}
        self._on_event(StragglerEvent.of_part(part, state, COORDINATOR, self._host, **common))
