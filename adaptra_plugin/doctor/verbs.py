"""pyverbs: whether it can be imported, from where, and whether it belongs to the system's rdma-core.

pyverbs is a part of rdma-core and is compiled against one release of it. PyPI has the sources of the newest release only,
which neither build nor run with an older rdma-core; Debian's package fits by construction and lies where virtual
environments do not look, but the transport does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from adaptra_plugin.doctor import rdma
from adaptra_plugin.doctor.machine import Machine
from adaptra_plugin.doctor.needs import Needs
from adaptra_plugin.doctor.rows import Row, Status
from adaptra_plugin.transport.proxy.rails.rdma.verbs_library import SYSTEM_PACKAGES

LIBRARY = re.compile(r"libibverbs\.so\.1\.\d+\.(\d+(?:\.\d+)*)$")
"""The file name ends in rdma-core's version: libibverbs.so.1.14.44.0 is of rdma-core 44.0."""
LIBRARY_FOLDERS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/local/lib64")

# In a process of its own: a library that does not fit may take the process with it.
PROBE = """
import json, os, sys
sys.path.extend(sys.argv[1:])
found = {}
try:
    import pyverbs
    import pyverbs.cq, pyverbs.device, pyverbs.mr, pyverbs.pd, pyverbs.qp, pyverbs.wr
    found["file"] = os.path.realpath(pyverbs.__file__)
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
else:
    try:
        found["devices"] = [device.name.decode() for device in pyverbs.device.get_device_list()]
    except Exception:  # without a device it raises an error
        found["devices"] = []
try:
    with open("/proc/self/maps") as maps:
        found["library"] = next((line.split()[-1] for line in maps if "/libibverbs.so" in line), None)
except OSError:
    pass
print(json.dumps(found))
"""


def pyverbs(machine: Machine, needs: Needs) -> Iterator[Row]:
    """One row. Without an RDMA device nothing is missing."""
    pip = machine.version("pyverbs")
    there = next((place for place in SYSTEM_PACKAGES if machine.path(f"{place}/pyverbs").is_dir()), None)
    found = _import(machine)
    # the distribution's is second to what pip has installed, even if that is broken
    if "error" in found and there and not pip:
        found = _import(machine, str(machine.path(there)))
    core = _version_in(found.get("library")) or rdma_core(machine)
    devices = {port.device for port in rdma.wanted(machine, needs)}
    wrong, advice = [], []
    if "error" in found:
        source = f"{pip} from PyPI " if pip else "the distribution's " if there else ""
        words = f"{source}cannot be imported: {found['error']}; "
        wrong.append("RDMA cannot be used" if devices else "not needed here")
        advice.append(_remedy(core, pip, there))
    else:
        version = _version(machine, str(found["file"]))
        words = f"{version or 'unknown version'} from {found['file']}, {len(found['devices'])} devices seen; "
        if version and core and _major(version) != _major(core):
            wrong.append("they do not fit each other")
            advice.append(f"they must be of one release: {_remedy(core, pip, there)}")
        lacking = devices - set(found["devices"])
        if lacking:
            wrong.append(f"it does not see {', '.join(sorted(lacking))}")
            advice.append(
                "install the driver library of the card (Debian: ibverbs-providers); see the device files, too"
            )
    words += f"rdma-core {core}" if core else "no rdma-core (libibverbs) found"
    if not devices or not wrong:
        yield Row("pyverbs", Status.OKAY, "; ".join([words, *wrong]))
    else:
        status = Status.FAIL if needs.insists_on_rdma else Status.WARN
        yield Row("pyverbs", status, "; ".join([words, *wrong]), "; ".join(advice))


def rdma_core(machine: Machine) -> str | None:
    """Version of the system's rdma-core by the name of its library; None: not installed."""
    for folder in LIBRARY_FOLDERS:
        for place in (folder, *(f"{folder}/{name}" for name in machine.names(folder) if name.endswith("-linux-gnu"))):
            for name in machine.names(place):
                version = _version_in(name)
                if version:
                    return version
    return None


def _import(machine: Machine, *places: str) -> dict[str, Any]:
    try:
        return machine.child(PROBE, *places)
    except RuntimeError as error:  # it took the process with it
        return {"error": str(error)}


def _version(machine: Machine, file: str) -> str | None:
    """Of the pyverbs that was imported: a Debian package has no metadata that Python could read."""
    if any(place in file for place in SYSTEM_PACKAGES):
        for block in (machine.text("/var/lib/dpkg/status") or "").split("\n\n"):
            if block.strip().startswith("Package: python3-pyverbs\n"):
                match = re.search(r"^Version: (?:\d+:)?([\d.]+)", block, re.MULTILINE)
                return match[1] if match else None
        return None
    return machine.version("pyverbs")


def _remedy(core: str | None, version: str | None, there: str | None) -> str:
    if core is None:
        return "install rdma-core with its Python binding (Debian: apt install ibverbs-providers python3-pyverbs)"
    away = "`pip uninstall pyverbs` (PyPI has the newest release only), then " if version else ""
    if there and not version:
        tag = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"{there}/pyverbs is for another Python than {tag}: use the system's, or build rdma-core {core}'s"
    return (
        f"{away}take the one of this rdma-core: Debian: apt install python3-pyverbs; otherwise build it from "
        f"rdma-core {core}'s sources; PyPI's pyverbs does not fit unless its version is {_major(core)}"
    )


def _version_in(name: str | None) -> str | None:
    match = LIBRARY.search(name or "")
    return match[1] if match else None


def _major(version: str) -> str:
    return version.partition(".")[0]
