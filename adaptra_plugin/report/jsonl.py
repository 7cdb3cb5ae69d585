"""One JSONL file per rank, written behind the back of training."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from adaptra_plugin.report.worker import Worker
from adaptra_plugin.shortage import explain

_MIB = 1 << 20
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 300.0


class JsonlWriter:
    """Appends records to `{directory}/rank{rank:05d}.jsonl` on a thread of its own.

    A file that would exceed its size is renamed to `.jsonl.1`, replacing the one before. Errors of the file system are
    logged once; writing is tried again after a pause that doubles up to five minutes. Records that were lost (queue
    full, disk full) are counted by a record `{"type": "dropped", "records": n}` in their place.
    """

    def __init__(
        self,
        directory: str | Path,
        rank: int,
        *,
        max_file_mib: float = 64,
        queue_records: int = 4096,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        logger: logging.Logger | None = None,
    ) -> None:
        """
        Args:
            directory: folder of the files; made if missing.
            rank: world rank, names the file.
            max_file_mib: size (MiB) at which the file is rotated.
            queue_records: records that may wait for the thread.
            clock: seconds since the epoch, for the records that the writer adds itself.
            monotonic: seconds, for the pauses after errors.
            logger: for the one line about a failing disk.
        """
        self.path = Path(directory) / f"rank{rank:05d}.jsonl"
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[
            0
        ]  # rotating keeps the newest records, a file that is full the oldest
        self._max_bytes = min(int(max_file_mib * _MIB), limit if limit != resource.RLIM_INFINITY else sys.maxsize)
        self._clock = clock
        self._monotonic = monotonic
        self._logger = logger or logging.getLogger("adaptra")
        self._file: FileIO | None = None
        self._size = 0
        self._torn = False  # the file ends within a line
        self._lost = 0
        self._failed = False
        self._pause_s = _PAUSE_S
        self._retry_at = float("-inf")
        self._worker: Worker[Mapping[str, Any]] = Worker(
            f"adaptra-jsonl-{rank}", self._write, self._finish, queue_records
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Queues a record; returns at once and never raises. The record must not be changed afterwards."""
        self._worker.put(record)

    def files(self) -> list[Path]:
        """The files that exist, the oldest first."""
        return [path for path in (self._rotated, self.path) if path.exists()]

    def close(self, deadline_s: float = 10.0) -> bool:
        """Writes what is queued and closes the file.

        Returns:
            Whether that was done within `deadline_s`.
        """
        return self._worker.close(deadline_s)

    @property
    def _rotated(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def _write(self, batch: list[Mapping[str, Any]]) -> None:
        self._lost += self._worker.take_dropped()
        if not batch and not self._lost:
            return
        if self._monotonic() < self._retry_at:
            self._lost += len(batch)
            return
        done = 0
        try:
            if self._lost:
                self._append(encode({"type": "dropped", "time": self._clock(), "records": self._lost}))
                self._lost = 0
            for record in batch:
                self._append(self._encode(record))
                done += 1
        except OSError as error:
            self._lost += len(batch) - done
            self._give_way(error)
            return
        self._pause_s = _PAUSE_S

    def _encode(self, record: Mapping[str, Any]) -> bytes:
        try:
            return encode(record)
        except Exception as error:  # noqa: BLE001 - a value's own __str__ or tolist may raise anything; it costs one record
            self._logger.warning("report: a record of type %r cannot be written (%s)", record.get("type"), error)
            return encode({"type": "unwritable", "time": self._clock(), "error": type(error).__name__})

    def _append(self, line: bytes) -> None:
        file = self._file or self._open()
        if self._size and self._size + len(line) > self._max_bytes:
            file.close()
            self._file = None
            self.path.replace(self._rotated)
            file = self._open()
        data = b"\n" + line if self._torn else line
        while data:
            count = file.write(data) or 0
            self._size += count
            self._torn = count < len(data)
            data = data[count:]

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: every batch is in the file when the next one is taken, also if the process is killed.
        file = FileIO(self.path, "a+")
        self._size = file.seek(0, 2)
        if self._size:
            file.seek(-1, 2)
            self._torn = file.read(1) != b"\n"
        else:
            self._torn = False
        self._file = file
        return file

    def _give_way(self, error: OSError) -> None:
        """After an error: close, log the first one, and leave the disk alone for a while."""
        self._finish()
        self._retry_at = self._monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if not self._failed:
            self._failed = True
            self._logger.warning(
                "report: cannot write %s (%s); training goes on, the file misses records until this is repaired",
                self.path,
                explain(error),
            )

    def _finish(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # reported when writing failed; there is nothing left to save
            self._file = None


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON: numbers that JSON does not know (inf, nan) become null, unknown objects their text."""
    return json.dumps(_plain(record), separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _plain(value.tolist())
    return str(value)
