"""Pinned memory: whether CUDA can copy to and from the staging rings without a detour."""

from __future__ import annotations

from collections.abc import Iterator

from adaptra_plugin.doctor.machine import Machine
from adaptra_plugin.doctor.needs import Needs
from adaptra_plugin.doctor.rows import Row, Status, gib
from adaptra_plugin.doctor.topology import count_gpus

# In a process of its own: a CUDA context takes memory of the GPU, and a broken driver may hang.
PROBE = """
import json, mmap, os, sys
found = {}
try:
    import torch
    found.update(torch=torch.__version__, cuda=torch.version.cuda or torch.version.hip)
    found["devices"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found["devices"]:
        size = int(sys.argv[1])
        found["pinned"] = torch.empty(size, dtype=torch.uint8, pin_memory=True).is_pinned()
        fd = os.memfd_create("adaptra-doctor")
        os.ftruncate(fd, size)
        area = torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)
        found["registered"] = int(torch.cuda.cudart().cudaHostRegister(area.data_ptr(), size, 0))
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(found))
"""


def pinned_memory(machine: Machine, needs: Needs) -> Iterator[Row]:
    """Pins one ring, and registers as much shared memory, if there is a GPU."""
    check = "pinned memory"
    count = count_gpus(machine)
    if not count:
        yield Row(check, Status.OKAY, "no GPU: tensors and rings are in the same memory, nothing to pin")
        return
    found = machine.child(PROBE, str(needs.ring_bytes))
    size = gib(needs.ring_bytes)
    torch = f"torch {found.get('torch', '?')}"
    if "error" in found:
        advice = "without pinned memory every copy takes a detour: look at `nvidia-smi` and at the driver's version"
        yield Row(check, Status.WARN, f"{torch}: {found['error']}", advice)
    elif not found.get("cuda"):
        yield Row(check, Status.WARN, f"{count} GPUs, but {torch} is built without CUDA", "install a torch with CUDA")
    elif not found["devices"]:
        advice = "compare the driver (`nvidia-smi`) with the CUDA of torch, and look at CUDA_VISIBLE_DEVICES"
        yield Row(check, Status.WARN, f"{count} GPUs, but {torch} (CUDA {found['cuda']}) can use none", advice)
    elif not found["pinned"] or found["registered"]:
        words = (
            f"{torch}: {size} pinned: {found['pinned']}; cudaHostRegister of shared memory: code {found['registered']}"
        )
        yield Row(
            check,
            Status.WARN,
            words,
            "copies will take a detour: update the driver; in a container allow shared memory",
        )
    else:
        words = f"{size} pinned, and {size} of shared memory registered, by {torch}, CUDA {found['cuda']}"
        yield Row(check, Status.OKAY, f"{words}, {found['devices']} GPUs")
