"""The proxy process, with two descriptors as its arguments: `transport/spawn.py` starts it. Imports no torch."""

from __future__ import annotations

import logging
import os
import socket
import sys

from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.proxy.loop import READ, Descriptor
from adaptra_plugin.transport.proxy.server import Proxy


class _Forward(logging.Handler):
    """Lines go to the endpoint's logger: the proxy has no console of its own."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self._proxy = proxy

    def emit(self, record: logging.LogRecord) -> None:
        self._proxy.log_line(record.levelno, record.getMessage())


def main() -> None:
    data, control = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    proxy = Proxy(data, control)
    log.addHandler(_Forward(proxy))
    log.setLevel(logging.INFO)
    log.propagate = False
    if hasattr(os, "pidfd_open"):
        try:
            # readable when the process has ended, however it has ended
            proxy.loop.watch(Descriptor(os.pidfd_open(os.getppid())), READ, lambda mask: proxy.stop())
        except OSError:
            return  # the endpoint's process is gone already
    proxy.run()


if __name__ == "__main__":
    main()
