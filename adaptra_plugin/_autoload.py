"""Activation without a change to the user's script.

torch calls `register` (entry point group `torch.backends`) at the end of `import torch`. It installs a hook that opens
the gate once `import deepspeed` has finished, and does nothing else. It never raises: a plug-in must not break `import torch`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

HOST = "deepspeed"
logger = logging.getLogger("adaptra")


def register() -> None:
    """Entry point. `ADAPTRA_AUTOLOAD=0` turns it off."""
    if os.environ.get("ADAPTRA_AUTOLOAD", "1") == "0":
        return
    try:
        install()
    except Exception:
        logger.exception("adaptra: automatic activation failed; call adaptra_plugin.activate() yourself")


def install() -> None:
    """Opens the gate when DeepSpeed is, or will be, fully imported."""
    module = sys.modules.get(HOST)
    if module is None:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    elif _initializing(module):
        # `import deepspeed` itself imports torch: its own import is under way, and cannot be hooked any more
        module.__class__ = _Unfinished
    else:
        _ready()


def uninstall() -> None:
    """Removes the hook, if there is one."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    module = sys.modules.get(HOST)
    if isinstance(module, _Unfinished):
        module.__class__ = ModuleType  # type: ignore[assignment]


def _initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _ready() -> None:
    from adaptra_plugin import _activation

    try:
        _activation.open_gate()
    except Exception:
        logger.exception("adaptra: not activated")


class _Unfinished(ModuleType):
    """Class of the host's module from the import of torch until the first attribute is read after its own import."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__"):
            spec = ModuleType.__getattribute__(self, "__spec__")
            if not getattr(spec, "_initializing", False):
                self.__class__ = ModuleType  # type: ignore[assignment]
                _ready()
        return ModuleType.__getattribute__(self, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the host with the other finders, and runs `_ready` after its module has been executed.

    It stays until then: libraries look whether the host is installed (`importlib.util.find_spec`) without importing it.
    """

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != HOST or getattr(self._asking, "others", False):
            return None
        self._asking.others = True  # the look-up below asks every finder, this one too
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The host's loader, plus `_ready` at the end."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # who has only looked the host up may ask for its path or its source

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        uninstall()
        _ready()
