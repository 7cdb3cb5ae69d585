"""The "adaptra" block of a DeepSpeed job, and what DeepSpeed jobs Adaptra refuses, each with a reason and a remedy. Checked before
and after the engine is built."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from adaptra_plugin import _activation
from adaptra_plugin.config import AdaptraConfig, parse_config
from adaptra_plugin.errors import refuse

_refuse = functools.partial(refuse, otherwise='or set "adaptra": {"enabled": false}')
Check = tuple[Callable[[Mapping[str, Any]], bool], str, str]


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


def _fp16(config: Mapping[str, Any]) -> bool:
    return _on(config, "fp16") or _on(config, "amp")


def _zero_stage(config: Mapping[str, Any]) -> int:
    stage = _section(config, "zero_optimization").get("stage", 0)
    return stage if isinstance(stage, int) else 0


def _offloads(config: Mapping[str, Any]) -> bool:
    zero = _section(config, "zero_optimization")
    device = _section(zero, "offload_optimizer").get("device", "none")
    # DeepSpeed has an enumeration of the devices, too; `cpu_offload` is the old spelling
    return str(getattr(device, "value", device)).lower() != "none" or bool(
        zero.get("cpu_offload") or zero.get("zenflow")
    )


ONE_BIT = ("onebitadam", "zerooneadam", "onebitlamb")
ONE_BIT_REASON = "1-bit optimizers compress gradients inside their own step and replace the engine's gradient reduction"
ONE_BIT_REMEDY = 'use "Adam", "AdamW" or "Lamb"'

REFUSED: tuple[Check, ...] = (
    (
        lambda c: _optimizer(c) in ONE_BIT,
        ONE_BIT_REASON,
        ONE_BIT_REMEDY,
    ),
    (
        lambda c: (
            _on(c, "activation_checkpointing", "partition_activations")
            or _on(c, "activation_checkpointing", "cpu_checkpointing")
        ),
        "partitioned or offloaded activation checkpoints keep one buffer that assumes the stock order of microbatches",
        'set "activation_checkpointing": {"partition_activations": false, "cpu_checkpointing": false}',
    ),
    (
        lambda c: _on(c, "compile") or _on(c, "compile", "deepcompile"),
        "torch.compile traces the linear layers whole, so their backward cannot be split",
        'remove the "compile" block',
    ),
    (_fp16, "fp16 loss scaling has not been verified with a split backward", 'use "bf16": {"enabled": true} or fp32'),
    (
        lambda c: _zero_stage(c) > 1,
        "ZeRO-2 and ZeRO-3 do not work with pipeline parallelism (DeepSpeed refuses them too)",
        'set "zero_optimization": {"stage": 1}',
    ),
    (
        _offloads,
        "offloaded or asynchronous optimizer states copy gradients on hooks that assume an unsplit backward",
        'remove "offload_optimizer" and "zenflow" from "zero_optimization"',
    ),
    (
        lambda c: _on(c, "progressive_layer_drop") or _on(c, "eigenvalue") or _on(c, "quantize_training"),
        "progressive layer drop, eigenvalue and quantized training call into the stock backward pass",
        "switch them off",
    ),
    (
        lambda c: _on(c, "hybrid_engine") or _on(c, "autotuning"),
        "the hybrid engine and the autotuner run the engine in ways the schedule does not know",
        "switch them off for this job",
    ),
    (
        lambda c: _on(c, "sparse_gradients"),
        "sparse gradients have not been verified with a split backward",
        'set "sparse_gradients": false',
    ),
)
"""(predicate on DeepSpeed's configuration, reason, remedy)."""


def effective_config(host_config: Mapping[str, Any]) -> AdaptraConfig:
    """The `"adaptra"` block of DeepSpeed's configuration, or the one given to `activate`.

    Raises:
        ConfigError: one line per mistake.
    """
    return parse_config(host_config["adaptra"] if "adaptra" in host_config else _activation.default_block())


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses a DeepSpeed configuration that cannot run with Adaptra.

    Raises:
        UnsupportedError: one line per reason, each with its remedy.
    """
    _refuse([(reason, remedy) for predicate, reason, remedy in REFUSED if predicate(config)])


def check_model(model: Any, pipeline_module: type, dual_pipe_module: type | None) -> None:
    """Refuses a model that Adaptra cannot schedule.

    Raises:
        UnsupportedError: not a `PipelineModule`, or DualPipeV.
    """
    if dual_pipe_module is not None and isinstance(model, dual_pipe_module):
        _refuse([("DualPipeV brings a schedule of its own", "build the model as a PipelineModule")])
    if not isinstance(model, pipeline_module):
        name = type(model).__name__
        _refuse([(f"the model is a {name}: there is no pipeline to schedule", "build it as a PipelineModule")])


def check_engine(engine: Any) -> None:
    """Refuses an engine whose features show only once it is built.

    Raises:
        UnsupportedError: tensor parallelism, a compiled module, or an optimizer object of a 1-bit class.
    """
    found = []
    if engine.is_model_parallel:
        found.append(
            (
                f"tensor (slice) parallelism of {engine.grid.model_parallel_size} is not verified with DeepSpeed pipelines",
                "use a topology of pipeline and data parallelism only",
            )
        )
    if getattr(engine, "is_compiled", False):
        found.append(("the module is compiled", "do not call engine.compile()"))
    optimizers = [getattr(engine, name, None) for name in ("client_optimizer", "basic_optimizer")]
    # by name: importing the classes would need their compression backends
    bases = {base.__name__.lower() for optimizer in optimizers for base in type(optimizer).__mro__}
    if bases & set(ONE_BIT):
        found.append((ONE_BIT_REASON, ONE_BIT_REMEDY))
    _refuse(found)


def immediate_grad_update(config: Any) -> bool:
    """Whether BF16_Optimizer takes over gradients in hooks on the parameters (`bf16.immediate_grad_update`).

    Older versions of DeepSpeed (0.16, 0.17) keep the switch beside the bf16 section of their configuration object, later ones in it.
    """
    flat = getattr(config, "bfloat16_immediate_grad_update", None)
    return bool(config.bfloat16_config.immediate_grad_update if flat is None else flat)


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
