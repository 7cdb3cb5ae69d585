"""`make demo`: four runs of the same training, stock and Adaptra, each healthy and with a link that turns slow.

Every run is the real thing: the `deepspeed` command line, four pipeline stages on CPU, a byte-level GPT on real text. Compute is
paced (each stage trains, then sleeps to its budget), so that four stages fit two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from adaptra_plugin.errors import AdaptraError
from adaptra_plugin.launch import progress
from adaptra_plugin.launch.demo_report import Summary, picture, summarise, table
from adaptra_plugin.launch.ports import free_port

STAGES = 4
RUN_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Run:
    """One of the four runs."""

    name: str
    title: str
    adaptra: bool
    slow: bool


RUNS = (
    Run("stock-healthy", "stock, healthy", adaptra=False, slow=False),
    Run("stock-slow", "stock, slow link", adaptra=False, slow=True),
    Run("adaptra-healthy", "adaptra, healthy", adaptra=True, slow=False),
    Run("adaptra-slow", "adaptra, slow link", adaptra=True, slow=True),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="DeepSpeed configuration with the adaptra block")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--iterations", type=int, default=20)
    arguments = parser.parse_args(argv)
    console = Console(width=max(100, Console().width))
    out = arguments.out.resolve()
    base = json.loads(arguments.config.read_text())
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    simulate = base["adaptra"]["simulate"]
    compute, link = simulate["compute"], simulate["links"][0]
    console.print(
        f"Byte-level GPT on {STAGES} pipeline stages over the Python standard library's source, "
        f"{base['gradient_accumulation_steps']} microbatches an iteration, {arguments.iterations} iterations a run.\n"
        f"[bold]Compute is paced[/bold]: a stage really trains, then sleeps until F/I/W have taken "
        f"{compute['forward_ms']}/{compute['backward_input_ms']}/{compute['backward_weight_ms']} ms.\n"
        f"Link {link['src']}-{link['dst']} is delayed by {link['latency_ms']} ms from iteration {link['from_iteration']} on "
        "in the slow runs: a blocking transfer for stock, a later arrival for Adaptra.\n"
    )
    began = time.monotonic()
    try:
        for run in RUNS:
            execute(run, base, out, arguments.iterations, console)
        summary = summarise(out, base, {run.name: run.title for run in RUNS})
        picture(out, summary)
    except (AdaptraError, OSError) as error:
        console.print(f"[red]{error}[/red]")
        return 1
    summary.data["seconds"] = round(time.monotonic() - began, 1)
    (out / "summary.json").write_text(json.dumps(summary.data, indent=2) + "\n")
    finish(console, summary, out)
    return 0 if summary.data["losses_identical"] and summary.data["parameters_identical"] else 1


def execute(run: Run, base: dict[str, Any], out: Path, iterations: int, console: Console) -> None:
    """Runs one training with the `deepspeed` command line.

    Raises:
        AdaptraError: it failed; the message names its log.
    """
    folder = out / run.name
    folder.mkdir()
    config = copy.deepcopy(base)
    config["adaptra"]["enabled"] = run.adaptra
    config["adaptra"]["report"]["directory"] = str(folder / "events")
    if not run.slow:
        config["adaptra"]["simulate"]["links"] = []
    config_path = folder / "ds.json"
    config_path.write_text(json.dumps(config, indent=2))
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_gpus", str(STAGES), "--master_port", str(free_port())),
        str(Path(__file__).with_name("train_gpt.py")),
        *("--deepspeed_config", str(config_path), "--stages", str(STAGES)),
        *("--iterations", str(iterations), "--result", str(folder / "result")),
    ]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    log = folder / "log.txt"
    with _progress(run.title, iterations, console) as advance, log.open("w") as sink:
        code = _stream(command, environment, sink.write, advance)
    if code != 0 or not (folder / "result" / f"rank{STAGES - 1}.json").exists():
        raise AdaptraError(f"{run.title}: deepspeed ended with code {code}; see {log}")


class _progress:
    """A progress bar for one run; the context is a function that takes the iteration and a note."""

    def __init__(self, title: str, total: int, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=40),
            TextColumn("{task.completed:>3.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._bar.add_task(title, total=total, note="starting 4 processes")

    def __enter__(self) -> Callable[[int, str], None]:
        self._bar.start()
        return lambda done, note: self._bar.update(self._task, completed=done, note=note)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _stream(
    command: list[str],
    environment: dict[str, str],
    write: Callable[[str], object],
    advance: Callable[[int, str], None],
) -> int:
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + RUN_DEADLINE_S
    assert process.stdout is not None
    try:
        for line in process.stdout:
            write(line)
            said = progress.read(line)
            if said is not None:
                advance(said.done, f"loss {said.loss:.4f}  {said.ms:.0f} ms")
            if time.monotonic() > deadline:
                raise AdaptraError(f"a run took longer than {RUN_DEADLINE_S:.0f} s")
        return process.wait(timeout=60)
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its ranks
            process.wait(timeout=30)


def finish(console: Console, summary: Summary, out: Path) -> None:
    """The table and where everything is."""
    data = summary.data
    console.print(table(data))
    console.print(
        f"losses identical in all four runs: [bold]{data['losses_identical']}[/bold]; "
        f"parameters identical: [bold]{data['parameters_identical']}[/bold]"
    )
    for event in data["events"]:
        console.print(f"detected in iteration {event['found_iteration']}: {event['text']}")
    if data["detected_after_iterations"] is None:
        console.print("[red]the slow link was not detected[/red]")
    console.print(
        "[dim]Paced compute on a machine without GPUs: the figures show the schedule and the transport, not the speed of kernels.[/dim]"
    )
    for what, path in data["files"].items():
        console.print(f"{what:<14} {path}")
    console.print(f"summary        {out / 'summary.json'}")
    console.print(f"[dim]deepspeed {metadata.version('deepspeed')}, {data['seconds']} s[/dim]")


if __name__ == "__main__":
    sys.exit(main())
