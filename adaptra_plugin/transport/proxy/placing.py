"""Where the proxy's thread runs, and how it gives way. Linux places threads, so this holds for a proxy thread as well."""

from __future__ import annotations

import os
import threading

from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.proxy.settings import ProxySettings


def place(settings: ProxySettings) -> None:
    """Applies `cpus` and `nice` to the calling thread; what the system refuses is logged, and does no harm."""
    if settings.cpus:
        try:
            os.sched_setaffinity(0, settings.cpus)
        except OSError as error:
            log.warning("adaptra.transport.cpus: the proxy cannot run on %s (%s)", list(settings.cpus), error.strerror)
    if settings.nice:
        try:
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + settings.nice)
        except OSError as error:
            log.warning("adaptra.transport.nice: %d is refused (%s)", settings.nice, error.strerror)
