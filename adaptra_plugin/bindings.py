"""Names of other modules that are bound to a given object."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def names_bound_to(value: Any) -> Iterator[tuple[ModuleType, str]]:
    """Module and name of every global that is `value` itself, outside of Adaptra."""
    for module in list(sys.modules.values()):
        # `vars` and not `getattr`: reading an attribute of a lazy module would import it
        if not isinstance(module, ModuleType) or (module.__name__ or "").startswith("adaptra_plugin"):
            continue
        for name, bound in list(vars(module).items()):
            if bound is value:
                yield module, name
