"""Endpoints of several ranks in one process, connected."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from adaptra_plugin.config import Fault, SimulateConfig, SlowLink, TransportConfig
from adaptra_plugin.transport import Direction, Endpoint, EndpointInfo, Key, PeerInfo
from adaptra_plugin.transport.proxy.settings import ProxySettings

SECRET = b"a secret of the tests, 32 bytes."
PATIENCE_S = 20.0
STUCK = SlowLink(src=0, dst=1, latency_ms=3_600_000.0)
"""Nothing of what is sent leaves: no need to fill the kernel's buffers, whose size is nobody's business."""


DEFAULTS: dict[str, Any] = {
    "ring_mib": 1,
    "deadline_s": PATIENCE_S,
    "connect_deadline_s": PATIENCE_S,
    "proxy": "thread",
    "direct": True,
}


def config(**changes: Any) -> TransportConfig:
    """Small rings and short deadlines. The proxy is a thread, which starts at once, unless a test wants a process."""
    return TransportConfig(**{**DEFAULTS, **changes})


def proxy_settings(**changes: Any) -> ProxySettings:
    """As an endpoint tells its proxy, with the configuration's defaults."""
    return ProxySettings.of(TransportConfig(**changes).model_dump(mode="json") | {"cpus": None, "spin_us": 0.0})


def info(rank: int) -> PeerInfo:
    return PeerInfo(rank, rank, f"n{rank}")


def endpoint(rank: int, settings: TransportConfig, **options: Any) -> Endpoint:
    return Endpoint(
        PeerInfo(rank, rank, "n"), settings, options.pop("secret", SECRET), bind_host="127.0.0.1", **options
    )


def table(endpoints: Sequence[Endpoint]) -> dict[int, tuple[PeerInfo, EndpointInfo]]:
    return {e.me.rank: (e.me, e.endpoint_info) for e in endpoints}


def everywhere(*calls: Callable[[], Any]) -> list[BaseException | None]:
    """Runs the calls at the same time; what each raised."""
    errors: list[BaseException | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            calls[index]()
        except BaseException as error:  # noqa: BLE001  handed to the test
            errors[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


def connect_line(endpoints: Sequence[Endpoint]) -> list[BaseException | None]:
    """Connects a pipeline: each rank with the ones before and after it."""
    peers = table(endpoints)

    def connect(e: Endpoint) -> None:
        near = [rank for rank in (e.me.rank - 1, e.me.rank + 1) if rank in peers]
        e.connect(peers, neighbours=near, coordinator=0)

    return everywhere(*(lambda e=e: connect(e) for e in endpoints))


@contextlib.contextmanager
def line(
    count: int = 2,
    links: Sequence[SlowLink] = (),
    offsets: dict[int, float] | None = None,
    faults: Sequence[Fault] = (),
    **changes: Any,
) -> Iterator:
    """Connected endpoints of ranks 0 to count-1, closed at the end."""
    settings = config(**changes)
    endpoints: list[Endpoint] = []
    try:
        for rank in range(count):
            offset = (offsets or {}).get(rank, 0.0)
            simulate = SimulateConfig(links=tuple(links), faults=tuple(faults))
            endpoints.append(endpoint(rank, settings, simulate=simulate, clock_offset_s=offset))
        for error in connect_line(endpoints):
            if error is not None:
                raise error
        yield endpoints
    finally:
        everywhere(*(e.close for e in endpoints))


def activation(microbatch: int, step_id: int = 0, stage: int = 1) -> Key:
    return Key(step_id, Direction.ACTIVATION, stage, microbatch)


def gradient(microbatch: int, step_id: int = 0, stage: int = 0) -> Key:
    return Key(step_id, Direction.GRADIENT, stage, microbatch)


def heard(endpoint: Endpoint, condition: Callable[[], Any]) -> Callable[[], bool]:
    """For `until`: the condition depends on records that no thread of `endpoint` waits for."""

    def check() -> bool:
        endpoint._pump.drain()
        return bool(condition())

    return check


def until(condition: Callable[[], Any], what: str = "condition") -> None:
    """Waits for something another thread does."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true"
        time.sleep(0.002)
