"""Megatron-DeepSpeed's own `pretrain_gpt.py`, unchanged, on four CPU ranks: stock, and with the "adaptra" block. Are they the same?

    python -m tests.compat.pretrain_megatron_deepspeed CHECKOUT [--precision bf16] [--slow-link] [ARGUMENT...]

CHECKOUT: a work tree of Megatron-DeepSpeed (tried: 4efb479), which builds its `megatron/data/helpers` there: g++, make and
pybind11 are needed. ARGUMENTs are added to those of `BASE`. A microbatch is one sequence, because the attention without fused kernels
takes no more there. Stock does not run with `--sequence-parallel` in a pipeline. `--enable-zbh1-pipeline` needs an older DeepSpeed
(tried: 0.16.9, with `PYTHONPATH`), and keeps the order of that schedule.
"""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path

from tests.compat.scripts import STAGES, TENSOR, Job, Project, main

BASE = shlex.split(f"""
    --tensor-model-parallel-size {TENSOR} --pipeline-model-parallel-size {STAGES} --distributed-backend gloo --deepspeed --zero-stage 1
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1
    --lr 0.003 --tokenizer-type NullTokenizer --vocab-size 255 --make-vocab-size-divisible-by 8 --data-impl mmap --split 100,0,0
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --num-workers 0 --no-masked-softmax-fusion --no-bias-gelu-fusion
    --no-bias-dropout-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm
""")
PRECISION = {
    # the first scales are too large: some iterations are skipped
    "fp16": {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 24, "loss_scale_window": 4}},
    "bf16": {"bf16": {"enabled": True}},
}


def load() -> None:
    importlib.import_module("megatron.training")


def write(path: Path) -> None:
    import torch

    indexed = importlib.import_module("megatron.data.indexed_dataset")
    builder = indexed.make_builder(f"{path}.bin", impl="mmap", vocab_size=256)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        builder.add_item(torch.randint(0, 255, (300,), generator=generator))
        builder.end_document()
    builder.finalize(f"{path}.idx")


def arguments(job: Job, checkout: Path, folder: Path, tokens: Path) -> list[str]:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": job.microbatches,
        "steps_per_print": 1000,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "adaptra": dict(job.block),
        **PRECISION[job.precision],
    }
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(settings))
    sizes = f"--global-batch-size {job.microbatches} --train-iters {job.iterations} --lr-decay-iters {job.iterations}"
    places = ["--deepspeed_config", str(path), "--data-path", str(tokens)]
    return [*BASE, f"--{job.precision}", *sizes.split(), *places, *job.more]


PROJECT = Project(
    title="Megatron-DeepSpeed",
    script="pretrain_gpt.py",
    # the last is no longer part of DeepSpeed 0.19
    missing=("transformers", "torchvision", "timm", "regex", "six", "flask", "deepspeed.compression.compress"),
    load=load,
    write=write,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(PROJECT))
