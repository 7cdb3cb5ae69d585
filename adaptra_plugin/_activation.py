"""State behind `activate`, `deactivate` and `status`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptra_plugin import _autoload
from adaptra_plugin.config import parse_config
from adaptra_plugin.errors import ConfigError

if TYPE_CHECKING:
    from adaptra_plugin.runtime.session import Session

_default_block: dict[str, Any] | None = None
_sessions: list[Session] = []


def activate(config: str | Path | Mapping[str, Any] | None = None) -> None:
    global _default_block
    if config is not None:
        block = _read_block(config)
        parse_config(block)
        _default_block = block
    if "deepspeed" in sys.modules and not _autoload._initializing(sys.modules["deepspeed"]):
        open_gate()
    else:
        _autoload.install()


def deactivate() -> None:
    global _default_block
    _autoload.uninstall()
    while _sessions:
        _sessions[-1].close()
    gate = sys.modules.get("adaptra_plugin.patches.deepspeed_gate")
    if gate is not None:
        gate.close()
    registry = sys.modules.get("adaptra_plugin.patches.registry")
    if registry is not None:
        registry.PATCHES.restore()
    _default_block = None


def status() -> dict[str, Any]:
    registry = sys.modules.get("adaptra_plugin.patches.registry")
    patches = registry.PATCHES.describe() if registry is not None else []
    return {
        "active": bool(_sessions),
        "patches": patches,
        "sessions": [session.status() for session in _sessions],
    }


def open_gate() -> None:
    """Wraps the host's entry point (see `adaptra_plugin.patches.deepspeed_gate`). A hook that waits for the host is done."""
    _autoload.uninstall()
    from adaptra_plugin.patches import deepspeed_gate

    deepspeed_gate.install()


def default_block() -> dict[str, Any] | None:
    """The block given to `activate`, if any."""
    return _default_block


def add_session(session: Session) -> None:
    _sessions.append(session)


def remove_session(session: Session) -> None:
    if session in _sessions:
        _sessions.remove(session)


def _read_block(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, Mapping):
        data: Any = dict(config)
    else:
        path = Path(config)
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("adaptra"), dict):
        data = data["adaptra"]
    if not isinstance(data, dict):
        raise ConfigError(f"the configuration is {data!r}: it must be an object")
    return data
