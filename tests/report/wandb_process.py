"""A script that uses W&B and a reporter, in a process of its own: W&B keeps global state."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

PRELUDE = """
import wandb
from adaptra_plugin.config import ReportConfig
from adaptra_plugin.report import Reporter
from adaptra_plugin.report.console import show_log
from tests.report.events import HEALED, SLOW
from tests.report.settle import own_run_opened, settle

show_log(0)

def metrics(i):
    return {"iteration": i, "iteration_ms": 300.0 + i, "bubble_ms": [1.0, 2.0], "link_delay_ms": {"2-3": 0.4}}

def reporter(mode):
    return Reporter(ReportConfig(directory=None, wandb=mode, wandb_alert_interval_s=0), 0)

"""


@dataclass(frozen=True)
class Outcome:
    code: int
    log: str
    seconds: float


def run_script(folder: Path, script: str, *, prelude: str = PRELUDE, **environment: str) -> Outcome:
    """Runs it in `folder`, offline if `environment` does not say otherwise."""
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **environment,
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        env={**os.environ, **settings},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return Outcome(done.returncode, done.stdout + done.stderr, time.monotonic() - began)
