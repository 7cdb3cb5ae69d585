"""What one W&B run is fed with, and how: a run of the host, or one of our own.

W&B keeps one row of history per step, and refuses rows older than the newest. DeepSpeed and Megatron name their steps
(`step=`) and write several values to one, so a row that we closed in between would make the host lose values. Hence, in
a run of the host, Adaptra only adds to the row that is open (`commit=False`) and waits for the host to move on before
it adds the next one; in a run of its own it closes every row. Either way its values have their own axis,
`adaptra/iteration`, and `step=` is never given.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.wandb_own import OwnRun
from adaptra_plugin.report.wandb_rows import AXIS, COLUMNS, EVENTS, alert, cells

MAX_EVENTS = 200
"""Rows of the table of events; it is written anew at each event, so it has to stay small."""
MAX_WAITING = 8
"""Iterations kept while the host's row is taken; absorbs jitter between the host's logging and ours."""


@dataclass
class _Alerts:
    """What is known about the alerts of one subject."""

    sent_at: float
    waiting: StragglerEvent | None = None


class Feed(ABC):
    """Rows, table of events and alerts of one run. All calls come from one thread; any may raise what W&B raises."""

    def __init__(self, interval_s: float, monotonic: Callable[[], float]) -> None:
        """
        Args:
            interval_s: at most one alert per subject within this time.
            monotonic: seconds.
        """
        self._interval_s = interval_s
        self._monotonic = monotonic
        self._events: deque[list[Any]] = deque(maxlen=MAX_EVENTS)
        self._table_is_news = False
        self._alerts: dict[str, _Alerts] = {}

    @abstractmethod
    def row(self, row: dict[str, Any]) -> None:
        """Takes the values of an iteration."""

    @abstractmethod
    def pump(self) -> None:
        """Sends what can be sent now."""

    @abstractmethod
    def finish(self) -> None:
        """Sends all that is left."""

    @abstractmethod
    def _alert(self, title: str, text: str, level: str) -> None: ...

    def event(self, event: StragglerEvent) -> None:
        """Takes an event for the table, and for an alert."""
        self._events.append(cells(event))
        self._table_is_news = True
        known = self._alerts.setdefault(event.subject, _Alerts(float("-inf")))
        known.waiting = event  # of several within the interval the last one counts

    def _send_alerts(self, force: bool = False) -> None:
        for known in self._alerts.values():
            event = known.waiting
            due = self._monotonic() - known.sent_at >= self._interval_s
            if event is None or not (due or force):
                continue
            self._alert(*alert(event))
            known.sent_at, known.waiting = self._monotonic(), None


class HostFeed(Feed):
    """Adds to the rows of a run that the host has opened. Never finishes it."""

    def __init__(self, run: Any, interval_s: float, monotonic: Callable[[], float]) -> None:
        super().__init__(interval_s, monotonic)
        self.run = run
        self._used_step: int | None = None  # step of the host's row that holds our last row
        self._waiting: deque[dict[str, Any]] = deque(maxlen=MAX_WAITING)
        self._folded = False
        run.define_metric(AXIS, hidden=True)
        run.define_metric("adaptra/*", step_metric=AXIS)

    def row(self, row: dict[str, Any]) -> None:
        self._folded |= len(self._waiting) == MAX_WAITING
        self._waiting.append(row)

    def pump(self) -> None:
        while self._waiting and self.run.step != self._used_step:  # else the host's row has our values already
            if self._folded:
                self._keep_newest()
            self.run.log(self._waiting[0], commit=False)
            self._waiting.popleft()
            self._used_step = self.run.step
        self._send_table()  # a key of its own in the row: nothing is replaced
        self._send_alerts()

    def finish(self) -> None:
        if self._waiting:
            # The host has not moved on since our last row and may never: the newest values take their place.
            self._keep_newest()
            self.run.log(self._waiting.popleft(), commit=False)
        self._send_table()
        self._send_alerts(force=True)

    def _keep_newest(self) -> None:
        """The host writes fewer rows than we do: what was overtaken is in the JSONL file."""
        newest = self._waiting[-1]
        self._waiting.clear()
        self._waiting.append(newest)
        self._folded = False

    def _send_table(self) -> None:
        if self._table_is_news:
            table = importlib.import_module("wandb").Table(columns=list(COLUMNS), data=_copy(self._events))
            self.run.log({EVENTS: table}, commit=False)
            self._table_is_news = False

    def _alert(self, title: str, text: str, level: str) -> None:
        self.run.alert(title, text, level=level)


class OwnFeed(Feed):
    """Every iteration is a row of a run of our own, which is finished in the end."""

    def __init__(self, run: OwnRun, interval_s: float, monotonic: Callable[[], float]) -> None:
        super().__init__(interval_s, monotonic)
        self.run = run

    def row(self, row: dict[str, Any]) -> None:
        self.run.send({"row": row, **self._table()})

    def pump(self) -> None:
        self._send_alerts()
        self.run.pump()

    def finish(self) -> None:
        if self._table_is_news:
            self.run.send({"row": {}, **self._table()})
        self._send_alerts(force=True)
        self.run.finish()

    def _table(self) -> dict[str, Any]:
        if not self._table_is_news:
            return {}
        self._table_is_news = False
        return {"table": {"name": EVENTS, "columns": COLUMNS, "data": _copy(self._events)}}

    def _alert(self, title: str, text: str, level: str) -> None:
        self.run.send({"alert": [title, text, level]})


def _copy(rows: Iterable[list[Any]]) -> list[list[Any]]:
    return [list(row) for row in rows]
