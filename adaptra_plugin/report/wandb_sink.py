"""Metrics, the table of events and alerts in Weights & Biases, without ever disturbing the run of the host.

W&B keeps one row of history per step, and refuses rows older than the newest. DeepSpeed and Megatron name their steps
(`step=`) and write several values to one, so a row that we closed in between would make the host lose values. Hence, in
a run of the host, Adaptra only adds to the row that is open (`commit=False`) and waits for the host to move on before
it adds the next one; in a run of its own it closes every row. Either way its values have their own axis,
`adaptra/iteration`, and `step=` is never given.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.worker import Worker

AXIS = "adaptra/iteration"
EVENTS = "adaptra/events"
MAX_EVENTS = 200
"""Rows of the table of events; it is written anew at each event, so it has to stay small."""
MAX_WAITING = 8
"""Iterations kept while the host's row is taken; absorbs jitter between the host's logging and ours."""
MAX_SERIES = 64
"""A list of numbers longer than this is written as its mean and maximum."""
MAX_FAILURES = 3
"""W&B calls that may fail before the sink gives up."""
_POLL_S = 0.5
_LOGIN_TIMEOUT_S = 2.0
_COLUMNS = (
    *("time", "subject", "state", "replica", "ranks", "hosts", "since_iteration", "found_iteration"),
    *("delay_before_ms", "delay_after_ms", "action", "predicted_before_ms", "predicted_after_ms", "predicted_gain"),
    *("plan_version", "text"),
)


@dataclass
class _Alerts:
    """What is known about the alerts of one subject."""

    sent_at: float
    waiting: StragglerEvent | None = None


class WandbSink:
    """Feeds the host's W&B run, or one of its own; every W&B call happens on the sink's thread.

    A missing, failing or slow W&B is logged once and costs training nothing.
    """

    def __init__(
        self,
        config: ReportConfig,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        logger: logging.Logger | None = None,
        at_exit: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            config: `wandb` must be `auto` (only a run that exists) or `on` (else open one).
            at_exit: called at the exit of the process, before W&B ends its connection; it must `close` this sink in
                the end, and may feed it before that. By default `close`.
            monotonic: seconds, for the intervals between alerts.
            logger: for the line about a failing W&B.
        """
        self._config = config
        self._at_exit = at_exit or self.close
        self._monotonic = monotonic
        self._logger = logger or logging.getLogger("adaptra")
        self._run: Any = None
        self._left: Any = None  # a run that failed us: not to be used again
        self._own = False
        self._may_open = config.wandb == "on"
        self._failures = 0
        self._used_step: int | None = None  # step of the host's row that holds our last row
        self._waiting: deque[dict[str, Any]] = deque(maxlen=MAX_WAITING)
        self._folded = False
        self._events: deque[list[Any]] = deque(maxlen=MAX_EVENTS)
        self._table_is_news = False
        self._alerts: dict[str, _Alerts] = {}
        self._worker: Worker[Mapping[str, Any] | StragglerEvent] = Worker(
            "adaptra-wandb", self._guarded, self._finish, config.queue_records, tick_s=_POLL_S
        )

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Queues the metrics of an iteration: `iteration` is the axis, each entry of a list or mapping a series."""
        self._worker.put(metrics)

    def event(self, event: StragglerEvent) -> None:
        """Queues an event for the table, and for an alert."""
        self._worker.put(event)

    def close(self, deadline_s: float = 10.0) -> bool:
        """Writes what is queued; finishes the run only if the sink opened it.

        Returns:
            Whether that was done within `deadline_s`.
        """
        atexit.unregister(self._at_exit)
        return self._worker.close(deadline_s)

    def _guarded(self, batch: list[Mapping[str, Any] | StragglerEvent]) -> None:
        for record in batch:
            if isinstance(record, StragglerEvent):
                self._take_event(record)
            else:
                self._folded |= len(self._waiting) == MAX_WAITING
                self._waiting.append(flatten(record))
            self._try(self._pump)
        if not batch:
            self._try(self._pump)

    def _try(self, step: Callable[[], None]) -> None:
        """The boundary: whatever W&B raises ends here."""
        if self._failures >= MAX_FAILURES:
            return
        try:
            step()
        except Exception as error:  # noqa: BLE001 - W&B raises its own, network and protobuf errors; none may reach training
            if not self._own and "is finished" in str(error):  # W&B's words: the host has just done so
                self._left, self._run = self._run, None
                return
            self._failures += 1
            if self._failures == 1:
                self._logger.warning(
                    "report: W&B failed (%s: %s); training goes on, events are in the log and the JSONL files",
                    type(error).__name__,
                    error,
                )
            self._left, self._run = self._run, None

    def _pump(self) -> None:
        """Sends what can be sent now."""
        if not self._attached():
            return
        self._send_rows()
        if self._table_is_news and not self._own:
            self._run.log({EVENTS: self._table()}, commit=False)  # a key of its own in the row: nothing is replaced
            self._table_is_news = False
        self._send_alerts()

    def _attached(self) -> bool:
        """Whether there is a run to write to; looks for one if not."""
        hosts = _hosts_run()
        if self._run is not None and (self._own or self._run is hosts):
            return True
        self._run = None  # none so far, or the host has finished it
        if hosts is not None and hosts is not self._left:
            run, self._own = hosts, False
        elif self._may_open and hosts is None and (self._waiting or self._events):
            # Not before the first record: until then the host has had the time to open a run itself.
            self._may_open = False
            run, self._own = self._open(), True
        else:
            return False
        self._may_open = False
        run.define_metric(AXIS, hidden=True)
        run.define_metric("adaptra/*", step_metric=AXIS)
        self._run, self._used_step = run, None
        # W&B ends its connection in an exit handler of its own; handlers registered later run earlier
        atexit.unregister(self._at_exit)
        atexit.register(self._at_exit)
        return True

    def _open(self) -> Any:
        """Opens a run of our own. Without login or network it is an offline one (`wandb sync` uploads it)."""
        wandb = importlib.import_module("wandb")
        # create_new leaves `wandb.run` to the host; the console is not ours to capture; nobody answers a login prompt.
        settings = wandb.Settings(console="off", login_timeout=_LOGIN_TIMEOUT_S)
        arguments = {"project": self._config.wandb_project, "reinit": "create_new", "settings": settings}
        try:
            return wandb.init(**arguments)
        except Exception as error:  # noqa: BLE001 - no login, no network, no server: each has an error type of its own
            self._logger.warning(
                "report: no W&B run online (%s: %s); writing an offline one", type(error).__name__, error
            )
            return wandb.init(**arguments, mode="offline")

    def _send_rows(self) -> None:
        while self._waiting:
            if self._own:
                row = self._waiting[0]
                if self._table_is_news:
                    row = {**row, EVENTS: self._table()}
                self._run.log(row)
                self._table_is_news = False
                self._waiting.popleft()
                continue
            if self._run.step == self._used_step:
                return  # the host's row has our values already; the next ones would replace them
            if self._folded:
                self._keep_newest()
            self._run.log(self._waiting[0], commit=False)
            self._waiting.popleft()
            self._used_step = self._run.step

    def _keep_newest(self) -> None:
        """The host writes fewer rows than we do: what was overtaken is in the JSONL file."""
        newest = self._waiting[-1]
        self._waiting.clear()
        self._waiting.append(newest)
        self._folded = False

    def _take_event(self, event: StragglerEvent) -> None:
        self._events.append(_cells(event))
        self._table_is_news = True
        known = self._alerts.setdefault(event.subject, _Alerts(float("-inf")))
        known.waiting = event  # of several within the interval the last one counts

    def _send_alerts(self, force: bool = False) -> None:
        for known in self._alerts.values():
            event = known.waiting
            due = self._monotonic() - known.sent_at >= self._config.wandb_alert_interval_s
            if event is None or not (due or force):
                continue
            level = "INFO" if event.state == "healed" else "ERROR" if event.state == "lost" else "WARN"
            title = f"Adaptra: {event.subject} {event.state}"
            self._run.alert(title[:63], event.sentence(), level=level)
            known.sent_at, known.waiting = self._monotonic(), None

    def _table(self) -> Any:
        table = importlib.import_module("wandb").Table
        return table(columns=list(_COLUMNS), data=[list(row) for row in self._events])

    def _finish(self) -> None:
        self._try(self._last_words)
        if self._own and self._run is not None:
            self._try(self._run.finish)

    def _last_words(self) -> None:
        if self._run is None or not (self._own or self._run is _hosts_run()):
            return  # the host has finished its run
        if self._waiting:
            # The host has not moved on since our last row and may never: the newest values take their place.
            self._keep_newest()
            self._run.log(self._waiting.popleft(), commit=self._own)
        if self._table_is_news:
            self._run.log({EVENTS: self._table()}, commit=self._own)
            self._table_is_news = False
        self._send_alerts(force=True)


def _hosts_run() -> Any:
    """Without an import of our own: a host that does not use W&B must not pay for it."""
    return getattr(sys.modules.get("wandb"), "run", None)


def flatten(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """W&B's flat names: `adaptra/iteration_ms`, `adaptra/bubble_ms/3`, `adaptra/link_delay_ms/2-3`."""
    return dict(_series("adaptra", metrics))


def _series(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _series(f"{name}/{key}", item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if not all(isinstance(item, int | float) for item in value):
            return  # spans and the like: for the JSONL file, no series
        if len(value) > MAX_SERIES:
            yield f"{name}/mean", sum(value) / len(value)
            yield f"{name}/max", max(value)
        else:
            yield from ((f"{name}/{index}", item) for index, item in enumerate(value))
    elif value is not None:
        yield name, value


def _cells(event: StragglerEvent) -> list[Any]:
    return [
        time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time_unix)),
        event.subject,
        event.state,
        event.replica,
        " ".join(map(str, event.ranks)),
        " ".join(event.hosts),
        event.since_iteration,
        event.found_iteration,
        event.delay_before_ms,
        event.delay_after_ms,
        event.action,
        event.predicted_iteration_ms_before,
        event.predicted_iteration_ms_after,
        event.predicted_gain,
        event.plan_version,
        event.sentence(),
    ]
