"""The "adaptra" block of a DeepSpeed job, and how much of Adaptra the job can have, with reasons. Looked at before the engine is
built, and at its first schedule."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from adaptra_plugin import _activation
from adaptra_plugin.config import AdaptraConfig, parse_config
from adaptra_plugin.errors import refuse
from adaptra_plugin.support import Reason, Rule, in_stock_order, judge, refuse_what_must_be, refused

OTHERWISE = 'or set "adaptra": {"enabled": false}'
_refuse = functools.partial(refuse, otherwise=OTHERWISE)


def _on(config: Mapping[str, Any], *path: str) -> bool:
    """True if the (nested) key is present and switched on (`{"enabled": true}`, `true`, a non-empty value)."""
    value: Any = config
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    if isinstance(value, Mapping):
        return bool(value.get("enabled", False))
    return bool(value)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A block of the configuration; empty if it is absent or has a form that DeepSpeed has to judge."""
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def _optimizer(config: Mapping[str, Any]) -> str:
    return str(_section(config, "optimizer").get("type", "")).lower()


def _zero_stage(config: Mapping[str, Any]) -> int:
    stage = _section(config, "zero_optimization").get("stage", 0)
    return stage if isinstance(stage, int) else 0


def _offloads(config: Mapping[str, Any]) -> bool:
    """Whether optimizer states are offloaded in a way that has not been verified. On the CPU they have: with ZeRO-1 in a pipeline,
    gradients are looked at in the reduction, after the schedule."""
    zero = _section(config, "zero_optimization")
    device = _section(zero, "offload_optimizer").get("device", "none")
    # DeepSpeed has an enumeration of the devices, too
    return str(getattr(device, "value", device)).lower() not in ("none", "cpu") or bool(zero.get("zenflow"))


ONE_BIT = ("onebitadam", "zerooneadam", "onebitlamb")
ONE_BIT_REASON = in_stock_order(
    "1-bit optimizers compress gradients inside their own step and replace the engine's gradient reduction",
    'plans need "Adam", "AdamW" or "Lamb"',
)
CHECKPOINTS = ("contiguous_memory_optimization", "cpu_checkpointing", "partition_activations")
CHECKPOINTS_REASON = in_stock_order(
    "contiguous activation checkpoints have buffers for as many forwards in a row as the stock order runs, and those that are "
    "offloaded whole have not been verified",
    'plans need "contiguous_memory_optimization": false, and "cpu_checkpointing" with "partition_activations" only',
)


def checkpoints_keep_the_order(contiguous: bool, on_the_host: bool, partitioned: bool) -> bool:
    """Whether activation checkpoints of these kinds need the stock order, or have not been verified without it."""
    return contiguous or (on_the_host and not partitioned)


COMPILED_REASON = in_stock_order(
    "torch.compile traces the linear layers whole, so their backward cannot be split",
    'plans need a job without "compile" and without engine.compile()',
)

RULES: tuple[Rule, ...] = (
    (lambda c: _optimizer(c) in ONE_BIT, ONE_BIT_REASON),
    (
        lambda c: checkpoints_keep_the_order(*(_on(c, "activation_checkpointing", name) for name in CHECKPOINTS)),
        CHECKPOINTS_REASON,
    ),
    (lambda c: _on(c, "compile") or _on(c, "compile", "deepcompile"), COMPILED_REASON),
    (
        lambda c: _on(c, "amp"),
        in_stock_order("apex's amp replaces functions of torch while it trains", 'plans need "fp16" or "bf16"'),
    ),
    (
        lambda c: _zero_stage(c) > 1,
        refused(
            "ZeRO-2 and ZeRO-3 do not work with pipeline parallelism (DeepSpeed refuses them too)",
            'set "zero_optimization": {"stage": 1}',
        ),
    ),
    (
        _offloads,
        in_stock_order(
            "optimizer states on NVMe and ZenFlow have not been verified with a split backward",
            'plans need "zero_optimization" without "zenflow", and with "offload_optimizer" to "cpu" or none',
        ),
    ),
    (
        lambda c: _on(c, "progressive_layer_drop") or _on(c, "eigenvalue") or _on(c, "quantize_training"),
        in_stock_order(
            "progressive layer drop, eigenvalue and quantized training call into the stock backward pass",
            "plans need them switched off",
        ),
    ),
    (
        lambda c: _on(c, "hybrid_engine") or _on(c, "autotuning"),
        in_stock_order(
            "the hybrid engine and the autotuner run the engine in ways that plans do not know",
            "plans need them switched off",
        ),
    ),
    (
        lambda c: _on(c, "sparse_gradients"),
        in_stock_order(
            "sparse gradients have not been verified with a split backward", 'plans need "sparse_gradients": false'
        ),
    ),
)
"""What follows from DeepSpeed's configuration."""


def effective_config(host_config: Mapping[str, Any]) -> AdaptraConfig:
    """The `"adaptra"` block of DeepSpeed's configuration, or the one given to `activate`.

    Raises:
        ConfigError: one line per mistake.
    """
    return parse_config(host_config["adaptra"] if "adaptra" in host_config else _activation.default_block())


def reasons_of_config(config: Mapping[str, Any]) -> list[Reason]:
    """Why a DeepSpeed configuration has less than the full support."""
    return judge(RULES, config)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses a DeepSpeed configuration that cannot run with Adaptra.

    Raises:
        UnsupportedError: one line per reason, each with its remedy.
    """
    refuse_what_must_be(reasons_of_config(config), OTHERWISE)


def check_model(model: Any, pipeline_module: type) -> None:
    """Refuses a model that Adaptra cannot schedule.

    Raises:
        UnsupportedError: not a `PipelineModule`.
    """
    if not isinstance(model, pipeline_module):
        name = type(model).__name__
        _refuse([(f"the model is a {name}: there is no pipeline to schedule", "build it as a PipelineModule")])


def with_bool_mask(received: tuple[Any, ...], training: bool) -> tuple[Any, ...]:
    """What a stage receives with `has_attention_mask` or `has_bool_tensors`: DeepSpeed turns the last tensor into bool.

    Raises:
        UnsupportedError: in training, the last tensor is of a floating-point type. DeepSpeed sends no gradient for it, but
            the stage before waits for one.
    """
    *others, mask = received
    if training and mask.is_floating_point():
        reason = f"the attention mask that the stage before returns is {mask.dtype}, and nobody sends a gradient for it"
        _refuse([(reason, "return it as bool, or call engine.set_has_attention_mask(False)")])
    return (*others, mask.bool())
