"""The control plane of large jobs, with simulated ranks in one process.

    python -m benchmarks.scale [--ranks 64 256 1024] [--stages 16] [--iterations 30]

What rank 0's training process does for the others is real: reports are read from the bytes that its proxy hands it, put together,
judged, and answered with plans; plans are encoded as they would be sent, and read once by a rank. Simulated are the ranks
themselves, their proxies and the network: every rank is a plan book in this process. So times are those of rank 0's interpreter
(CPU time of the process while it works for the others), and of one other rank where that is said.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import psutil

from adaptra_plugin.config import parse_config
from adaptra_plugin.detect import IterationReport, LinkDelay, StageTimes
from adaptra_plugin.report import StragglerEvent
from adaptra_plugin.runtime.coordinator import Coordinator
from adaptra_plugin.runtime.coordinator_process import CoordinatorProcess
from adaptra_plugin.runtime.deciding import Candidate
from adaptra_plugin.runtime.messages import Abort, Commit, Message, Prepare, Refused, Report, Vote, read
from adaptra_plugin.runtime.routing import Router
from adaptra_plugin.runtime.starting import has_own_process
from adaptra_plugin.runtime.switching import PlanBook, SwitchLeader
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.prepare import prepare
from adaptra_plugin.schedule.profile import Profile, StageProfile
from adaptra_plugin.transport import bridge
from adaptra_plugin.transport.control import encode_control
from benchmarks.planner import large

MICROBATCHES = 64
DEADLINE_S = 60.0
SLOW_MS = 60.0
"""Delay of the link that turns slow."""


class Stream:
    """Rank 0's end of the control stream, with what its proxy has written."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def recvmsg(self, limit: int, space: int, flags: int) -> tuple[bytes, list[Any], int, None]:
        found, self._data = bytes(self._data[:limit]), self._data[limit:]
        return found, [], 0, None


def handed_over(messages: Sequence[tuple[int, dict[str, Any]]]) -> bytes:
    """Control messages of ranks as rank 0's proxy hands them to its endpoint when they come together."""
    batches = [messages[at : at + bridge.MOST_TOGETHER] for at in range(0, len(messages), bridge.MOST_TOGETHER)]
    return b"".join(bridge.encode({"event": "control", "messages": batch}) for batch in batches)


def read_all(wire: bytes, receive: Callable[[int, Any], None]) -> None:
    """What an endpoint does with them."""
    reader = bridge.Reader(Stream(wire))  # type: ignore[arg-type]
    while (found := reader.receive()) is not None:
        for event, _ in found:
            for rank, message in event["messages"]:
                receive(rank, message)


class Job:
    """Rank 0 as it is, and the other ranks as plan books.

    Attributes:
        sent: bytes of control messages from rank 0, per rank.
        received: bytes of control messages to rank 0.
    """

    def __init__(self, stages: int, replicas: int, mode: Literal["auto", "thread", "process"]) -> None:
        self.topology = Topology.of(0, [[replica + replicas * s for s in range(stages)] for replica in range(replicas)])
        self.places = [self.topology.place(rank) for rank in range(stages * replicas)]
        first = Profile(1, (StageProfile(1.0, 1.0, 1.0),) * stages)
        self.books = [PlanBook(first, "slack-adaptive", 30.0) for _ in self.places]
        self.committed: list[int] = []
        """First iterations of committed plans."""
        self.events: list[StragglerEvent] = []
        self.sent = self.received = 0
        self._mail: list[tuple[int, str]] = []  # on its way to the simulated ranks
        self._answers: list[tuple[int, Message]] = []
        self._read: dict[str, Message | Refused] = {}
        self.router = Router(0, transmit=self._transmit, silent=lambda: False)
        config = parse_config({"coordinator": mode})
        common: dict[str, Any] = {
            "hosts": {rank: f"node{rank // 8:04}" for rank in range(len(self.places))},
            "send": self.router.send,
            "on_event": self.events.append,
            "on_plan": lambda *_: None,
            "on_overview": lambda metrics: None,
            "book": self.books[0],
        }
        self.process: psutil.Process | None = None
        if has_own_process(config, self.topology):
            own = CoordinatorProcess(self.topology, config, microbatches=1, **common)
            self.router.relay(own.relay, Report, Vote)
            own.start()
            assert own._process is not None
            self.process = psutil.Process(own._process.pid)
            self.coordinator: Coordinator | CoordinatorProcess = own
        else:
            self.coordinator = Coordinator(self.topology, config, limits=[None] * stages, **common)
            self.router.route(self.coordinator.handle, Report, Vote, refused=True)
        self.router.route(lambda rank, message: self._deliver(0, message), Prepare, Commit, Abort)

    def _transmit(self, rank: int, data: dict[str, Any]) -> None:
        text = encode_control(data)
        bridge.encode({"op": "control", "rank": rank, "message": text})
        self.sent += len(text)
        self._mail.append((rank, text))

    def _deliver_all(self) -> None:
        mail, self._mail = self._mail, []
        for rank, text in mail:
            if text not in self._read:  # the same for all ranks
                self._read[text] = read(json.loads(text))
            self._deliver(rank, self._read[text])

    def _deliver(self, rank: int, message: Any) -> None:
        """A message has come to a simulated rank."""
        book = self.books[rank]
        if isinstance(message, Prepare | Refused):
            self._answers.append((rank, book.vote(message, self.topology)))
            self._first = message.first_iteration if isinstance(message, Prepare) else -1
        elif isinstance(message, Commit):
            book.commit(message.version)
            if rank == 0:
                self.committed.append(self._first)
        elif isinstance(message, Abort):
            book.abort(message.version)

    def iteration(self, index: int, slow: tuple[int, int, int] | None) -> None:
        """One iteration of all ranks; `slow`: (replica, stage, stage) of a slow link. After it, `ms` is what it cost rank 0's
        interpreter, and `bytes` what the ranks have sent."""
        versions = [book.begin(index, MICROBATCHES)[0] for book in self.books]
        reports = [Report.of(self._report(rank, index, version, slow)) for rank, version in enumerate(versions)]
        received = self.received
        self.ms = self.cpu_ms(lambda: self.router.send(0, reports[0]), lambda: True)
        self.ms += self.arrive(list(enumerate(reports))[1:], lambda: self.coordinator.complete >= index)
        self.bytes = self.received - received
        while self._mail or self._answers:
            self._deliver_all()
            answers, self._answers = self._answers, []
            own = [answer for answer in answers if answer[0] == 0]
            self.ms += sum(self.cpu_ms(lambda a=a: self.router.send(*a), lambda: True) for a in own)  # type: ignore[misc]
            # commit or abort follows the last vote
            self.ms += self.arrive([a for a in answers if a[0]], lambda a=answers: not a or bool(self._mail))  # type: ignore[misc]

    @property
    def process_ms(self) -> float:
        """CPU time (ms) of the coordinator's own process so far."""
        return sum(self.process.cpu_times()[:2]) * 1e3 if self.process is not None else 0.0

    def arrive(self, messages: Sequence[tuple[int, Message]], answered: Callable[[], bool]) -> float:
        """Messages of ranks to rank 0; what they cost its interpreter (ms) until they are `answered`."""
        handed = [(rank, message.to_json()) for rank, message in messages]
        self.received += sum(len(encode_control(data)) for _, data in handed)
        wire = handed_over(handed)
        return self.cpu_ms(lambda: read_all(wire, self.router.receive), answered)

    @staticmethod
    def cpu_ms(work: Callable[[], object], done: Callable[[], bool] = lambda: True) -> float:
        """CPU time of this process, with all its threads, until the work is done."""
        began, until = time.process_time(), time.monotonic() + DEADLINE_S
        work()
        worked = time.thread_time()
        while not done():
            time.sleep(0.02)
            if time.monotonic() > until:
                raise SystemExit(f"no answer within {DEADLINE_S:.0f} s")
        looked = time.thread_time() - worked  # again and again, whether it is done
        return (time.process_time() - began - looked) * 1e3

    def _report(self, rank: int, index: int, version: int, slow: tuple[int, int, int] | None) -> IterationReport:
        replica, stage = self.places[rank]
        wobble = 1 + 0.002 * ((rank * 7919 + index * 104729) % 101 - 50) / 50
        links = []
        for other in (stage - 1, stage + 1):
            if 0 <= other < self.topology.length:
                late = slow == (replica, min(stage, other), max(stage, other))
                links.append(LinkDelay(other, stage, SLOW_MS if late else 0.4 * wobble, MICROBATCHES, 8 << 20))
        times = (StageTimes(10.0 * wobble, 10.0 * wobble, 6.0 * wobble),)
        return IterationReport(
            *(replica, stage, rank, f"node{rank // 8:04}", index, MICROBATCHES, 2100.0, version, times, tuple(links)),
            *(300.0, 1700.0),
        )


def iterations(stages: int, ranks: int, count: int, mode: Literal["auto", "thread", "process"]) -> None:
    """Cost of an iteration, and from the onset of a slow link to the switch."""
    job = Job(stages, ranks // stages, mode)
    gc.collect()
    gc.freeze()  # the simulated ranks are not rank 0's to look through
    costs, aside, bytes_, onset = [], [], [], count // 2
    for index in range(onset):
        before = job.process_ms
        job.iteration(index, None)
        costs.append(job.ms)
        aside.append(job.process_ms - before)
        bytes_.append(job.bytes)
    healthy = slice(onset // 2, None)
    sent, plans, spent, before = job.sent, len(job.committed), 0.0, job.process_ms
    for index in range(onset, onset + count):
        began = time.perf_counter()
        job.iteration(index, (1, stages // 2 - 1, stages // 2))
        spent += job.ms
        if len(job.committed) > plans:
            break
    else:
        raise SystemExit("the slow link has led to no plan")
    took = time.perf_counter() - began
    print(
        f"{ranks:5} ranks ({stages} x {ranks // stages}), coordinator in {'a process' if job.process else 'a thread'}: "
        f"an iteration takes {statistics.median(costs[healthy]):.1f} ms of rank 0's interpreter (at most {max(costs[healthy]):.1f}) and "
        f"{statistics.mean(aside[healthy]):.0f} ms of the coordinator's process, {statistics.median(bytes_) / ranks:.0f} bytes a rank\n"
        f"      slow link: committed with the reports of iteration {index - onset + 1} since the onset, {took * 1e3:.0f} ms after the "
        f"first of them, runs from iteration {job.committed[-1] - onset + 1} on; since the onset {spent:.0f} ms of rank 0's interpreter, "
        f"{job.process_ms - before:.0f} ms of the process, {(job.sent - sent) / ranks:.0f} bytes to a rank"
    )
    job.coordinator.close()


def distribution(ranks: int, stages: int = 64, microbatches: int = 512) -> None:
    """A large plan on its way to every rank."""
    profile = large(stages, microbatches)
    made = plan(profile)
    size = 0
    texts: set[str] = set()

    def transmit(rank: int, data: dict[str, Any]) -> None:
        nonlocal size
        text = encode_control(data)
        bridge.encode({"op": "control", "rank": rank, "message": text})
        size += len(text)
        texts.add(text)

    router = Router(0, transmit=transmit, silent=lambda: False)
    leader = SwitchLeader(
        ranks,
        30.0,
        lambda message: [router.send(rank, message) for rank in range(ranks)] and None,
        newest=lambda: 0,
        own=lambda: 0,
    )
    sent = Job.cpu_ms(lambda: leader.lead(Candidate(profile, made, [], 0.0, "")))
    (text,) = texts
    wire = handed_over([(0, json.loads(text))])
    topology = Topology.of(1, [list(range(stages))])
    book = PlanBook(Profile(1, (StageProfile(1.0, 1.0, 1.0),) * stages), "slack-adaptive", 30.0)
    votes: list[bool] = []

    def take() -> None:
        read_all(wire, lambda rank, data: votes.append(book.vote(read(data), topology).ok))  # type: ignore[arg-type]

    read_ms = Job.cpu_ms(take)
    assert votes == [True]
    print(
        f"a plan of {stages} stages x {microbatches} microbatches to {ranks} ranks: {size / ranks / 1024:.1f} KiB a rank, "
        f"{sent:.0f} ms of rank 0's interpreter to send it to all, {read_ms:.1f} ms of each rank's to read and check it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--stages", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--coordinator", choices=["auto", "thread", "process"], default="auto")
    options = parser.parse_args()
    prepare()
    for ranks in options.ranks:
        iterations(options.stages, ranks, options.iterations, options.coordinator)
    distribution(max(options.ranks))


if __name__ == "__main__":
    main()
