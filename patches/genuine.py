"""Whether a host's function is the one that the host defines, or somebody else's in its place."""

from __future__ import annotations

from types import FunctionType
from typing import Any

DECORATORS = {"torch", "contextlib", "functools"}
"""Packages whose wrappers around a host's function change nothing that matters here; the host's own are as good."""


def is_genuine(function: Any, module: str) -> bool:
    """True for a function, a method or a static method that `module` itself defines."""
    function = getattr(function, "__func__", function)
    trusted = {module.split(".")[0], *DECORATORS}
    while isinstance(function, FunctionType):
        home = str(function.__globals__.get("__name__", ""))
        inner = vars(function).get("__wrapped__")
        if inner is None:
            return home == module
        if home.split(".")[0] not in trusted:
            return False
        function = getattr(inner, "__func__", inner)
    return False


def name_of(function: Any) -> str:
    """For messages: `module.name`."""
    home = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return f"{home}.{getattr(function, '__qualname__', type(function).__qualname__)}"
