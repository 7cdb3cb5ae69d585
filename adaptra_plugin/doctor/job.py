"""What `adaptra check` says of jobs before anything is launched. It asks the code that decides when a job starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from adaptra_plugin.config import parse_config
from adaptra_plugin.doctor.settings import load_settings
from adaptra_plugin.errors import AdaptraError, ConfigError
from adaptra_plugin.host import Host, Spread
from adaptra_plugin.runtime.starting import check_links, first_book
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.support import Level, Reason, level_of

WORDS = {
    Level.FULL: "plans that follow slow links, with a split backward",
    Level.STOCK_ORDER: "the stock order of microbatches; transfers through the proxy, detection and reports are Adaptra's",
    Level.STOCK: "nothing of Adaptra: the job runs as without it",
    Level.REFUSED: "the job does not start",
}
REST = "What shows in the model and the optimizer alone (compiled layers, hooks that step) is looked at before the first batch."
BLOCK = "adaptra"
OPTION = "adaptra_config"
"""Argument of jobs without a configuration file of the host's own: a file with the block."""
ARGUMENTS = "arguments"
"""Name of the job that arguments describe."""


@dataclass(frozen=True)
class Judged:
    """A job, how it is spread, and why it has less than the full support."""

    name: str
    spread: Spread
    reasons: list[Reason]

    @property
    def level(self) -> Level:
        return level_of(self.reasons)

    def document(self) -> dict[str, Any]:
        rows = [{"level": it.level.value, "why": it.why, "remedy": it.remedy} for it in self.reasons]
        spread = self.spread
        return {
            "job": self.name,
            "level": self.level.value,
            "stages": spread.stages,
            "chunks": spread.chunks,
            "tensor": spread.tensor,
            "reasons": rows,
        }


def run(host: Host, words: Sequence[str], stages: int | None, tensor: int | None, as_json: bool) -> int:
    """Judges and prints. Returns the exit code: 1 if a job is refused, otherwise 0.

    Args:
        host: whose jobs they are.
        words: configuration files; where the host has them, arguments of a job, which count for all files.
        stages: of the pipeline, where the configuration does not say it.
        tensor: ranks of a tensor group, likewise.
        as_json: print JSON: an object for one job, a list for several.

    Raises:
        ConfigError, PlanError, OSError: a job would end with this error at its start.
    """
    first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    files, more = words[:first], host.read_arguments(words[first:]) if words[first:] else {}
    if not files and not more:
        raise ConfigError(f"--{host.name}: expected a file" + " or arguments" * host.takes_arguments)
    jobs = []
    for name in files or [ARGUMENTS]:
        try:
            settings = {**(load_settings(name) if files else {}), **more}
            jobs.append(judge(host, settings, stages=stages, tensor=tensor, name=name))
        except AdaptraError as error:
            raise type(error)(f"{name}: {error}") from None
    if as_json:
        documents = [job.document() for job in jobs]
        sys.stdout.write(json.dumps(documents[0] if len(jobs) == 1 else documents, indent=2) + "\n")
    elif len(jobs) == 1:
        _print_one(jobs[0])
    else:
        _print_all(jobs)
    return int(any(job.level is Level.REFUSED for job in jobs))


def _print_one(job: Judged) -> None:
    lines = [f"{job.level.value}: {WORDS[job.level]}", *(f"  - {it}" for it in job.reasons)]
    if job.level in (Level.FULL, Level.STOCK_ORDER):
        lines.append(REST)
    sys.stdout.write("\n".join(lines) + "\n")


def _print_all(jobs: Sequence[Judged]) -> None:
    table = Table(box=None, pad_edge=False)
    longest = max(len(job.name) for job in jobs)
    table.add_column("job", no_wrap=True, min_width=longest)  # a path that is cut is of no use
    table.add_column("level", no_wrap=True)
    table.add_column("reasons")
    for job in jobs:
        table.add_row(job.name, job.level.value, "\n".join(map(str, job.reasons)))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else longest + 120).print(table)


def judge(
    host: Host, settings: Mapping[str, Any], *, stages: int | None = None, tensor: int | None = None, name: str = ""
) -> Judged:
    """How much of Adaptra a job can have, as far as its configuration shows.

    Args:
        host: whose settings they are.
        settings: of the host, with the `"adaptra"` block or, where a host has none, the name of its file.
        stages, tensor: where the settings do not say it; default 2 and 1.
        name: of the job.

    Raises:
        ConfigError, PlanError, OSError: the job would end with this error at its start.
    """
    said = host.spread(settings)
    for option, value, of_the_job in (("--stages", stages, said.stages), ("--tensor", tensor, said.tensor)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: expected a whole number of at least 1")
        if None not in (value, of_the_job) and value != of_the_job:
            raise ConfigError(f"{option} {value}: the job's own settings say {of_the_job}; leave the option out")
    spread = Spread(said.stages or stages or 2, said.chunks, said.tensor or tensor or 1, said.microbatches)
    return Judged(name, spread, _reasons(host, settings, spread))


def _reasons(host: Host, settings: Mapping[str, Any], spread: Spread) -> list[Reason]:
    assert spread.stages is not None and spread.tensor is not None
    if host.has_configuration and BLOCK not in settings:
        return [Reason(Level.STOCK, 'there is no "adaptra" block', 'add "adaptra": {"enabled": true}')]
    block = settings.get(BLOCK)
    if block is None and OPTION in settings:
        block = load_settings(str(settings[OPTION]))
    config = parse_config({} if block is None else block)
    if not config.enabled:
        return [Reason(Level.STOCK, "adaptra.enabled is false", "set it to true")]
    if spread.stages == 1:
        return [Reason(Level.STOCK, "one stage has nothing to schedule and nothing to send", "use at least 2 stages")]
    groups = [range(first, spread.stages * spread.tensor, spread.tensor) for first in range(spread.tensor)]
    topology = Topology.of(0, groups, spread.chunks)
    check_links(config, topology)
    first_book(config, topology, spread.microbatches or topology.stages)
    return host.judge(settings)
