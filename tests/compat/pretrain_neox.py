"""GPT-NeoX's own `train.py`, unchanged, on four CPU ranks: stock, and with the "adaptra" block. Are they the same?

    python -m tests.compat.pretrain_neox CHECKOUT [--precision bf16] [--slow-link] [KEY=VALUE...]

CHECKOUT: a work tree of GPT-NeoX (tried: ea7aefd), which builds its `megatron/data/helpers` there: g++, make and pybind11 are
needed. With `PYTHONPATH` it runs with DeeperSpeed, the project's own DeepSpeed. Settings KEY=VALUE, with values in JSON, come on top
of `BASE`. Around the script CUDA is pretended, and torch's Adam stands for the fused one.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from tests.compat.scripts import RANKS, STAGES, TENSOR, Job, Project, main

BASE: dict[str, Any] = {
    "pipe_parallel_size": STAGES,
    "model_parallel_size": TENSOR,
    "global_num_gpus": RANKS,
    "distributed_backend": "gloo",
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "norm": "layernorm",
    "pos_emb": "rotary",
    "no_weight_tying": False,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "make_vocab_size_divisible_by": 8,
    "tokenizer_type": "CharLevelTokenizer",
    "data_impl": "mmap",
    "num_workers": 0,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 0.003, "betas": [0.9, 0.95]}},
    "min_lr": 0.0003,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1, "reduce_scatter": True, "contiguous_gradients": True, "overlap_comm": False},
    "checkpoint_activations": False,
    "eval_interval": 1000,
    "eval_iters": 0,
    "log_interval": 1,
    "steps_per_print": 1000,
    "use_wandb": False,
}
PRECISION: dict[str, dict[str, Any]] = {
    # the first scales are too large: some iterations are skipped
    "fp16": {
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 24, "loss_scale_window": 4, "hysteresis": 1}
    },
    "bf16": {"precision": "bfloat16", "data_types": {"grad_accum_dtype": "fp32"}},
}
FUSED = "apex.optimizers"
"""Of NVIDIA's apex, which need not be there. PyPI's apex is another product."""


def load() -> None:
    import torch

    apex: Any = importlib.import_module(FUSED)
    apex.FusedAdam = torch.optim.Adam
    pretend(torch.cuda)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    importlib.import_module("megatron.training")


def pretend(cuda: Any) -> None:
    """What the script asks of CUDA outside of kernels."""
    import torch

    cpu = torch.device("cpu")
    cuda.is_available, cuda.device_count, cuda.current_device = (lambda: True), (lambda: RANKS), (lambda: cpu)
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *args: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args: 0)
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor", "ByteTensor"):
        setattr(cuda, name, getattr(torch, name))


def write(path: Path) -> None:
    import numpy

    indexed = importlib.import_module("megatron.data.indexed_dataset")
    builder = indexed.make_builder(f"{path}.bin", impl="mmap", vocab_size=512)
    generator = numpy.random.default_rng(1)
    for _ in range(40):
        builder.add_item(generator.integers(2, 256, 300).astype(builder.dtype))
        builder.end_document()
    builder.finalize(f"{path}.idx")


def arguments(job: Job, checkout: Path, folder: Path, tokens: Path) -> list[str]:
    """As the project's `deepy.py` hands them to `train.py`."""
    settings = {
        **BASE,
        **PRECISION[job.precision],
        "gradient_accumulation_steps": job.microbatches,
        "train_iters": job.iterations,
        "lr_decay_iters": job.iterations,
        **{f"{part}_data_paths": [str(tokens)] for part in ("train", "valid", "test")},
        "deepspeed_extra_args": {"adaptra": dict(job.block)},
    }
    for setting in job.more:
        key, _, value = setting.partition("=")
        settings[key] = json.loads(value)
    path = folder / "neox.yml"
    path.write_text(json.dumps(settings))
    neox: Any = importlib.import_module("megatron.neox_arguments").NeoXArgs
    with contextlib.redirect_stdout(io.StringIO()):  # it prints all of its settings
        found = neox.consume_deepy_args([str(checkout / "train.py"), str(path)]).get_deepspeed_main_args()
    return [str(argument) for argument in found[found.index("--deepspeed_config") :]]


PROJECT = Project(
    title="GPT-NeoX",
    script="train.py",
    missing=(
        *(
            "transformers",
            "tokenizers",
            "sentencepiece",
            "boto3",
            "hf_transfer",
            "ftfy",
            "lm_dataformat",
            "mup",
            "apex",
        ),
        *("comet_ml", "tiktoken", "best_download", "flash_attn"),
    ),
    load=load,
    write=write,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(PROJECT))
