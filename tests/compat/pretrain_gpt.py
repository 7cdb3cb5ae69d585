"""Megatron-LM's own `pretrain_gpt.py`, unchanged, on CPU ranks: stock, and with `ADAPTRA_CONFIG` set; do they print the same?

    python -m tests.compat.pretrain_gpt CHECKOUT [--ranks 2] [ARGUMENT...]

CHECKOUT: Megatron-LM at a supported version (tried: core_v0.16.1), with its `datasets/helpers_cpp` built and what its tokenizers
import (six, regex, ...) installed: too much for the test suite. ARGUMENTs are added to those of `BASE`. Around the script CUDA is
pretended, and `deallocate_pipeline_outputs` is off in both runs: interleaved stock gives NaN with it on gloo.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.compat.hosts import ROOT, pretend_triton

DEADLINE_S = 300.0
BASE = shlex.split("""
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2
    --global-batch-size 16 --train-iters 8 --lr 0.01 --lr-decay-iters 8 --pipeline-model-parallel-size 2 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 255 --split 90,5,5 --transformer-impl local --distributed-backend gloo
    --use-cpu-initialization --no-gradient-accumulation-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion
    --no-masked-softmax-fusion --no-rope-fusion --no-persist-layer-norm --attention-dropout 0 --hidden-dropout 0
    --eval-iters 0 --eval-interval 100 --log-interval 1 --num-workers 0
""")
BLOCK = {
    "transport": {"bind": "127.0.0.1"},
    "detector": {"warmup_iterations": 1, "min_history": 2},
    "report": {"directory": None, "wandb": "off"},
    "simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 10, "from_iteration": 3}]},
}
FIGURES = re.compile(
    r"iteration +\d+/|lm loss: [\d.E+-]+|grad norm: [\d.]+|lm loss value: [\d.E+-]+|skipped iterations: +\d+"
)
OURS = "adaptra-sessions"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    given, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        block = Path(name) / "adaptra.json"
        block.write_text(json.dumps({"adaptra": BLOCK}))
        stock = launch(given, arguments, Path(name), {})
        ours = launch(given, arguments, Path(name), {"ADAPTRA_CONFIG": str(block)})
    sessions = re.findall(rf"{OURS} (\d+) plan v(\d+)", ours)
    figures = [FIGURES.findall(text) for text in (stock, ours)]
    same = figures[0] == figures[1] and bool(figures[0])
    print(
        f"{len(figures[0])} figures of stock, {'the same' if same else 'NOT the same'} with Adaptra; sessions: {sessions}"
    )
    if not (same and sessions and OURS not in stock):
        print(stock[-3000:], ours[-3000:], sep="\n--- with Adaptra:\n")
        return 1
    return 0


def launch(given: argparse.Namespace, arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a run prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.ranks}"]
    command += [str(Path(__file__)), str(given.checkout.resolve()), *BASE, *arguments]
    done = subprocess.run(
        command,
        env={
            **os.environ,
            "ADAPTRA_RANK": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            **environment,
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    )
    return done.stdout


# --- a rank


def rank() -> None:
    checkout, *arguments = sys.argv[1:]
    sys.path[0] = checkout
    import torch

    pretend_triton()
    torch.set_num_threads(1)
    pretend()
    training = importlib.import_module("megatron.training.training")
    training.set_jit_fusion_options = lambda *args, **kwargs: None
    step = training.train_step

    def reporting(*args: Any, **kwargs: Any) -> Any:
        import adaptra_plugin

        result = step(*args, **kwargs)
        for session in adaptra_plugin.status()["sessions"]:
            print(OURS, session["iteration"], f"plan v{session['plan_version']}", flush=True)
        return result

    training.train_step = reporting
    sys.argv = [f"{checkout}/pretrain_gpt.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def pretend() -> None:
    """What `pretrain` asks of CUDA beyond what layers ask (`launch/megatron_cpu.py`), and what it compiles."""
    import torch

    from adaptra_plugin.launch.megatron_cpu import install

    install()
    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count = (lambda: True), torch.get_num_threads
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args: 0)
    for name in ("set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args: None)
    cuda.memory_stats = lambda *args: {}
    cuda.get_device_capability = lambda *args: (8, 0)
    cuda.get_device_properties = lambda *args: type(
        "Properties", (), {"total_memory": 1 << 34, "major": 8, "minor": 0, "name": "cpu"}
    )
    cuda.Event = type(
        "Event",
        (),
        {"__init__": lambda self, **kwargs: None, "record": lambda self: None, "synchronize": lambda self: None},
    )
    begin: Any = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *args, device_id=None, **kwargs: begin(*args, **kwargs)
    start = importlib.import_module("megatron.training.initialize")
    for name in ("_compile_dependencies", "set_jit_fusion_options"):
        setattr(start, name, lambda *args, **kwargs: None)
    # outputs of stages that are let go of while gloo still sends them are NaN in stock
    from megatron.core.transformer.transformer_config import TransformerConfig

    check = TransformerConfig.__post_init__

    def keeping(self: Any) -> None:
        check(self)
        self.deallocate_pipeline_outputs = False

    TransformerConfig.__post_init__ = keeping  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("ADAPTRA_RANK"):
        rank()
    else:
        sys.exit(main())
