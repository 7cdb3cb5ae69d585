"""Reads the `.wandb` file of an offline run: a log of protobuf records in LevelDB's framing."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb")
from wandb.proto import wandb_internal_pb2

_HEADER = 7  # the file's header, and that of each record, by coincidence
_BLOCK = 32768
_WHOLE, _LAST = 1, 4


class Run:
    """What an offline run has on disk."""

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: `WANDB_DIR` of exactly one run, or the folder of the run.
        """
        (self.path,) = directory.rglob("*.wandb")
        self.project = ""
        self.rows: list[dict[str, Any]] = []
        self.alerts: list[Any] = []
        self.metrics: list[Any] = []
        self.exited = False
        for record in _records(self.path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = record.history.item
                self.rows.append({"/".join([i.key, *i.nested_key]).strip("/"): json.loads(i.value_json) for i in items})
            elif kind == "run" and record.run.project:
                self.project = record.run.project
            elif kind == "alert":
                self.alerts.append(record.alert)
            elif kind == "metric":
                self.metrics.append(record.metric)
            self.exited |= kind == "exit"

    def series(self, name: str) -> list[Any]:
        """Values of a metric in the order of the rows that have it."""
        return [row[name] for row in self.rows if name in row]

    def table(self, name: str) -> dict[str, Any]:
        """The last table logged under a name."""
        path = self.series(f"{name}/path")[-1]
        return json.loads((self.path.parent / "files" / path).read_text())


def all_runs(directory: Path) -> list[Run]:
    """Every run below `WANDB_DIR`, in the order in which they were opened; folders of runs that could not be are left out."""
    folders = {path.parent for path in directory.rglob("*.wandb") if path.parent.name != "latest-run"}
    runs = [Run(folder) for folder in sorted(folders, key=lambda folder: folder.stat().st_ctime_ns)]
    return [run for run in runs if run.project or run.rows]


def _records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} starts with {data[:4]!r}: not a W&B file")
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        rest = _BLOCK - position % _BLOCK
        if rest < _HEADER:  # no record header fits: padding
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            position += rest
            continue
        parts += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
