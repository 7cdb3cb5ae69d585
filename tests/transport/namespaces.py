"""Two hosts, made of network namespaces of this one: each has its own loopback, and its own idea of a name."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def can_be_made() -> bool:
    """Whether this user may, and the tools are there."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-nm", "ip", "link"], capture_output=True).returncode == 0


@contextlib.contextmanager
def joined() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces with a wire between them; host i has `ADDRESSES[i]`."""
    names = (f"adaptra{os.getpid()}a", f"adaptra{os.getpid()}b")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            for device in ("wire", "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def enter(name: str, hosts: str, folder: Path) -> None:
    """This process, for good: into a network namespace in which /etc/hosts says `hosts`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    with Path(f"/run/netns/{name}").open() as space:
        check(libc.setns(space.fileno(), CLONE_NEWNET))
    text = folder / f"hosts-{name}"
    text.write_text(hosts)
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(str(text).encode(), b"/etc/hosts", None, MS_BIND, None))


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
