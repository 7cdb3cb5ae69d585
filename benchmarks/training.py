"""DeepSpeed trainings on this host, stock against Adaptra in the same run: what an iteration and its processes cost.

    python -m benchmarks.training [--paced] [--width 24] [--iterations 40] [--settings '{"direct": false}'] [--json FILE]

Four stages x 12 microbatches of a byte-level GPT that is so small that what is not compute shows. As it is, or **paced** (F/I/W 12/12/8 ms:
a stage really trains, then sleeps to its budget), then with a slow link 1-2 (36 ms) as well, against the plan that ran. Printed are
medians over the last half of the iterations, and CPU time of all processes: of a longer run less that of a shorter one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from adaptra_plugin.launch.ports import free_port

STAGES = 4
COMPUTE = {"forward_ms": 12, "backward_input_ms": 12, "backward_weight_ms": 8}
LATENCY_MS = 36
DEADLINE_S = 400.0


def train(folder: Path, options: argparse.Namespace, iterations: int, *, adaptra: bool, slow: bool) -> dict[str, Any]:
    """One run: iteration times (ms), CPU time of all its processes (s), the makespan (ms) that the last plan predicts, losses."""
    folder.mkdir(parents=True)
    links = [{"src": 1, "dst": 2, "latency_ms": LATENCY_MS, "from_iteration": iterations // 4}]
    block = {
        "enabled": adaptra,
        "report": {"directory": str(folder / "events"), "wandb": "off"},
        "transport": {"bind": "127.0.0.1", **options.settings},
        "simulate": {"compute": COMPUTE if options.paced else None, "links": links if slow else []},
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 12,
        "steps_per_print": 1_000_000,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True}},
        "adaptra": block,
    }
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    command = [
        *(
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_gpus",
            str(STAGES),
            "--master_port",
            str(free_port()),
        ),
        *("--module", "adaptra_plugin.launch.train_gpt", "--deepspeed_config", str(path), "--stages", str(STAGES)),
        *("--iterations", str(iterations), "--width", str(options.width), "--result", str(folder / "result")),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = folder / "log"
    with log.open("w") as sink:
        code = subprocess.run(command, env=environment, stdout=sink, stderr=sink, timeout=DEADLINE_S).returncode
    if code:
        raise SystemExit(f"{folder.name} ended with code {code}:\n{log.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads((folder / "result" / f"rank{STAGES - 1}.json").read_text())
    predicted = (
        [
            record["predicted_ms"]
            for line in (folder / "events" / "rank00000.jsonl").read_text().splitlines()
            if (record := json.loads(line))["type"] == "plan"
        ]
        if adaptra
        else []
    )
    return {
        "ms": result["iteration_ms"],
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "plan_ms": predicted[-1] if predicted else None,
        "losses": result["losses"],
    }


def measure(folder: Path, options: argparse.Namespace, *, adaptra: bool, slow: bool) -> dict[str, Any]:
    """A long run, and a short one for what it costs to start."""
    long = train(folder / "long", options, options.iterations, adaptra=adaptra, slow=slow)
    short = train(folder / "short", options, options.iterations // 2, adaptra=adaptra, slow=slow)
    cpu_ms = (long["cpu_s"] - short["cpu_s"]) * 1e3 / (options.iterations - options.iterations // 2)
    return {
        "iteration_ms": round(statistics.median(long["ms"][options.iterations // 2 :]), 1),
        "cpu_ms": round(cpu_ms, 1),
        "plan_ms": long["plan_ms"],
        "losses": long["losses"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paced", action="store_true")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--settings", type=json.loads, default={}, help="more of the `transport` block")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="adaptra-training-") as folder:
        for slow in (False, True) if options.paced else (False,):
            for adaptra in (False, True) if not slow else (True,):
                name = f"{'adaptra' if adaptra else 'stock'}, {'slow link' if slow else 'healthy'}"
                rows[name] = row = measure(
                    Path(folder) / name.replace(", ", "-").replace(" ", "-"), options, adaptra=adaptra, slow=slow
                )
                against = (
                    f", {row['iteration_ms'] / row['plan_ms']:.2f} of its plan"
                    if row["plan_ms"] and options.paced
                    else ""
                )
                print(
                    f"{name:<20} {row['iteration_ms']:7.1f} ms an iteration, {row['cpu_ms']:7.1f} ms of CPU{against}",
                    flush=True,
                )
    stock, ours = rows["stock, healthy"], rows["adaptra, healthy"]
    cpu = ours["cpu_ms"] / stock["cpu_ms"]
    print(
        f"healthy, of stock: {ours['iteration_ms'] / stock['iteration_ms']:.2f} of its time, {cpu:.2f} of its CPU; "
        f"losses identical: {all(row['losses'] == stock['losses'] for row in rows.values())}"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
