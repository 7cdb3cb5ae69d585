"""Patches are declared, applied with a reason, listed, and all restored."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

from adaptra_plugin.bindings import names_bound_to
from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.host import installed_version


@dataclass(frozen=True)
class Patch:
    """One name of a host that is replaced.

    Attributes:
        id: for people, `deepspeed.engine`.
        target: `module:attribute`.
        host: distribution whose version counts.
        module: of the host, whose `__version__` counts where it has one: a checkout on the path is no distribution.
        versions: accepted versions, a PEP 440 specifier.
        reason: why it is patched.
        replace: builds the replacement from the original.
        sweep: also rebind names in other modules that are bound to the same object (`from host import name`).
    """

    id: str
    target: str
    host: str
    versions: str
    reason: str
    replace: Callable[[Any], Any]
    sweep: bool = False
    module: str | None = None


@dataclass
class _Applied:
    patch: Patch
    original: Any
    replacement: Any
    own_names: set[tuple[str, str]]  # (module, name) that were bound to the replacement before: not ours to restore


class PatchSet:
    """The patches that are applied. `apply` twice is once; `restore` puts back every name, in reverse order."""

    def __init__(self) -> None:
        self._applied: dict[str, _Applied] = {}
        self._skipped: dict[str, tuple[Patch, str]] = {}
        self._per_call: dict[str, Patch] = {}

    def apply(self, patch: Patch) -> None:
        """Replaces the target, once.

        Raises:
            UnsupportedError: the host's version is outside of `patch.versions`, or the target is missing.
        """
        if patch.id in self._applied:
            return
        try:
            self._check_version(patch)
            module, name, original = _resolve(patch)
        except UnsupportedError as error:
            self._skipped[patch.id] = (patch, str(error))
            raise
        if patch.id in self._applied:
            return  # importing the target, or reading it, has run a hook that applied the very same patch
        replacement = patch.replace(original)
        bound = list(names_bound_to(original, replacement))  # in one go: it looks at all that has been imported
        own_names = {(owner.__name__, key) for owner, key, value in bound if value is replacement}
        setattr(module, name, replacement)
        if patch.sweep:
            for owner, key, value in bound:
                if value is original:
                    setattr(owner, key, replacement)
        self._applied[patch.id] = _Applied(patch, original, replacement, own_names)
        self._skipped.pop(patch.id, None)

    @contextmanager
    def during(self, patch: Patch) -> Iterator[None]:
        """Applies a patch for the time of a `with` block; inside another block of the same patch it changes nothing.

        Raises:
            UnsupportedError: see `apply`.
        """
        if patch.id in self._applied:
            yield
            return
        self.apply(patch)
        self._per_call[patch.id] = patch
        try:
            yield
        finally:
            self.restore(patch.id)

    def restore(self, patch_id: str | None = None, *, why: str | None = None) -> None:
        """Puts back the originals of one patch, or of all. `why`: for `describe`, which lists a single patch as skipped."""
        keys = [key for key in ([patch_id] if patch_id else reversed(self._applied)) if key in self._applied]
        taken = {key: self._applied.pop(key) for key in keys}
        bound = list(names_bound_to(*(applied.replacement for applied in taken.values()))) if taken else []
        for key, applied in taken.items():
            module, name, current = _resolve(applied.patch)
            if current is applied.replacement:
                setattr(module, name, applied.original)
            for at, (owner, bound_as, value) in enumerate(bound):
                if value is applied.replacement and (owner.__name__, bound_as) not in applied.own_names:
                    setattr(owner, bound_as, applied.original)
                    bound[at] = owner, bound_as, applied.original  # which an earlier patch may have put there
            if why is not None:
                self._skipped[key] = (applied.patch, why)
        if patch_id is None:
            self._skipped.clear()
            self._per_call.clear()

    def is_applied(self, patch_id: str) -> bool:
        return patch_id in self._applied

    def describe(self) -> list[dict[str, str]]:
        """One entry per patch: id, target, state (applied, per call: bound while `during` lasts, skipped) and reason."""
        rows = [
            {"id": a.patch.id, "target": a.patch.target, "state": "applied", "reason": a.patch.reason}
            for a in self._applied.values()
        ]
        rows += [
            {"id": patch.id, "target": patch.target, "state": "per call", "reason": patch.reason}
            for patch in self._per_call.values()
            if patch.id not in self._applied
        ]
        rows += [
            {"id": patch.id, "target": patch.target, "state": "skipped", "reason": why}
            for patch, why in self._skipped.values()
        ]
        return rows

    @staticmethod
    def _check_version(patch: Patch) -> None:
        version = installed_version(patch.host, patch.module)
        if version is None:
            raise UnsupportedError(f"{patch.id}: {patch.host} is not installed; install {patch.host}{patch.versions}")
        if not SpecifierSet(patch.versions, prereleases=True).contains(version):
            raise UnsupportedError(
                f"{patch.id}: {patch.host} {version} is installed, {patch.versions} is supported; "
                f"install a supported version or set adaptra.enabled to false"
            )


def _resolve(patch: Patch) -> tuple[ModuleType, str, Any]:
    module_name, name = patch.target.split(":")
    try:
        module = importlib.import_module(module_name)
        return module, name, getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"{patch.id}: {patch.target} does not exist in this {patch.host} ({error}); expected a version {patch.versions}"
        ) from None


PATCHES = PatchSet()
"""The patches of this process."""
