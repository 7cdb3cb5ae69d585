"""Python and the packages around the plug-in: which versions are here, and which are supported."""

from __future__ import annotations

import re
from collections.abc import Iterator

from adaptra_plugin.doctor.machine import Machine
from adaptra_plugin.doctor.needs import Needs
from adaptra_plugin.doctor.rows import Row, Status
from adaptra_plugin.patches.hosts import HOSTS

OLDEST_PYTHON = (3, 10)
WITHOUT = {
    "numba": ("plans are made uncompiled, and later", "fast"),
    "ortools": ("plans are not refined while they run (adaptra.refine_s)", "exact"),
    "matplotlib": ("there are no pictures of plans", "plots"),
}
"""What is optional: how the plug-in does without, and the extra that brings it."""
LIBRARIES = ("torch", "xxhash", "psutil", "wandb", *WITHOUT)
REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^]]*\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?$")
NVIDIA_APEX = ("optimizers", "normalization", "multi_tensor_apply")
"""Folders of NVIDIA's Apex; the product of that name on PyPI has none of them."""


def python(machine: Machine, needs: Needs) -> Iterator[Row]:
    """The version, and the one that the tests run with."""
    found = ".".join(str(part) for part in machine.python)
    if machine.python[:2] < OLDEST_PYTHON:
        yield Row("python", Status.FAIL, f"{found}; 3.10 is the oldest supported", "use Python 3.11")
    else:
        yield Row("python", Status.OKAY, f"{found} (3.10 and later are supported, 3.11 is tested)")


def packages(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Hosts and libraries against the ranges of the plug-in's own metadata."""
    adapters = {host.distribution: (host.versions, False) for host in HOSTS.values()}
    ranges = {**adapters, **_ranges(machine.requirements())}
    versions = {name: machine.version(name) for name in (*adapters, *LIBRARIES)}
    hosts = {name for name in adapters if _inside(versions[name], ranges[name][0])}
    # one host that works is enough, unless the configuration says which one the job needs
    needed = set(adapters) if not hosts else {needs.host} & set(adapters)
    for name in versions:
        supported, required = ranges.get(name, ("", False))
        yield _package(name, versions[name], supported, required or name in needed, needs)


def _package(name: str, version: str | None, supported: str, needed: bool, needs: Needs) -> Row:
    install = f"pip install '{name}{supported}'"
    if version is None:
        if needed:
            why = (
                "there is nothing to plug into"
                if name in {host.distribution for host in HOSTS.values()}
                else "the plug-in needs it"
            )
            return Row(name, Status.FAIL, f"not installed: {why}", install)
        if name == "wandb" and needs.config.report.wandb == "on":
            found = 'not installed, but adaptra.report.wandb is "on": nothing will be sent'
            return Row(name, Status.WARN, found, f"{install}, or set adaptra.report.wandb to auto")
        if name in WITHOUT:
            how, extra = WITHOUT[name]
            return Row(name, Status.OKAY, f"not installed: {how}; pip install 'adaptra-plugin[{extra}]'")
        return Row(name, Status.OKAY, "not installed, not needed")
    words = f"{version}, supported: {supported or 'any'}"
    if not _inside(version, supported):
        status = Status.FAIL if needed else Status.WARN
        return Row(name, status, f"{words}: outside of the range", install)
    return Row(name, Status.OKAY, words)


def apex(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Never needed. A mistake that costs hours: the package of that name on PyPI has nothing to do with NVIDIA's."""
    folder, version = machine.locate("apex"), machine.version("apex")
    if folder is None and version is None:
        yield Row("apex", Status.OKAY, "not installed, not needed (PyPI's apex is another product, not NVIDIA's)")
    elif folder is not None and any((folder / name).is_dir() for name in NVIDIA_APEX):
        yield Row("apex", Status.OKAY, f"NVIDIA's Apex {version or ''} is installed; not needed".replace("  ", " "))
    else:
        found = f"{version or 'a package'} of the name apex is installed, which is not NVIDIA's: PyPI's apex is another product"
        advice = "`pip uninstall apex`; if the training script needs NVIDIA's, build it from github.com/NVIDIA/apex"
        yield Row("apex", Status.WARN, found, advice)


def _ranges(requirements: list[str]) -> dict[str, tuple[str, bool]]:
    """Range and whether it is always required, by name. The extra `dev` pins what the tests run with: no range."""
    found: dict[str, tuple[str, bool]] = {}
    for line in requirements:
        match = REQUIREMENT.match(line)
        if match is None:
            continue
        name, supported, marker = (
            match[1].lower(),
            ",".join(sorted(match[2].replace(" ", "").split(","), reverse=True)),
            match[3] or "",
        )
        if "extra" in marker and re.search(r"""["']dev["']""", marker):
            continue
        if name not in found or not found[name][1]:
            found[name] = (supported, "extra" not in marker)
    return found


def _inside(version: str | None, supported: str) -> bool:
    """Development builds count as the release that they lead to, as where the hosts are patched."""
    from packaging.specifiers import SpecifierSet

    return version is not None and SpecifierSet(supported, prereleases=True).contains(version)
