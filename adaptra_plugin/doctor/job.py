"""What `adaptra check` says of a job before anything is launched. It asks the code that decides when the job starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from adaptra_plugin.config import parse_config
from adaptra_plugin.doctor.needs import HOST, load_settings
from adaptra_plugin.errors import ConfigError
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


def run(path: str, stages: int, tensor: int, as_json: bool) -> int:
    """Judges and prints. Returns the exit code: 1 for a job that is refused, otherwise 0.

    Args:
        path: the host's configuration file.
        stages: of the pipeline.
        tensor: ranks of a tensor group.
        as_json: print JSON.

    Raises:
        ConfigError, PlanError, OSError: the job would end with this error at its start.
    """
    reasons = judge(load_settings(path), stages, tensor)
    level = level_of(reasons)
    if as_json:
        rows = [{"level": it.level.value, "why": it.why, "remedy": it.remedy} for it in reasons]
        document = {"level": level.value, "stages": stages, "tensor": tensor, "reasons": rows}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        lines = [f"{level.value}: {WORDS[level]}", *(f"  - {it}" for it in reasons)]
        if level in (Level.FULL, Level.STOCK_ORDER):
            lines.append(REST)
        sys.stdout.write("\n".join(lines) + "\n")
    return int(level is Level.REFUSED)


def judge(settings: Mapping[str, Any], stages: int, tensor: int) -> list[Reason]:
    """Why a job has less than the full support, as far as its configuration shows.

    Raises:
        ConfigError, PlanError: the job would end with this error at its start.
    """
    for name, value in (("--stages", stages), ("--tensor", tensor)):
        if value < 1:
            raise ConfigError(f"{name} {value}: expected a whole number of at least 1")
    if "adaptra" not in settings:
        return [Reason(Level.STOCK, 'there is no "adaptra" block', 'add "adaptra": {"enabled": true}')]
    config = parse_config(settings["adaptra"])
    if not config.enabled:
        return [Reason(Level.STOCK, "adaptra.enabled is false", "set it to true")]
    if stages == 1:
        return [Reason(Level.STOCK, "one stage has nothing to schedule and nothing to send", "use at least 2 stages")]
    topology = Topology.of(0, [range(first, stages * tensor, tensor) for first in range(tensor)])
    check_links(config, topology)
    microbatches = settings.get("gradient_accumulation_steps")
    first_book(config, topology, microbatches if isinstance(microbatches, int) and microbatches > 0 else stages)
    return HOST.judge(settings)
