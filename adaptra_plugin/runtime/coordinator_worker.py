"""The process of a coordinator, which `CoordinatorProcess` starts: reports and votes in, messages, events and plans out."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.report import StragglerEvent
from adaptra_plugin.report.console import show_log
from adaptra_plugin.runtime.coordinator import Coordinator
from adaptra_plugin.runtime.coordinator_frames import Frame, FrameReader, frame, json_frame, reports_of
from adaptra_plugin.runtime.messages import Message, Refused, Report, Vote, read
from adaptra_plugin.runtime.starting import first_book, limits_of
from adaptra_plugin.runtime.topology import COORDINATOR, Topology
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.profile import Profile

TICK_S = 1.0


class Plans:
    """What the coordinator needs to know of rank 0's plans."""

    def __init__(self, config: AdaptraConfig, topology: Topology, microbatches: int) -> None:
        self._book = first_book(config, topology, microbatches)
        self.begun = -1
        self.plan_for = self._book.plan_for
        self.keep = self._book.keep


class Worker:
    """Serves one connection. What the coordinator says of one message leaves in one piece."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._said: list[bytes] = []
        self._message: Message | None = None  # that is being sent
        self._ranks: list[int] = []  # to these
        self._complete = -1

    def serve(self) -> None:
        """Returns when rank 0 has closed its end, or says that it closes."""
        self._sock.settimeout(TICK_S)
        reader = FrameReader(self._sock)
        try:
            while True:
                try:
                    for kind, number, payload in reader.receive():
                        if kind is Frame.CLOSE:
                            self._flush()
                            return
                        self._take(kind, number, payload)
                except TimeoutError:
                    if hasattr(self, "_coordinator"):
                        self._coordinator.turn(None)
                self._flush()
        except (EOFError, BrokenPipeError):
            return
        finally:
            if hasattr(self, "_coordinator"):
                self._coordinator.close()

    def _take(self, kind: Frame, number: int, payload: bytes) -> None:
        if kind is Frame.HELLO:
            self._start(json.loads(payload))
        elif kind is Frame.BEGUN:
            self._plans.begun = number
        elif kind is Frame.KEEP:
            self._keep(payload.decode())
        elif kind is Frame.REPORTS:
            for rank, packed in reports_of(payload):
                self._turn(rank, Report(packed=packed))
        elif kind is Frame.MESSAGES:
            for rank, data in json.loads(payload):
                message = read(data)
                if isinstance(message, Report | Vote | Refused):
                    self._turn(rank, message)

    def _turn(self, rank: int, message: Report | Vote | Refused) -> None:
        self._coordinator.turn((rank, message))
        if self._coordinator.complete > self._complete:
            self._complete = self._coordinator.complete
            self._say(frame(Frame.COMPLETE, self._complete))

    def _start(self, hello: dict[str, Any]) -> None:
        config = AdaptraConfig.model_validate_json(hello["config"])
        topology = Topology.of(COORDINATOR, hello["pipelines"], hello["chunks"])
        self._plans = Plans(config, topology, hello["microbatches"])
        self._coordinator = Coordinator(
            topology,
            config,
            dict(enumerate(hello["hosts"])),
            send=self._send,
            on_event=self._event,
            on_plan=self._plan,
            on_overview=lambda metrics: self._say(json_frame(Frame.OVERVIEW, metrics)),
            book=self._plans,
            limits=limits_of(config, topology.stages),
        )
        if hello["schedule"] is not None:
            self._keep(hello["schedule"])

    def _keep(self, schedule: str) -> None:
        self._plans.keep(schedule)
        self._coordinator.keep(schedule)

    def _send(self, rank: int, message: Message) -> None:
        if message is not self._message:
            self._end_message()
            self._message = message
        self._ranks.append(rank)

    def _end_message(self) -> None:
        """One frame for all ranks that get the same."""
        if self._message is not None:
            self._said.append(json_frame(Frame.SEND, {"ranks": self._ranks, "message": self._message.to_json()}))
        self._message, self._ranks = None, []

    def _event(self, event: StragglerEvent) -> None:
        self._say(json_frame(Frame.EVENT, event.to_json()))

    def _plan(self, version: int, first_iteration: int, plan: Plan, profile: Profile, reason: str) -> None:
        self._say(json_frame(Frame.PLAN, {"first_iteration": first_iteration, "reason": reason}, version))

    def _say(self, data: bytes) -> None:
        self._end_message()
        self._said.append(data)

    def _flush(self) -> None:
        self._end_message()
        if self._said:
            data = memoryview(b"".join(self._said))
            self._said = []
            while data:  # rank 0 may be slow to read; that it is gone is noticed elsewhere
                try:
                    data = data[self._sock.send(data) :]
                except TimeoutError:
                    continue


def _end_with_parent(parent: int) -> None:
    """A child that the parent has forked holds the socket open even when the parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def main() -> None:
    sock, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    show_log(COORDINATOR)
    Worker(sock).serve()


if __name__ == "__main__":
    main()
