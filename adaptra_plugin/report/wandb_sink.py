"""Metrics, the table of events and alerts in Weights & Biases, without ever disturbing the runs of the host.

What is reported belongs to the run that the host has open at that moment, and goes nowhere else: a second run gets rows
of its own. Where the host has opened none yet, the first one that it opens counts.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.sink import Sink
from adaptra_plugin.report.wandb_feed import MAX_EVENTS, MAX_WAITING, Feed, HostFeed, OwnFeed
from adaptra_plugin.report.wandb_own import OwnRun
from adaptra_plugin.report.wandb_rows import flatten
from adaptra_plugin.report.worker import BatchWorker

MAX_FAILURES = 3
"""W&B calls that may fail before the sink gives up."""
_POLL_S = 0.5

_NONE_YET = object()
"""In place of a run: the host has not opened one so far."""

Record = Mapping[str, Any] | StragglerEvent


class WandbSink(Sink):
    """Feeds the host's W&B run, or one of its own; every W&B call happens on the sink's thread.

    A missing, failing or slow W&B is logged once and costs training nothing.
    """

    def __init__(
        self,
        config: ReportConfig,
        *,
        overviews: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
        logger: logging.Logger | None = None,
        at_exit: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            config: `wandb` must be `auto` (only a run that exists) or `on` (else open one).
            overviews: metrics of the whole pipeline come, and take the place of this rank's own.
            at_exit: called at the exit of the process, before W&B ends its connection; it must `close` this sink in
                the end, and may feed it before that. By default `close`.
            monotonic: seconds, for the intervals between alerts.
            logger: for the line about a failing W&B.
        """
        self._config = config
        self._overviews = overviews
        self._directory = working_directory()
        self._at_exit = at_exit or self.close
        self._monotonic = monotonic
        self._logger = logger or logging.getLogger("adaptra")
        self._feed: Feed | None = None
        self._left: Any = None  # a run that failed us: not to be used again
        self._first: Feed | None = None
        self._early = (
            deque[Record](maxlen=MAX_WAITING),
            deque[Record](maxlen=MAX_EVENTS),
        )  # rows, events: for the first
        self._may_open = config.wandb == "on"
        self._seen = False  # the host has had a run
        self._failures = 0
        self._worker: BatchWorker[tuple[Any, Record]] = BatchWorker(
            "adaptra-wandb", self._take, self._finish, config.queue_records, tick_s=_POLL_S
        )

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Queues the metrics of an iteration: `iteration` is the axis, each entry of a list or mapping a series."""
        if not self._overviews:
            self._put(metrics)

    def pipeline(self, metrics: Mapping[str, Any]) -> None:
        self._put(metrics)

    def event(self, event: StragglerEvent) -> None:
        """Queues an event for the table, and for an alert."""
        self._put(event)

    def close(self, deadline_s: float = 10.0) -> bool:
        """Writes what is queued; finishes the run only if the sink opened it.

        Returns:
            Whether that was done within `deadline_s`.
        """
        atexit.unregister(self._at_exit)
        return self._worker.close(deadline_s)

    def _put(self, record: Record) -> None:
        run = _hosts_run()
        self._seen |= run is not None
        self._worker.put((run if self._seen else _NONE_YET, record))

    def _take(self, batch: list[tuple[Any, Record]]) -> None:
        for run, record in batch:
            self._try(partial(self._give, run, record))
        if not batch:
            self._try(self._pump)

    def _try(self, step: Callable[[], None]) -> None:
        """The boundary: whatever W&B raises ends here."""
        if self._failures >= MAX_FAILURES:
            return
        try:
            step()
        except Exception as error:  # noqa: BLE001 - W&B raises its own, network and protobuf errors; none may reach training
            feed, self._feed = self._feed, None
            if isinstance(feed, HostFeed):
                self._left = feed.run
                if getattr(feed.run, "_is_finished", False):  # the host has just done so: W&B refuses further calls
                    return
            self._failures += 1
            if self._failures == 1:
                self._logger.warning(
                    "report: W&B failed (%s: %s); training goes on, events are in the log and the JSONL files",
                    type(error).__name__,
                    error,
                )

    def _give(self, run: Any, record: Record) -> None:
        """One record, and the run that the host had open when it was made."""
        self._follow()
        feed = self._feed
        if self._first is None:
            self._early[isinstance(record, StragglerEvent)].append(record)
            if self._may_open:  # not before the first record: until then the host has had the time to open one itself
                self._open()
        elif isinstance(feed, OwnFeed) or (
            isinstance(feed, HostFeed) and (run is feed.run or (run is _NONE_YET and feed is self._first))
        ):
            _give(feed, record)
        self._pump()

    def _pump(self) -> None:
        """Sends what can be sent now."""
        self._follow()
        if self._feed is not None:
            self._feed.pump()

    def _follow(self) -> None:
        """Keeps to the run that the host has open, if we have none of our own."""
        feed, run = self._feed, _hosts_run()
        if isinstance(feed, OwnFeed):
            return
        if isinstance(feed, HostFeed) and run is not feed.run:
            self._feed = None  # the host has finished it
        if self._feed is None and run is not None and run is not self._left:
            self._left = run  # if this fails, it is not tried again
            self._attach(HostFeed(run, self._config.wandb_alert_interval_s, self._monotonic))
            self._left = None

    def _open(self) -> None:
        self._may_open = False
        config = self._config
        if os.environ.get("WANDB_MODE") == "disabled":
            return  # no process need be started to find that out
        run = OwnRun(config.wandb_project, self._directory, config.queue_records, self._logger)
        self._attach(OwnFeed(run, config.wandb_alert_interval_s, self._monotonic))

    def _attach(self, feed: Feed) -> None:
        self._feed = feed
        # W&B ends its connection in an exit handler of its own; handlers registered later run earlier
        atexit.unregister(self._at_exit)
        atexit.register(self._at_exit)
        if self._first is None:
            self._first = feed
            for early in self._early:
                while early:
                    _give(feed, early.popleft())

    def _finish(self) -> None:
        self._try(self._last_words)

    def _last_words(self) -> None:
        self._follow()
        if self._feed is not None:
            self._feed.finish()


def working_directory() -> str | None:
    """Where relative paths begin; None: the directory is gone."""
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return None


def _give(feed: Feed, record: Record) -> None:
    if isinstance(record, StragglerEvent):
        feed.event(record)
    else:
        feed.row(flatten(record))


def _hosts_run() -> Any:
    """Without an import of our own: a host that does not use W&B must not pay for it."""
    return getattr(sys.modules.get("wandb"), "run", None)
