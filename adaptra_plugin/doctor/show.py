"""Rows for people and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptra_plugin.doctor.rows import Row, Status

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {Status.OKAY: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def as_json(rows: Sequence[Row]) -> str:
    """One document: a list of objects with the keys check, status, found, advice (all text)."""
    return json.dumps([row.to_json() for row in rows], indent=2)


def as_text(rows: Sequence[Row], console: Console | None = None) -> str:
    """A table without lines, advice under what was found, and a summary. Colours only for a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(max_width=18)
    table.add_column(ratio=1, overflow="fold")
    for row in rows:
        found = Text(row.found)
        if row.advice:
            found.append(f"\n-> {row.advice}", style="" if row.status is Status.OKAY else "bold")
        table.add_row(Text(row.status.value, style=STYLES[row.status]), Text(row.check), found)
    with console.capture() as captured:
        console.print(table)
        console.print(Text(summary(rows)), soft_wrap=True)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """The last line."""
    counts = Counter(row.status for row in rows)
    numbers = ", ".join(f"{counts[status]} {status.value}" for status in Status)
    return f"{numbers}: {'not ready' if counts[Status.FAIL] else 'ready'}"
