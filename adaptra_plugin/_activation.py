"""State behind `activate`, `deactivate` and `status`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptra_plugin import _autoload
from adaptra_plugin.config import parse_config
from adaptra_plugin.errors import ConfigError

if TYPE_CHECKING:
    from adaptra_plugin.runtime.session import Session

GATES = {
    _autoload.DEEPSPEED: "adaptra_plugin.patches.deepspeed_gate",
    _autoload.MEGATRON: "adaptra_plugin.patches.megatron_gate",
}

_default_block: dict[str, Any] | None = None
_asked = False  # `activate` has been called
_sessions: list[Session] = []


def activate(config: str | Path | Mapping[str, Any] | None = None) -> None:
    global _default_block, _asked
    if config is not None:
        block = _read_block(config)
        parse_config(block)
        _default_block = block
    _asked = True
    for host in _autoload.HOSTS:
        if not _autoload.hook(host):
            open_gate(host)


def deactivate() -> None:
    global _default_block, _asked
    _autoload.uninstall()
    while _sessions:
        _sessions[-1].close()
    for name in GATES.values():
        gate = sys.modules.get(name)
        if gate is not None:
            gate.close()
    registry = sys.modules.get("adaptra_plugin.patches.registry")
    if registry is not None:
        registry.PATCHES.restore()
    _default_block, _asked = None, False


def status() -> dict[str, Any]:
    registry = sys.modules.get("adaptra_plugin.patches.registry")
    patches = registry.PATCHES.describe() if registry is not None else []
    return {
        "active": bool(_sessions),
        "patches": patches,
        "sessions": [session.status() for session in _sessions],
    }


def open_gate(host: str) -> None:
    """Wraps the entry points of a host that is imported (see the modules in `GATES`).

    DeepSpeed has a configuration of its own, in which the block may or may not be. Megatron has none: its gate opens if
    `activate` was called, or `ADAPTRA_CONFIG` names a file.
    """
    if host == _autoload.MEGATRON and not asked():
        return
    importlib.import_module(GATES[host]).install()


def asked() -> bool:
    """Whether somebody wants the plug-in in so many words, and not only has it installed."""
    return _asked or bool(os.environ.get(_autoload.CONFIGURATION))


def default_block() -> dict[str, Any] | None:
    """The block given to `activate`, or the one in the file that `ADAPTRA_CONFIG` names, if any.

    Raises:
        ConfigError: the file cannot be read, or holds no object.
    """
    if _default_block is not None:
        return _default_block
    path = _autoload.configuration()
    return _read_block(path) if path is not None else None


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
