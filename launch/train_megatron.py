"""Trains the byte-level GPT on a Megatron-core pipeline. An ordinary training script: one line of it is about Adaptra.

torchrun --nproc-per-node 4 -m adaptra_plugin.launch.train_megatron --pipeline 4 --adaptra-config configs/megatron.json

Without CUDA devices the ranks run on the CPU, with gloo. Without `--adaptra-config` the stock schedules run; then `--simulate`
takes the slow links and the paced compute of a configuration, for comparisons.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from adaptra_plugin.config import parse_config
from adaptra_plugin.launch.corpus import Windows, read_corpus
from adaptra_plugin.launch.megatron_cpu import install
from adaptra_plugin.launch.progress import Progress
from adaptra_plugin.patches.megatron_gate import add_arguments

SEED = 1234


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=int, default=4, help="ranks of a pipeline")
    parser.add_argument("--chunks", type=int, default=1, help="model chunks (virtual stages) of each rank")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--experts", type=int, default=0, help="of each layer (mixture of experts); 0: dense layers")
    parser.add_argument(
        "--stock-order", action="store_true", help="claim a feature that plans cannot bear, to measure that level"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=32, help="bytes")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=12, help="of an iteration")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument(
        "--result", type=Path, help="folder for rank<N>.json: losses, iteration times, parameters' hash"
    )
    parser.add_argument("--simulate", type=Path, help="slow links and paced compute for a run of the stock schedules")
    return add_arguments(parser).parse_args(argv)  # the one line: activates if --adaptra-config is given


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    install()
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    from adaptra_plugin.launch.megatron_gpt import GptJob, GptTrainer

    job = GptJob(
        pipeline=arguments.pipeline,
        chunks=arguments.chunks,
        tensor=arguments.tensor,
        layers=arguments.layers,
        width=arguments.width,
        sequence=arguments.sequence,
        micro_batch=arguments.micro_batch,
        seed=SEED,
        learning_rate=1e-3,
        extra=_experts(arguments),
    )
    trainer = GptTrainer(job)
    if arguments.stock_order:
        trainer.config.moe_paged_stash = True  # of which nothing is there
    simulation = _simulation(arguments)
    corpus = read_corpus()
    rank, last = torch.distributed.get_rank(), trainer.is_last
    losses: list[float] = []
    times: list[float] = []
    for iteration in range(arguments.iterations):
        if simulation is not None:
            simulation.set_iteration(iteration)

        def data(seed: int = SEED + iteration) -> Iterator[Any]:
            return Windows(corpus, job.micro_batch, job.sequence, seed)

        begun = time.perf_counter()
        found = trainer.step(data, arguments.microbatches)
        times.append((time.perf_counter() - begun) * 1e3)
        if last:
            losses.append(statistics.fmean(found["losses"]))
            Progress(iteration + 1, losses[-1], times[-1]).say()
    if arguments.result is not None:
        arguments.result.mkdir(parents=True, exist_ok=True)
        result = {"losses": losses, "iteration_ms": times, "parameters_sha256": trainer.hash_parameters()}
        (arguments.result / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    import adaptra_plugin

    adaptra_plugin.deactivate()
    torch.distributed.destroy_process_group()


def _experts(arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.experts:
        return {}
    return {
        "num_moe_experts": arguments.experts,
        "moe_router_topk": min(2, arguments.experts),
        "moe_ffn_hidden_size": 2 * arguments.width,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "add_bias_linear": False,
    }


def _simulation(arguments: argparse.Namespace) -> Any:
    """For a stock run; a run with Adaptra reads its own configuration."""
    if arguments.simulate is None or arguments.adaptra_config is not None:
        return None
    from adaptra_plugin.launch.stock_megatron import MegatronSimulation

    return MegatronSimulation(parse_config(json.loads(arguments.simulate.read_text())["adaptra"]).simulate)


if __name__ == "__main__":
    main()
