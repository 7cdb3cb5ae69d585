"""Names of other modules: which are bound to a given object, and binding them to something else for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def names_bound_to(*values: Any) -> Iterator[tuple[ModuleType, str, Any]]:
    """Module, name and value of every global that is one of `values` itself, outside of Adaptra."""
    wanted = {id(value) for value in values}
    for module in list(sys.modules.values()):
        # `vars` and not `getattr`: reading an attribute of a lazy module would import it
        if not isinstance(module, ModuleType) or (module.__name__ or "").startswith("adaptra_plugin"):
            continue
        # a host brings thousands of modules with a hundred thousand names: nearly all are passed by without a loop in Python
        if wanted.isdisjoint(map(id, list(vars(module).values()))):
            continue
        for name, bound in list(vars(module).items()):
            if id(bound) in wanted:
                yield module, name, bound


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute of a module or class is `value`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
