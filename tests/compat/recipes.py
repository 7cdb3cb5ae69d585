"""What published recipes of Megatron-Bridge can have: `python -m tests.compat.recipes TABLE.csv`.

A row names sizes (`pp`, `vpp`, `tp`), a precision, and features. Each becomes fields of a `TransformerConfig`, which `adaptra check`
judges. Two things the table leaves open are taken from Megatron-Bridge's own model providers: dropout is 0, and layers are those
of Transformer Engine.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from adaptra_plugin.doctor.job import judge
from adaptra_plugin.patches.hosts import HOSTS
from adaptra_plugin.support import Level

FEATURES: dict[str, dict[str, Any]] = {
    "moe": {"num_moe_experts": 8},
    "mtp": {"mtp_num_layers": 1},
    "cudagraph": {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn"]},
    "ep_overlap": {"overlap_moe_expert_parallel_comm": True},
    "delay_wgrad": {"delay_wgrad_compute": True},
    "defer_emb": {"defer_embedding_wgrad_compute": True},
    "offload": {"fine_grained_activation_offloading": True},
    "opg_with_step": {"overlap_param_gather_with_optimizer_step": True},
    "recompute": {"recompute_granularity": "selective"},
    "sp": {"sequence_parallel": True},
    "distopt-set": {"use_distributed_optimizer": True},
    # said by the sizes and the precision
    "tp": {},
    "vpp": {},
    "fp8/fp4": {},
    "layout": {},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp8_mx": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    "fp8_cs": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "current_scaling": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "nvfp4": {"fp4": "e2m1"},
}
"""By a part of the name; all others are bf16."""


def settings_of(row: dict[str, str]) -> dict[str, Any]:
    """Raises KeyError: a feature is not known."""
    found: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "bf16": True}
    found["pipeline_model_parallel_size"] = int(row["pp"])
    found["tensor_model_parallel_size"] = int(row["tp"])
    if row["vpp"]:
        found["virtual_pipeline_model_parallel_size"] = int(row["vpp"])
    for part, fields in PRECISIONS.items():
        if part in row["precision"]:
            found.update(fields)
    for feature in row["features"].split():
        found.update(FEATURES[feature])
    return found


def main() -> int:
    with Path(sys.argv[1]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    levels: Counter[Level] = Counter()
    reasons: Counter[str] = Counter()
    for row in rows:
        judged = judge(HOSTS["megatron"], settings_of(row), name=row["recipe"])
        levels[judged.level] += 1
        reasons.update(reason.why for reason in judged.reasons)
        print(f"{judged.level.value:<12} {row['recipe']}")
    print(*(f"{count:4} {why}" for why, count in reasons.most_common()), sep="\n")
    print(f"{len(rows)} recipes: {', '.join(f'{count} {level.value}' for level, count in levels.items())}")
    return int(levels[Level.REFUSED] + levels[Level.STOCK] > 0)


if __name__ == "__main__":
    sys.exit(main())
