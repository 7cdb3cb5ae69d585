"""Megatron's settings before anything is launched: arguments of `pretrain_gpt.py`, or fields of a `TransformerConfig`.

Both are told apart by nothing but their names; where Megatron calls the same thing otherwise, the field's name counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from adaptra_plugin.errors import ConfigError
from adaptra_plugin.host import Spread

FIELDS = {
    "num_experts": "num_moe_experts",
    "fp8_format": "fp8",
    "fp4_format": "fp4",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
}
"""Arguments whose fields are called otherwise."""
QUANTISED = (
    (("kitchen_config_file", "kitchen_recipe_number"), "use_kitchen"),
    (("te_precision_config_file",), "quant_recipe"),
)
"""Arguments that name a recipe, and the field that it becomes."""
COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
"""With each, one layer more is laid out."""
DEFAULTS = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
"""Of both, where a default decides."""
STAGES = "pipeline_model_parallel_size"
CHUNKS = "virtual_pipeline_model_parallel_size"
LAYOUT = "pipeline_model_parallel_layout"
PER_CHUNK = "num_layers_per_virtual_pipeline_stage"


def read(words: Sequence[str]) -> dict[str, Any]:
    """Settings from `--name value ...`; a name without a value is True. `-` in a name is `_`.

    Raises:
        ConfigError: something stands where a name is expected.
    """
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if re.fullmatch(r"--[A-Za-z][\w-]*(=.*)?", word, re.DOTALL):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = _value(value) if equals else True
        elif not name:
            raise ConfigError(
                f"{word!r} is no argument of Megatron's: expected --name, after the files if there are any"
            )
        else:
            before, value = found[name], _value(word)
            found[name] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
    return found


def _value(word: str) -> Any:
    if word in ("None", "none", "null"):
        return None
    try:
        return json.loads(word.lower() if word in ("True", "False") else word)
    except ValueError:
        return word


def fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `TransformerConfig` that the settings make, as far as they are judged."""
    found = {**DEFAULTS, **{FIELDS.get(name, name): value for name, value in settings.items()}}
    for files, field in QUANTISED:
        if any(settings.get(name) is not None for name in files):
            found[field] = True
    offloaded = found.get("cpu_offloading_num_layers")
    if isinstance(offloaded, int) and offloaded > 0:
        found["cpu_offloading"] = True
    return found


def spread(settings: Mapping[str, Any]) -> Spread:
    """Raises ConfigError: a size is none, or stages cannot be laid out like that."""
    stages, tensor = _size(settings, STAGES, 1), _size(settings, "tensor_model_parallel_size", 1)
    return Spread(stages, chunks(settings), tensor, _size(settings, "num_microbatches", None))


def chunks(settings: Mapping[str, Any]) -> int:
    """Model chunks of a rank.

    Raises:
        ConfigError: the layers or the layout do not make whole chunks.
    """
    stages = _size(settings, STAGES, 1) or 1
    found = fields(settings)
    if (given := _size(found, CHUNKS, None)) is not None:
        return given
    layout = settings.get(LAYOUT)
    if layout:
        parts = _parts(layout)
        return _whole(parts, stages, f"{LAYOUT} has {parts} parts")
    each = _size(settings, PER_CHUNK, None)
    if each is None:
        return 1
    layers = _size(settings, "decoder_num_layers", _size(settings, "num_layers", None))
    if layers is None:
        raise ConfigError(f"{PER_CHUNK} is {each}: num_layers is needed with it")
    layers += sum(bool(settings.get(name)) for name in COUNTED)
    return _whole(layers, stages * each, f"num_layers is {layers}, with {PER_CHUNK} {each}")


def _whole(number: int, parts: int, what: str) -> int:
    if number % parts:
        raise ConfigError(f"{what}: expected a multiple of {parts}")
    return number // parts


def _parts(layout: Any) -> int:
    """Stages of a layout: a list of lists, or text as in `Et*3|(tt|)*2L`."""
    if isinstance(layout, list | tuple):
        return len(layout)
    text = str(layout).replace(",", "")
    while (repeated := re.sub(r"\(([^()]*)\)\*(\d+)", lambda m: m[1] * int(m[2]), text)) != text:
        text = repeated
    return text.count("|") + 1


def _size(settings: Mapping[str, Any], name: str, default: int | None) -> int | None:
    value = settings.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}: expected a whole number of at least 1")
    return value
