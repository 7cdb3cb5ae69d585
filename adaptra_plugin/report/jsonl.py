"""One JSONL file per rank, written behind the back of training."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from adaptra_plugin.backoff import Backoff
from adaptra_plugin.report.worker import BatchWorker
from adaptra_plugin.shortage import explain

_MIB = 1 << 20
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 300.0
_TRIES = 10  # to lock a file that others rename at the same time


class JsonlWriter:
    """Appends records to `{directory}/rank{rank:05d}.jsonl` on a thread of its own.

    Nobody else writes to that file meanwhile: it is locked. Where another job or engine has it, or the file system knows no
    locks, the file is `rank{rank:05d}-{run}.jsonl`. A file that would exceed its size is renamed to `.jsonl.1`, replacing the
    one before; one that somebody has removed or renamed is begun anew. Errors of the file system are logged once; writing
    is tried again after a pause that doubles up to five minutes. Records that were lost (queue full, disk full) are
    counted by a record `{"type": "dropped", "records": n}` in their place.
    """

    def __init__(
        self,
        directory: str | Path,
        rank: int,
        run: str,
        *,
        max_file_mib: float = 64,
        queue_records: int = 4096,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        logger: logging.Logger | None = None,
    ) -> None:
        """
        Args:
            directory: folder of the files; made if missing. Relative to the working directory of now.
            rank: world rank, names the file.
            run: tells this run from all others.
            max_file_mib: size (MiB) at which the file is rotated.
            queue_records: records that may wait for the thread.
            clock: seconds since the epoch, for the records that the writer adds itself.
            monotonic: seconds, for the pauses after errors.
            logger: for the lines about a failing disk, and about others that meddle with the file.
        """
        folder = Path(directory)
        with contextlib.suppress(OSError):  # the working directory is gone: an absolute path needs none
            folder = folder.absolute()
        self.path = folder / f"rank{rank:05d}.jsonl"
        """The file that is written now."""
        self._own = folder / f"rank{rank:05d}-{run}.jsonl"
        self._marks = {"rank": rank, "run": run}
        # rotating keeps the newest records, a file that is full the oldest
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._max_bytes = min(int(max_file_mib * _MIB), limit if limit != resource.RLIM_INFINITY else sys.maxsize)
        self._clock = clock
        self._monotonic = monotonic
        self._logger = logger or logging.getLogger("adaptra")
        self._file: FileIO | None = None
        self._opened: list[Path] = []
        self._size = 0
        self._torn = False  # the file ends within a line
        self._lost = 0
        self._failed = False
        self._missed = False
        self._pauses = Backoff(_PAUSE_S, _LONGEST_PAUSE_S)
        self._retry_at = float("-inf")
        self._worker: BatchWorker[Mapping[str, Any]] = BatchWorker(
            f"adaptra-jsonl-{rank}", self._write, self._finish, queue_records
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Queues a record; returns at once and never raises. The record must not be changed afterwards."""
        self._worker.put(record)

    def files(self) -> list[Path]:
        """The files of this writer that exist, the oldest first."""
        return [path for written in self._opened for path in (rotated(written), written) if path.exists()]

    def close(self, deadline_s: float = 10.0) -> bool:
        """Writes what is queued and closes the file.

        Returns:
            Whether that was done within `deadline_s`.
        """
        return self._worker.close(deadline_s)

    def _write(self, batch: list[Mapping[str, Any]]) -> None:
        self._lost += self._worker.take_dropped()
        if not batch and not self._lost:
            return
        if self._monotonic() < self._retry_at:
            self._lost += len(batch)
            return
        done = 0
        try:
            self._look()
            if self._lost:
                self._append(encode(self._own_record("dropped", records=self._lost)))
                self._lost = 0
            for record in batch:
                self._append(self._encode(record))
                done += 1
        except OSError as error:
            self._lost += len(batch) - done
            self._give_way(error)
            return
        self._pauses.reset()

    def _encode(self, record: Mapping[str, Any]) -> bytes:
        try:
            return encode(record)
        except Exception as error:  # noqa: BLE001 - a value's own __str__ or tolist may raise anything; it costs one record
            self._logger.warning("report: a record of type %r cannot be written (%s)", record.get("type"), error)
            return encode(self._own_record("unwritable", error=type(error).__name__))

    def _own_record(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "time": self._clock(), **self._marks, **fields}

    def _look(self) -> None:
        """Whether the file is still the one at its path. What is written to a file that has none is lost."""
        if self._file is None:
            return
        here = os.fstat(self._file.fileno())
        try:
            there = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            there = None
        if there is not None and os.path.samestat(here, there):
            if here.st_size < self._size:  # cut short in place
                self._size, self._torn = here.st_size, False
            return
        self._finish()
        if not self._missed:
            self._missed = True
            self._logger.warning("report: somebody has removed or renamed %s; it is begun anew", self.path)

    def _append(self, line: bytes) -> None:
        file = self._file or self._open()
        if self._size and self._size + len(line) > self._max_bytes:
            self._rotate(file)  # before the lock goes
            self._finish()
            file = self._open()
        data = b"\n" + line if self._torn else line
        while data:
            count = file.write(data) or 0
            self._size += count
            self._torn = count < len(data)
            data = data[count:]

    def _rotate(self, file: FileIO) -> None:
        try:
            self.path.replace(rotated(self.path))
        except OSError as error:  # a folder of that name, say: the newest records are worth more than the oldest
            self._logger.warning("report: %s cannot be renamed (%s); it is begun anew", self.path, explain(error))
            file.truncate(0)

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(self.path)
        if file is None and self.path != self._own:
            self._logger.info(
                "report: %s cannot be locked (another job or engine writes it, or the file system has no locks); this one writes %s",
                self.path,
                self._own,
            )
            self.path = self._own
            file = _locked(self.path)
        file = file or _unbuffered(self.path)
        self._size = file.seek(0, 2)
        if self._size:
            file.seek(-1, 2)
            self._torn = file.read(1) != b"\n"
        else:
            self._torn = False
        self._file = file
        if self.path not in self._opened:
            self._opened.append(self.path)
        return file

    def _give_way(self, error: OSError) -> None:
        """After an error: close, log the first one, and leave the disk alone for a while."""
        self._finish()
        self._retry_at = self._monotonic() + self._pauses.next()
        if not self._failed:
            self._failed = True
            self._logger.warning(
                "report: cannot write %s (%s); training goes on, the file misses records until this is repaired",
                self.path,
                explain(error),
            )

    def _finish(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # reported when writing failed; there is nothing left to save
                # a forked child has the file too, and the lock with it
                fcntl.flock(self._file, fcntl.LOCK_UN)
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def rotated(path: Path) -> Path:
    """Where the older records go."""
    return path.with_name(path.name + ".1")


def _unbuffered(path: Path) -> FileIO:
    """Every batch is in the file when the next one is taken, also if the process is killed."""
    return FileIO(path, "a+")


def _locked(path: Path) -> FileIO | None:
    """The file, for this writer alone; None: somebody else has it, or the file system knows no locks."""
    for _ in range(_TRIES):
        file = _unbuffered(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass  # whoever had it has renamed it meanwhile, as below
        except OSError:
            file.close()
            return None
        file.close()
    return None


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
