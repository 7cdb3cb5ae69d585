"""Trains the byte-level GPT on a DeepSpeed pipeline. An ordinary training script: nothing in `main` knows of Adaptra.

deepspeed --num_gpus 4 train_gpt.py --deepspeed_config ds.json --iterations 40 --result result
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch

from adaptra_plugin.config import parse_config
from adaptra_plugin.launch.corpus import Windows, read_corpus
from adaptra_plugin.launch.model import GptSize, build_pipeline
from adaptra_plugin.launch.progress import Progress
from adaptra_plugin.launch.stock import StockSimulation

SEED = 1234


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--width", type=int, default=GptSize.width, help="of the model")
    parser.add_argument(
        "--result", required=True, help="folder for rank<N>.json: losses, iteration and CPU times, parameters' hash"
    )
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    size = GptSize(width=arguments.width)
    model = build_pipeline(size, arguments.stages, SEED)
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=parameters)
    simulation = stock_simulation(engine, arguments.deepspeed_config)

    torch.manual_seed(SEED)
    data = Windows(read_corpus(), engine.train_micro_batch_size_per_gpu(), size.sequence, SEED)
    losses, times, computed = [], [], []
    helpers_s = 0.0  # CPU time of processes that this one has started, in the second half
    for iteration in range(arguments.iterations):
        if iteration == arguments.iterations // 2:
            helpers_s -= children_cpu_s()
        if simulation is not None:
            simulation.set_iteration(iteration)
        begun, computed_before = time.perf_counter(), time.process_time()
        loss = engine.train_batch(data)
        times.append((time.perf_counter() - begun) * 1e3)
        computed.append((time.process_time() - computed_before) * 1e3)
        losses.append(loss.item())
        if engine.global_rank == 0:
            Progress(iteration + 1, losses[-1], times[-1]).say()

    helpers_s += children_cpu_s()
    result = {
        "engine": type(engine).__name__,
        "losses": losses,
        "iteration_ms": times,
        "cpu_ms": computed,
        "helpers_cpu_ms": helpers_s * 1e3 / max(1, arguments.iterations - arguments.iterations // 2),
        "parameters_sha256": hash_parameters(model),
        "parameter_count": sum(p.numel() for p in parameters),
    }
    path = Path(arguments.result) / f"rank{engine.global_rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    torch.distributed.barrier()


def children_cpu_s() -> float:
    """CPU time of the processes that this one has started and that run: the proxy."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(spent.user + spent.system for spent in times)


def stock_simulation(engine: Any, config_path: str) -> StockSimulation | None:
    """The injected link and paced compute for a stock run; Adaptra's own engine reads them itself."""
    config = parse_config(json.loads(Path(config_path).read_text()).get("adaptra"))
    return None if config.enabled else StockSimulation(engine, config.simulate)


def hash_parameters(model: torch.nn.Module) -> str:
    """SHA-256 over all parameters of this stage, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
