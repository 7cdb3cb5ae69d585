"""DeepSpeed trainings on this host, stock against Adaptra in the same run: what an iteration and its processes cost.

    python -m benchmarks.training [--paced] [--width 24] [--iterations 40] [--settings '{"direct": false}'] [--json FILE]

Four stages x 12 microbatches of a byte-level GPT that is so small that what is not compute shows. As it is, or **paced** (F/I/W 12/12/8 ms:
a stage really trains, then sleeps to its budget), then with a slow link 1-2 (36 ms) as well, against the plan that ran. Printed are
medians over the second half of the iterations: time, and CPU time of the ranks with all their threads and proxies.
"""

from __future__ import annotations

import argparse
import json
import os
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


def train(folder: Path, options: argparse.Namespace, *, adaptra: bool, slow: bool) -> dict[str, Any]:
    """One run: an iteration's time and its CPU time over all processes (ms), the makespan (ms) that the last plan predicts, losses."""
    folder.mkdir(parents=True)
    links = [{"src": 1, "dst": 2, "latency_ms": LATENCY_MS, "from_iteration": options.iterations // 4}]
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
        *("--iterations", str(options.iterations), "--width", str(options.width), "--result", str(folder / "result")),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("w") as sink:
        code = subprocess.run(command, env=environment, stdout=sink, stderr=sink, timeout=DEADLINE_S).returncode
    if code:
        raise SystemExit(f"{folder.name} ended with code {code}:\n{log.read_text()[-3000:]}")
    results = [json.loads((folder / "result" / f"rank{rank}.json").read_text()) for rank in range(STAGES)]
    half = options.iterations // 2
    plans: list[float] = []
    if adaptra:
        records = map(json.loads, (folder / "events" / "rank00000.jsonl").read_text().splitlines())
        plans = [record["plan"]["makespan_ms"] for record in records if record["type"] == "plan"]
    return {
        "iteration_ms": round(statistics.median(results[-1]["iteration_ms"][half:]), 1),
        "cpu_ms": round(sum(statistics.median(r["cpu_ms"][half:]) + r["helpers_cpu_ms"] for r in results), 1),
        "plan_ms": plans[-1] if plans else None,
        "losses": results[-1]["losses"],
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
                rows[name] = row = train(
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
