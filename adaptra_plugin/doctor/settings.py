"""Reads configuration files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from adaptra_plugin.errors import ConfigError


def load_settings(path: str) -> Mapping[str, Any]:
    """JSON, YAML by the end of the name, or Hjson (comments) where DeepSpeed has brought its reader. Raises OSError, ConfigError."""
    kind = "YAML" if path.endswith((".yaml", ".yml")) else "JSON"
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = _yaml(text) if kind == "YAML" else _json(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it cannot be read as {kind}: {error or type(error).__name__}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"it holds a {type(found).__name__}: expected an object with settings")
    return found


def _yaml(text: str) -> Any:
    """Raises ValueError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _json(text: str) -> Any:
    """Raises ValueError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        try:
            import hjson
        except ImportError:
            raise error from None
        return hjson.loads(text, object_pairs_hook=dict)
