"""What ``adaptra doctor`` does with its options."""

from __future__ import annotations

import sys

from adaptra_plugin.doctor import Machine, Needs, Status, examine
from adaptra_plugin.doctor.needs import HOST, from_file
from adaptra_plugin.doctor.show import as_json, as_text
from adaptra_plugin.doctor.topology import count_gpus


def run(config: str | None, ranks: int | None, json: bool, machine: Machine | None = None) -> int:
    """Examines and prints. Returns the exit code: 1 if a row is FAIL, otherwise 0.

    Args:
        config: DeepSpeed's configuration file; None: the defaults.
        ranks: processes of the job on this node; None: one per GPU, or one.
        json: print JSON.
    """
    machine = machine or Machine()
    rows = []
    count = ranks or max(1, count_gpus(machine))
    needs = Needs(ranks=count)
    if config is not None:
        parsed, row = from_file(config)
        needs = Needs(parsed, count, HOST.distribution)
        rows.append(row)
    rows += examine(machine, needs)
    sys.stdout.write(as_json(rows) + "\n" if json else as_text(rows))
    return int(any(row.status is Status.FAIL for row in rows))
