"""What the user has asked for, and the sessions that run: the state behind `activate`, `deactivate` and `status`.

It is imported at the end of `import torch`, and imports nothing slow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from adaptra_plugin.errors import ConfigError

CONFIGURATION = "ADAPTRA_CONFIG"
"""Variable with the path of a configuration, for hosts that have none of their own."""


class Running(Protocol):
    """A session, as seen from here."""

    def close(self) -> None: ...

    def status(self) -> dict[str, Any]: ...


def _at_start() -> tuple[str, Path] | None:
    given = os.environ.get(CONFIGURATION)
    try:
        return (given, Path(given).absolute()) if given else None
    except OSError:  # there is no working directory
        return None


_given = _at_start()
_default_block: dict[str, Any] | None = None
_asked = False  # `activate` has been called
_sessions: list[Running] = []


def ask(block: dict[str, Any] | None) -> None:
    """Notes that `activate` was called. `block`: what it was given; None keeps an earlier one."""
    global _default_block, _asked
    _asked = True
    if block is not None:
        _default_block = block


def end() -> None:
    """Ends all sessions, and forgets what was asked for."""
    global _default_block, _asked
    while _sessions:
        _sessions[-1].close()
    _default_block, _asked = None, False


def asked() -> bool:
    """Whether somebody wants the plug-in in so many words, and not only has it installed."""
    return _asked or bool(os.environ.get(CONFIGURATION))


def configuration() -> Path | None:
    """The file that `ADAPTRA_CONFIG` names. A relative path begins where the process began, whatever the working directory is
    now; one that the script has set, where the process is."""
    given = os.environ.get(CONFIGURATION)
    if not given:
        return None
    return _given[1] if _given is not None and given == _given[0] else Path(given)


def default_block() -> dict[str, Any] | None:
    """The block given to `activate`, or the one in the file that `ADAPTRA_CONFIG` names, if any.

    Raises:
        ConfigError: the file cannot be read, or holds no object.
    """
    if _default_block is not None:
        return _default_block
    path = configuration()
    return read_block(path) if path is not None else None


def add_session(session: Running) -> None:
    _sessions.append(session)


def remove_session(session: Running) -> None:
    if session in _sessions:
        _sessions.remove(session)


def sessions() -> list[dict[str, Any]]:
    """The status of each session that runs."""
    return [session.status() for session in _sessions]


def read_block(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's block, with or without the key `"adaptra"` around it.

    Raises:
        ConfigError: the file cannot be read, or holds no object.
    """
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
