"""Megatron-core pipelines with a link that turns slow: Adaptra against the stock schedules it replaces, in the same run.

    python -m benchmarks.megatron [--chunks 1 2] [--experts 4] [--stock-order] [--scale 2] [--latency-ms 120]
        [--iterations 24] [--json FILE]

Four ranks under torchrun train a GPT of Megatron's layers. **Compute is paced**: a stage really trains, then sleeps to its budget
(F/I/W 20/20/12 ms for each model chunk; `--scale` multiplies them and the latency, for models that compute longer). Runs: stock and
Adaptra, each healthy and with link 1-2 late by `--latency-ms` from the middle on. Printed are medians over the iterations of the second
half, those before the new plan included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptra_plugin.launch.ports import free_port

RANKS = 4
COMPUTE = {"forward_ms": 20, "backward_input_ms": 20, "backward_weight_ms": 12}
RUN_DEADLINE_S = 300.0


def train(
    folder: Path,
    chunks: int,
    adaptra: bool,
    links: list[dict[str, Any]],
    iterations: int,
    model: Sequence[str],
    scale: float,
) -> dict[str, Any]:
    """One training run: iteration times of the last rank, losses, and the hashes of all ranks' parameters."""
    name = f"{'adaptra' if adaptra else 'stock'}-{chunks}-{'slow' if links else 'healthy'}"
    config = folder / f"{name}.json"
    block = {
        "report": {"directory": str(folder / f"{name}-events"), "wandb": "off"},
        "transport": {"bind": "127.0.0.1"},
        "simulate": {"compute": {name: ms * scale for name, ms in COMPUTE.items()}, "links": links},
    }
    config.write_text(json.dumps({"adaptra": block}))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)),
        *("--master_port", str(free_port()), "-m", "adaptra_plugin.launch.train_megatron"),
        *("--pipeline", str(RANKS), "--chunks", str(chunks), "--iterations", str(iterations), *model),
        *("--adaptra-config" if adaptra else "--simulate", str(config), "--result", str(folder / name)),
    ]
    log = folder / f"{name}.log"
    with log.open("w") as sink:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, env=environment, stdout=sink, stderr=sink, timeout=RUN_DEADLINE_S).returncode
    if code:
        raise SystemExit(f"{name} ended with code {code}:\n{log.read_text()[-3000:]}")
    results = [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    last = results[-1]
    return {**last, "parameters_sha256": [result["parameters_sha256"] for result in results]}


def measure(chunks: int, latency_ms: float, iterations: int, model: Sequence[str], scale: float) -> dict[str, Any]:
    """All four runs of one kind of schedule, and what follows from them."""
    half = iterations // 2
    slow = [{"src": 1, "dst": 2, "latency_ms": latency_ms * scale, "from_iteration": half}]
    with tempfile.TemporaryDirectory(prefix="adaptra-megatron-") as folder:
        runs = {
            (name, state): train(Path(folder), chunks, name == "adaptra", links, iterations, model, scale)
            for name in ("stock", "adaptra")
            for state, links in (("healthy", []), ("slow", slow))
        }
    times = {key: statistics.median(run["iteration_ms"][half:]) for key, run in runs.items()}
    first = runs["stock", "healthy"]
    return {
        "chunks": chunks,
        "model": list(model),
        "scale": scale,
        "latency_ms": latency_ms,
        "iteration_ms": {" ".join(key): round(value, 1) for key, value in times.items()},
        "times_stock_slow": round(times["stock", "slow"] / times["adaptra", "slow"], 2),
        "of_own_healthy": round(times["adaptra", "slow"] / times["adaptra", "healthy"], 2),
        "of_stock_healthy": round(times["adaptra", "healthy"] / times["stock", "healthy"], 2),
        "identical": all(run[name] == first[name] for run in runs.values() for name in ("losses", "parameters_sha256")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2], help="model chunks a rank")
    parser.add_argument("--experts", type=int, default=0, help="of each layer; 0: dense layers")
    parser.add_argument("--stock-order", action="store_true", help="measure the level at which no plans run")
    parser.add_argument("--scale", type=float, default=1.0, help="of the budgets and the latency")
    parser.add_argument("--latency-ms", type=float, default=120.0)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    print(
        f"{RANKS} ranks, 12 microbatches, compute paced to {options.scale} x {COMPUTE}, {os.cpu_count()} processors",
        flush=True,
    )
    model = ["--experts", str(options.experts), *(["--stock-order"] if options.stock_order else [])]
    rows = []
    for chunks in options.chunks:
        row = measure(chunks, options.latency_ms, options.iterations, model, options.scale)
        rows.append(row)
        schedule = "1F1B" if chunks == 1 else f"interleaved, {chunks} chunks a rank"
        print(f"{schedule}: ms an iteration {row['iteration_ms']}")
        print(
            f"  slow link: {row['times_stock_slow']} times as fast as stock, {row['of_own_healthy']} of its own healthy time; "
            f"healthy: {row['of_stock_healthy']} of stock's; losses and parameters identical: {row['identical']}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
