"""What a framework brings, and the frameworks that are known. It is imported at the end of `import torch`: nothing slow here."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol, cast

from adaptra_plugin.errors import ConfigError
from adaptra_plugin.support import Reason


@dataclass(frozen=True)
class Spread:
    """How a configuration says that its job is spread; None: it does not say.

    Attributes:
        stages: ranks of a pipeline.
        chunks: model chunks (virtual stages) of a rank.
        tensor: ranks of a tensor group.
        microbatches: of an iteration.
    """

    stages: int | None = None
    chunks: int = 1
    tensor: int | None = None
    microbatches: int | None = None


class Gate(Protocol):
    """A module that replaces the names of a host at which Adaptra is entered, and puts them back."""

    def install(self) -> None:
        """Opens the gate, once. Raises ConfigError, UnsupportedError."""

    def close(self) -> None:
        """Puts the stock names back. Idempotent."""

    def is_open(self) -> bool:
        """Whether names are replaced now."""


class Host(Protocol):
    """A framework that Adaptra runs in. Subclasses lie in `patches/`, and may import neither torch nor the framework itself.

    The rest is up to the adapter that the gate leads to. It makes a `runtime.session.Session`, tells it how layers split, lets
    each action of an iteration run through the host's own computations, and says what a plan would go around.
    """

    name: str
    """The host's in `status()`, and that of the extra that installs it."""
    title: str
    """As people write it."""
    distribution: str
    versions: str
    """Supported ones, a PEP 440 specifier."""
    version_from: str | None = None
    """Module whose `__version__` counts, where it has one: a checkout on the path is no distribution."""
    entry: str
    """Module whose import opens the gate."""
    gate: str
    """Module that is a `Gate`."""
    on_request: bool = False
    """The gate opens only if somebody has asked: the host has no configuration in which the block could be absent."""
    packages: tuple[str, ...] = ()
    """Top-level packages whose hooks on parameters are known not to step."""
    collectives: str = ""
    """Pattern of the files that hold its collectives; empty: it calls torch's."""
    wandb_rank: int = 0
    """World rank with the host's W&B run; negative: from the end."""
    has_configuration: bool = False
    """The block lies in a configuration file of the host's own."""
    takes_arguments: bool = False
    """Its jobs are configured by arguments of their command line."""

    def judge(self, settings: Mapping[str, Any]) -> list[Reason]:
        """Why a configuration of the host's own has less than the full support, as far as it shows there."""
        return []

    def spread(self, settings: Mapping[str, Any]) -> Spread:
        """Raises ConfigError: it cannot be."""
        return Spread()

    def read_arguments(self, words: Sequence[str]) -> dict[str, Any]:
        """Settings from the arguments of a command line. Raises ConfigError."""
        raise ConfigError(f"{self.title} takes no arguments here: {' '.join(words)}")

    def version(self) -> str | None:
        """The installed version; None: it is not installed."""
        return installed_version(self.distribution, self.version_from)

    def load_gate(self) -> Gate:
        return cast(Gate, importlib.import_module(self.gate))

    def loaded_gate(self) -> Gate | None:
        """The gate, if it has been needed so far."""
        return cast("Gate | None", sys.modules.get(self.gate))

    def status(self) -> dict[str, Any]:
        """Name, installed version (None: not installed), supported versions, whether the gate is open."""
        gate = self.loaded_gate()
        return {
            "name": self.name,
            "version": self.version(),
            "supported": self.versions,
            "open": gate is not None and gate.is_open(),
        }


HOSTS: dict[str, Host] = {}
"""By name. `patches/hosts.py` fills it."""


def register(host: Host) -> None:
    HOSTS[host.name] = host


def installed_version(distribution: str, module: str | None = None) -> str | None:
    """The version that a module says it has, else that of a distribution; None: it is not installed."""
    said = getattr(sys.modules.get(module), "__version__", None) if module else None
    try:
        return str(said or metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


def known_packages() -> set[str]:
    """Top-level packages of all hosts, and of this one, whose hooks on parameters do not step."""
    return {"adaptra_plugin"}.union(*(host.packages for host in HOSTS.values()))


def holds_collectives(file: str) -> bool:
    """Whether a source file has collectives of a host in it."""
    return any(host.collectives and re.search(host.collectives, file) for host in HOSTS.values())
