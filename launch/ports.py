"""Ports for launchers that insist on being given one."""

from __future__ import annotations

import random
import socket

_RANGE = range(15_000, 32_000)
"""Below those that the kernel gives to connections by itself: nobody takes such a port by chance."""
_random = random.SystemRandom()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago. Raises OSError if a hundred are taken."""
    for port in _random.sample(_RANGE, 100):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports from {_RANGE.start} to {_RANGE.stop - 1} is free on {host}")
