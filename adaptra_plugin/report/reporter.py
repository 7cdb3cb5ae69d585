"""One object that knows where news goes: the log, the JSONL file of the rank, W&B."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.jsonl import JsonlWriter
from adaptra_plugin.report.wandb_sink import WandbSink


def new_run(secret: bytes | None = None) -> str:
    """Eight digits that tell a run from others.

    Args:
        secret: of the job, known to all its ranks: so they agree. It cannot be found from the run. None: by chance.
    """
    return sha256(b"adaptra report run" + (secret or secrets.token_bytes(32))).hexdigest()[:8]


class Reporter:
    """Reports events and metrics of one rank. Nothing here blocks training or raises because a sink is broken.

    Every JSONL record has `type`, `time` (seconds since the epoch), `rank` and `run`; `iteration` and `pipeline` hold the
    metrics as given, `event` the fields of a `StragglerEvent`, any other type those of `message`.
    """

    def __init__(
        self,
        config: ReportConfig,
        rank: int,
        *,
        wandb_here: bool,
        run: str | None = None,
        clock: Callable[[], float] = time.time,
        logger: logging.Logger | None = None,
        at_exit: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            config: the `report` block.
            rank: world rank.
            wandb_here: whether this rank is the one that feeds W&B (the rank that owns the host's run).
            run: tells this run from others that write into the same directory; the same on all ranks. None: a new one.
            clock: seconds since the epoch.
            logger: for lines that people read; `adaptra` by default.
            at_exit: ends the owner of this reporter, and the reporter with it; called before W&B's own exit handler.
        """
        self._config = config
        run = run or new_run()
        self._marks = {"rank": rank, "run": run}
        self._clock = clock
        self._logger = logger or logging.getLogger("adaptra")
        self._jsonl: JsonlWriter | None = None
        self._wandb: WandbSink | None = None
        if config.directory is not None:
            self._jsonl = JsonlWriter(
                config.directory,
                rank,
                run,
                max_file_mib=config.max_file_mib,
                queue_records=config.queue_records,
                clock=clock,
                logger=self._logger,
            )
        if wandb_here and config.wandb != "off":
            self._wandb = WandbSink(config, logger=self._logger, at_exit=at_exit or self.close)

    def iteration(self, metrics: Mapping[str, Any], *, to_wandb: bool = True) -> None:
        """Metrics of one iteration of this rank, every `metrics_every` iterations.

        Args:
            metrics: `iteration` (0-based) and any of numbers, texts, lists (one entry per stage) and mappings (one
                entry per link, say); times in ms. The values must not be changed afterwards.
            to_wandb: False if W&B gets the metrics of the whole pipeline (`pipeline`) instead.
        """
        self._metrics("iteration", metrics, to_wandb)

    def pipeline(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of one iteration of the whole pipeline, from the one rank that knows them; as `iteration`."""
        self._metrics("pipeline", metrics, to_wandb=True)

    def event(self, event: StragglerEvent) -> None:
        """Logs the event's sentence, writes its record, and hands it to W&B (table and alert)."""
        self._logger.log(logging.INFO if event.state == "healed" else logging.WARNING, "%s", event.sentence())
        self._record("event", {**event.to_json(), "text": event.sentence()})
        if self._wandb is not None:
            self._wandb.event(event)

    def show_pipeline(self, metrics: Mapping[str, Any]) -> None:
        """As `pipeline`, for W&B alone: another rank keeps the record."""
        if self._wandb is not None and int(metrics["iteration"]) % self._config.metrics_every == 0:
            self._wandb.iteration(dict(metrics))

    def show_event(self, event: StragglerEvent) -> None:
        """As `event`, for W&B alone: another rank has logged it and keeps the record."""
        if self._wandb is not None:
            self._wandb.event(event)

    def message(self, kind: str, text: str | None = None, *, level: int = logging.INFO, **fields: Any) -> None:
        """Anything else worth keeping.

        Args:
            kind: `type` of the record, such as `plan`, `ring_full`, `refused_connection`.
            text: a line for the log, and `text` of the record; None: only the record is written.
            level: of the line.
            fields: of the record.
        """
        if text is not None:
            self._logger.log(level, "%s", text)
            fields["text"] = text
        self._record(kind, fields)

    def files(self) -> list[str]:
        """Paths of the JSONL files that exist."""
        return [str(path) for path in self._jsonl.files()] if self._jsonl is not None else []

    def close(self, deadline_s: float = 10.0) -> None:
        """Writes what is queued and ends the threads; what takes longer than `deadline_s` in all is given up."""
        end = time.monotonic() + deadline_s
        for sink in (self._jsonl, self._wandb):
            if sink is not None and not sink.close(max(0.0, end - time.monotonic())):
                self._logger.warning("report: %s did not finish within %g s", type(sink).__name__, deadline_s)

    def _metrics(self, kind: str, metrics: Mapping[str, Any], to_wandb: bool) -> None:
        if int(metrics.get("iteration", 0)) % self._config.metrics_every:
            return
        metrics = dict(metrics)  # the caller may use its own again
        self._record(kind, metrics)
        if self._wandb is not None and to_wandb:
            self._wandb.iteration(metrics)

    def _record(self, kind: str, fields: Mapping[str, Any]) -> None:
        if self._jsonl is not None:
            header = {"type": kind, "time": self._clock(), **self._marks}
            self._jsonl.write({**header, **fields, **header})  # first in the line, and not to be overwritten
