"""What published jobs with several stages can have: `python -m tests.compat.published CHECKOUT`, of Megatron-DeepSpeed or GPT-NeoX.

Each script of Megatron-DeepSpeed's `examples_deepspeed/` runs in a copy of the checkout, with a `deepspeed` and a `torchrun` on the path
that start nothing: they keep the arguments and the configuration. GPT-NeoX's configurations hold those of DeepSpeed. `adaptra check`
judges them, with an `"adaptra"` block added.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from adaptra_plugin.doctor.job import judge
from adaptra_plugin.patches.deepspeed_support import CHECKPOINTS_REASON, checkpoints_keep_the_order
from adaptra_plugin.patches.hosts import HOSTS
from adaptra_plugin.support import Level, Reason, level_of

STAGES = re.compile(r"^\s*(?:export )?(?:pp_size|PP_SIZE|PP)=(\d+)", re.MULTILINE)
FOREIGN = "/blob"
"""Where some scripts write; it becomes a folder of the copy."""
RECORD = """#!/bin/sh
for argument in "$@"; do printf '%s\\0' "$argument"; done > "$RECORD"
"""
NOTHING = "#!/bin/sh\nexit 0\n"
GPUS = "#!/bin/sh\nfor n in 0 1 2 3 4 5 6 7; do echo GPU $n; done\n"
COMMANDS = {
    "deepspeed": RECORD,
    "torchrun": RECORD,
    "nvidia-smi": GPUS,
    **dict.fromkeys(("ds_ssh", "ssh", "wget", "curl", "sudo", "pip", "sleep"), NOTHING),
}
OWN_PIPELINE = Reason(
    Level.STOCK_ORDER,
    "the script brings a zero-bubble pipeline of its own",
    "plans need it without --enable-zbh1-pipeline",
)


Job = tuple[str, dict[str, Any], int, int, list[Reason]]
"""Name, configuration, stages, tensor group, and what does not show in the configuration."""


def main() -> int:
    checkout = Path(sys.argv[1])
    jobs = scripts_of if (checkout / "examples_deepspeed").is_dir() else configurations_of
    levels = []
    for name, settings, stages, tensor, more in jobs(checkout):
        judged = judge(HOSTS["deepspeed"], {**settings, "adaptra": {"enabled": True}}, stages=stages, tensor=tensor)
        reasons = [*judged.reasons, *more]
        levels.append(level_of(reasons))
        print(f"{levels[-1].value:<12} {stages} x {tensor}  {name}", *reasons, sep="\n    ")
    full = levels.count(Level.FULL)
    print(f"{full} of {len(levels)} jobs with several stages have everything")
    return int(full == 0)


def configurations_of(checkout: Path) -> Iterator[Job]:
    """GPT-NeoX's."""
    for path in sorted((checkout / "configs").rglob("*.yml")):
        settings = {str(key).replace("-", "_"): value for key, value in yaml.safe_load(path.read_text()).items()}
        if (stages := int(settings.get("pipe_parallel_size", 0))) > 1:
            # the spelling of one of them is GPT-NeoX's
            names = ("contigious_checkpointing", "checkpoint_in_cpu", "partition_activations")
            kept = checkpoints_keep_the_order(*(bool(settings.get(name)) for name in names))
            more = [CHECKPOINTS_REASON] if kept else []
            yield str(path.relative_to(checkout)), settings, stages, int(settings["model_parallel_size"]), more


def scripts_of(checkout: Path) -> Iterator[Job]:
    """Megatron-DeepSpeed's."""
    scripts = sorted(
        script.relative_to(checkout)
        for script in (checkout / "examples_deepspeed").rglob("*.sh")
        if any(int(number) > 1 for number in STAGES.findall(script.read_text()))
        and ("deepspeed " in script.read_text() or "torchrun " in script.read_text())
    )
    for script in scripts:
        with tempfile.TemporaryDirectory() as folder:
            arguments, settings = recorded(checkout, script, Path(folder))
        stages, tensor = (int(value_of(arguments, f"--{kind}-model-parallel-size")) for kind in ("pipeline", "tensor"))
        own = any("zbh1" in argument for argument in arguments)
        yield str(script), settings, stages, tensor, [OWN_PIPELINE] if own else []


def recorded(checkout: Path, script: Path, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Arguments that a script starts its training with, and the configuration among them.

    Raises:
        RuntimeError: it has started nothing.
    """
    copy, commands, record = folder / "copy", folder / "commands", folder / "record"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    text = (copy / script).read_text().replace(FOREIGN, str(folder / "elsewhere"))
    (copy / script).write_text(text)
    env = {"PATH": f"{commands}:{os.defpath}", "HOME": str(folder), "USER": "user", "RECORD": str(record)}
    # scripts at the top are started from the top, others from where they lie
    top = ("pretrain_gpt.py" in text and "../../pretrain_gpt.py" not in text) or "finetune_llama.py" in text
    working = copy if top else (copy / script).parent
    (working / "tmp").mkdir(exist_ok=True)
    done = subprocess.run(["bash", copy / script], cwd=working, env=env, capture_output=True, text=True, timeout=60)
    if not record.exists():
        raise RuntimeError(f"{script} has started nothing: {done.stderr[-500:]}")
    arguments = record.read_text().split("\0")[:-1]
    return arguments, json.loads((working / value_of(arguments, "--deepspeed_config")).read_text())


def value_of(arguments: list[str], name: str) -> str:
    """Of an option, however it is written."""
    for index, argument in enumerate(arguments):
        if argument == name:
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return "1"


if __name__ == "__main__":
    sys.exit(main())
