"""Activation without a change to the user's script.

torch calls `register` (entry point group `torch.backends`) at the end of `import torch`. It installs a hook that opens
a host's gate once the import of that host has finished, and does nothing else. It never raises: a plug-in must not break `import torch`.
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

from adaptra_plugin import _activation
from adaptra_plugin.patches.hosts import HOSTS

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
    """Opens the gates of the hosts that are, and of each other one when it is, fully imported."""
    for host in HOSTS.values():
        if not _hook(host.entry):
            _ready(host.entry)


def _hook(entry: str) -> bool:
    """Has a host's gate opened when the module `entry` is fully imported; False if it is already."""
    module = sys.modules.get(entry)
    if module is None:
        _wait_for(entry)
    elif _initializing(module):
        # `import deepspeed` itself imports torch: its own import is under way, and cannot be hooked any more
        module.__class__ = _Unfinished
    else:
        return False
    return True


def uninstall() -> None:
    """Removes the hooks, and closes the gates that are open."""
    for host in HOSTS.values():
        _done_with(host.entry)
        if (gate := host.loaded_gate()) is not None:
            gate.close()


def _wait_for(entry: str) -> None:
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.entries.add(entry)


def _done_with(entry: str) -> None:
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _Finder)]:
        finder.entries.discard(entry)
        if not finder.entries:
            sys.meta_path.remove(finder)
    module = sys.modules.get(entry)
    if isinstance(module, _Unfinished):
        module.__class__ = ModuleType  # type: ignore[assignment]


def _initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _ready(entry: str) -> None:
    _done_with(entry)
    try:
        for host in HOSTS.values():
            if host.entry == entry and (_activation.asked() or not host.on_request):
                host.load_gate().install()
    except Exception:
        if _activation.asked():
            raise  # by `activate`, or with a configuration in the environment: to train without it would be no answer
        logger.exception("adaptra: not activated")


class _Unfinished(ModuleType):
    """Class of the host's module from the import of torch until the first attribute is read after its own import."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__"):
            spec = ModuleType.__getattribute__(self, "__spec__")
            if not getattr(spec, "_initializing", False):
                self.__class__ = ModuleType  # type: ignore[assignment]
                _ready(spec.name)
        return ModuleType.__getattribute__(self, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds hosts with the other finders, and runs `_ready` after a host's module has been executed.

    It stays until then: libraries look whether the host is installed (`importlib.util.find_spec`) without importing it.
    """

    def __init__(self) -> None:
        self.entries: set[str] = set()
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.entries or getattr(self._asking, "others", False):
            return None
        self._asking.others = True  # the look-up below asks every finder, this one too
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, fullname)
        return spec


class _Loader(importlib.abc.Loader):
    """The host's loader, plus `_ready` at the end."""

    def __init__(self, inner: Any, entry: str) -> None:
        self._inner = inner
        self._entry = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # who has only looked the host up may ask for its path or its source

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        _ready(self._entry)
