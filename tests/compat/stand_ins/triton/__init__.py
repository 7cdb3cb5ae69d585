"""Stands in for Triton, which newer versions of Megatron-core import for kernels that nothing here runs."""

import sys
from types import ModuleType
from typing import Any

__version__ = "3.0.0"


class _Anything:
    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # as a decorator, with or without arguments, it hands back what it decorates
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _Anything()

    def __getitem__(self, key: Any) -> Any:
        return _Anything()


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


for _name in ("language", "language.extra", "runtime", "tools"):
    sys.modules[f"{__name__}.{_name}"] = _Module(f"{__name__}.{_name}")
language = sys.modules[f"{__name__}.language"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything()
