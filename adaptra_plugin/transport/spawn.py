"""Starts the proxy of an endpoint: a process of its own, or a thread of this one."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack

from adaptra_plugin import isolated
from adaptra_plugin.errors import TransportError
from adaptra_plugin.shortage import told
from adaptra_plugin.transport.bridge import pairs
from adaptra_plugin.transport.log import log

_PROXY = "adaptra_plugin.transport.proxy.main"
_DISCARD_S = 5.0


class Running(ABC):
    """A proxy that has been started. The endpoint owns its ends of the two pairs of sockets."""

    data: socket.socket
    control: socket.socket

    @abstractmethod
    def join(self, timeout_s: float) -> bool:
        """Waits for its end (s). True if it has ended."""

    @abstractmethod
    def kill(self) -> None:
        """Ends it at once, as far as that is possible."""

    def discard(self) -> None:
        """Gives everything back; nobody has spoken to it yet."""
        self.data.close()
        self.control.close()
        self.kill()
        self.join(_DISCARD_S)

    @abstractmethod
    def obituary(self) -> str:
        """What it is and how it ended, in words."""

    @abstractmethod
    def abandon(self) -> None:
        """In a forked child: lets go of what was inherited besides the endpoint's ends."""


Spawn = Callable[[int], Running]
"""Starts a proxy for a rank. Raises TransportError."""


class ProxyProcess(Running):
    """Loads neither torch nor the training's code; the job's secret comes over the control stream."""

    def __init__(self, rank: int) -> None:
        """Raises TransportError if no process can be started."""
        what = f"the proxy process of rank {rank} cannot be started"
        with told(what, TransportError):
            (self.data, data), (self.control, control) = pairs()
        self._rank = rank
        try:
            # signals to the whole job are the trainer's to handle (it may save a checkpoint first); its end is the proxy's
            with told(what, TransportError, 'set adaptra.transport.proxy to "thread" to do without'):
                self._process: subprocess.Popen[bytes] | None = isolated.start(
                    *(_PROXY, str(data.fileno()), str(control.fileno())),
                    deaf=True,
                    pass_fds=(data.fileno(), control.fileno()),
                    stdin=subprocess.DEVNULL,
                )
        except BaseException:
            self.data.close()
            self.control.close()
            raise
        finally:
            data.close()
            control.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def join(self, timeout_s: float) -> bool:
        if self._process is None:
            return True
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def obituary(self) -> str:
        code = self._process.poll() if self._process is not None else None
        if code is None:
            how = "has closed its sockets and is still there"
        elif code < 0:
            how = f"was killed by {_signal_name(-code)} (exit code {code})"
        else:
            how = f"has ended with exit code {code}"
        return f"the proxy process of rank {self._rank} {how}"

    def abandon(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # it is not this process's child: nobody here may wait for it


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class ProxyThread(Running):
    """The same proxy in this process: no start-up time and nothing to reap, but it shares the interpreter lock."""

    def __init__(self, rank: int) -> None:
        with ExitStack() as undo, told(f"the proxy thread of rank {rank} cannot be started", TransportError):
            from adaptra_plugin.transport.proxy.server import Proxy

            (self.data, data), (self.control, control) = pairs()
            self._rank = rank
            self._ends = (data, control)
            for end in (self.data, self.control, *self._ends):
                undo.callback(end.close)
            self._proxy = Proxy(data, control)
            self._error: BaseException | None = None
            self._thread = threading.Thread(target=self._run, name=f"adaptra-proxy-{rank}", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._proxy.abandon()
                raise
            undo.pop_all()

    def _run(self) -> None:
        try:
            self._proxy.run()
        except BaseException as error:  # noqa: BLE001  the endpoint reports it
            self._error = error
            log.exception("the proxy thread of rank %d failed", self._rank)
        finally:
            for end in self._ends:
                end.close()

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def kill(self) -> None:
        """It notices that the endpoint's ends are closed."""

    def obituary(self) -> str:
        how = f"failed: {type(self._error).__name__}: {self._error}" if self._error is not None else "has ended"
        return f"the proxy thread of rank {self._rank} {how}"

    def abandon(self) -> None:
        self._proxy.abandon()
        for end in self._ends:
            end.close()


SPAWNS: dict[str, Spawn] = {"process": ProxyProcess, "thread": ProxyThread}
