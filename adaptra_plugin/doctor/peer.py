"""``adaptra doctor --serve`` and ``--peer``: latency and bandwidth of every rail between two hosts.

Each rail is measured through an endpoint of its own at each end, with its proxy, as a job would use it. The end that was
dialled (`rendezvous.SERVER`) follows; the one that dialled (`rendezvous.CLIENT`) drives and holds the watch.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.doctor.rendezvous import CLIENT, SERVER, Gone, Wire
from adaptra_plugin.errors import AdaptraError, TransportError
from adaptra_plugin.transport import Channel, Direction, Endpoint, EndpointInfo, Key, PeerInfo

RAILS = ("shm", "rdma", "tcp")
SIZES_MIB = (1, 16)
MIB = 1 << 20
RING_MIB = 32
"""Least size of a ring: room for the largest message and for one that waits behind it."""
CONNECT_DEADLINE_S = 20.0
DEADLINE_S = 60.0
"""For one message."""
WIRE_DEADLINE_S = 300.0
"""For one step of the other end: a batch on a slow line."""
MEASURE_S = 1.0
"""Length of one measurement, as far as the number of messages may be chosen."""
MOST_TRIPS, MOST_MESSAGES = 1000, 4096
_FIRST_TRIPS = 20
_MOST_TURNS = 4
LINGER_S = 2.0
"""For the last acknowledgements, after all has gone well (s)."""


@dataclass(frozen=True)
class Speed:
    """Bandwidth for messages of one size (GB/s, 10^9 bytes), as this end sees it."""

    mib: int
    sent_gb_per_s: float
    received_gb_per_s: float


@dataclass(frozen=True)
class Figures:
    """What was measured on one rail, or why not."""

    rail: str
    why: str = ""
    """Why there are no figures; empty: there are."""
    failed: bool = False
    """Both ends have the rail, but it broke while it was measured."""
    p50_us: float = 0.0
    """Round trip of a message of four bytes: median, and 99 of 100 are shorter than `p99_us`."""
    p99_us: float = 0.0
    speeds: tuple[Speed, ...] = ()

    def seen_from_there(self) -> Figures:
        return replace(self, speeds=tuple(Speed(s.mib, s.received_gb_per_s, s.sent_gb_per_s) for s in self.speeds))

    def to_json(self) -> dict[str, Any]:
        if self.why:
            return {"rail": self.rail, "measured": False, "failed": self.failed, "why": self.why}
        return {
            "rail": self.rail,
            "measured": True,
            "round_trip_us": {"p50": self.p50_us, "p99": self.p99_us},
            "bandwidth": [asdict(speed) for speed in self.speeds],
        }


def examine_rails(wire: Wire, rank: int, config: TransportConfig, secret: bytes) -> tuple[str, list[Figures]]:
    """Measures all rails with the other doctor; (its host, the figures of each rail).

    Raises:
        Gone: the other doctor has ended.
        TransportError: it says what makes no sense.
    """
    torch.set_num_threads(1)  # as in a rank: threads that copy together wait for each other where processors are few
    here = platform.node()
    wire.send({"host": here})
    there = str(wire.receive().get("host"))[:256]
    infos = {rank: PeerInfo(rank, rank, here), 1 - rank: PeerInfo(1 - rank, 1 - rank, there)}
    return there, [_rail(name, wire, rank, infos, _settings(config, name), secret) for name in RAILS]


def _settings(config: TransportConfig, rail: str) -> dict[str, Any]:
    """The job's configuration, with the rail and shorter deadlines."""
    return {
        **config.model_dump(),
        "rail": rail,
        "ring_mib": RING_MIB if config.ring_grows else max(config.ring_bytes >> 20, RING_MIB),
        "deadline_s": min(config.deadline_s, DEADLINE_S),
        "warn_full_after_ms": 1e3 * DEADLINE_S,  # rings are to be full
        "connect_deadline_s": min(config.connect_s, CONNECT_DEADLINE_S),
    }


def _rail(
    rail: str, wire: Wire, rank: int, infos: dict[int, PeerInfo], settings: dict[str, Any], secret: bytes
) -> Figures:
    endpoint: Endpoint | None = None
    why, linger_s = "", 0.0
    try:
        try:
            parsed = TransportConfig.model_validate(settings)
            endpoint = Endpoint(infos[rank], parsed, secret, bind_host=wire.local_host)
            if rail == "rdma" and not endpoint.endpoint_info.rdma:
                why = "no RDMA device that works: see the rows of `adaptra doctor`"
        except (AdaptraError, ValueError) as error:
            why = _line(error)
        endpoint_info = _agree(
            wire, why, {"endpoint_info": None if endpoint is None else endpoint.endpoint_info.to_text()}
        )
        if isinstance(endpoint_info, str):
            return Figures(rail, endpoint_info)
        assert endpoint is not None
        other = EndpointInfo.parse(str(endpoint_info["endpoint_info"]))
        if rail == "shm" and other.boot != endpoint.endpoint_info.boot:
            return Figures(rail, "the two hosts have no memory in common")
        try:
            endpoint.connect({1 - rank: (infos[1 - rank], other)}, neighbours=[1 - rank], coordinator=SERVER)
        except TransportError as error:
            why = _line(error)
        both = _agree(wire, why, {})
        if isinstance(both, str):
            return Figures(rail, both, failed=rail == "tcp")
        bench = Bench(endpoint.channel(1 - rank), rank)
        figures = _drive(rail, wire, bench) if rank == CLIENT else _follow(rail, wire, bench, endpoint)
        linger_s = 0.0 if figures.failed else LINGER_S
        return figures
    finally:
        if endpoint is not None:
            endpoint.close(linger_s)


def _agree(wire: Wire, why: str, said: dict[str, Any]) -> dict[str, Any] | str:
    """Tells the other end whether this one can go on. What it says, or why one of both cannot."""
    wire.send({"why": why, **said})
    answer = wire.receive()
    theirs = str(answer.get("why", ""))[:1000]
    if why:
        return why if theirs in ("", why) else f"here: {why}; there: {theirs}"
    return f"there: {theirs}" if theirs else answer


def _line(error: Exception) -> str:
    return " ".join(str(getattr(error, "why", "") or error).split())


def _drive(rail: str, wire: Wire, bench: Bench) -> Figures:
    """On the end that dialled: orders one measurement after the other, and tells the other end what came of them."""

    def order(what: str, count: int, nbytes: int = 0) -> Any:
        wire.send({"do": what, "count": count, "nbytes": nbytes})
        return getattr(bench, what)(count, nbytes)

    try:
        first = order("trips", _FIRST_TRIPS)
        trips = sorted(order("trips", _count(MEASURE_S / statistics.median(first), _FIRST_TRIPS, MOST_TRIPS)))
        speeds, guess = [], 0.0
        for mib in SIZES_MIB:
            size = mib * MIB
            guess = guess or 2 * size / order("there", 2, size)
            found = {}
            for way in ("there", "back"):
                for turn in range(
                    _MOST_TURNS
                ):  # the first one touches the memory, those after it know the speed better
                    count = _count(MEASURE_S * guess / size, 2, MOST_MESSAGES)
                    took = order(way, count, size)
                    guess = count * size / took
                    if turn and (took > 0.5 * MEASURE_S or count == MOST_MESSAGES):
                        break
                found[way] = round(guess / 1e9, 4)
            speeds.append(Speed(mib, found["there"], found["back"]))
        at = [round(1e6 * trips[min(len(trips) - 1, int(share * len(trips)))], 1) for share in (0.5, 0.99)]
        figures = Figures(rail, p50_us=at[0], p99_us=at[1], speeds=tuple(speeds))
    except Gone:
        raise
    except TransportError as error:
        figures = Figures(rail, _line(error), failed=True)
    wire.send({"do": "end", "figures": figures.to_json()})
    return figures


def _follow(rail: str, wire: Wire, bench: Bench, endpoint: Endpoint) -> Figures:
    """On the end that was dialled. After an error it leaves, which the other end notices, and hears the end all the same."""
    why = ""
    while True:
        order = wire.receive()
        what = order.get("do")
        if what == "end":
            figures = _parse(rail, order.get("figures"))
            return Figures(rail, why, failed=True) if why else figures.seen_from_there()
        if why:
            continue
        count, nbytes = order.get("count"), order.get("nbytes")
        limits = {"trips": (MOST_TRIPS, 0), "there": (MOST_MESSAGES, max(SIZES_MIB) * MIB)}
        most, largest = limits["trips" if what == "trips" else "there"]
        if what not in ("trips", "there", "back") or not (_whole(count, most) and _whole(nbytes, largest)):
            raise TransportError("the other doctor orders something unknown: install the same release on both hosts")
        try:
            getattr(bench, what)(count, nbytes)
        except TransportError as error:
            why = _line(error)
            endpoint.close(linger_s=0.0)


def _whole(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _count(wanted: float, least: int, most: int) -> int:
    return max(least, min(most, int(wanted)))


def _parse(rail: str, data: Any) -> Figures:
    """What the other end has measured. Raises TransportError."""
    try:
        if not data["measured"]:
            return Figures(rail, f"there: {str(data['why'])[:1000]}", failed=bool(data["failed"]))
        trip = data["round_trip_us"]
        speeds = [
            Speed(int(row["mib"]), _number(row["sent_gb_per_s"]), _number(row["received_gb_per_s"]))
            for row in data["bandwidth"]
        ]
        return Figures(rail, p50_us=_number(trip["p50"]), p99_us=_number(trip["p99"]), speeds=tuple(speeds))
    except (KeyError, TypeError, ValueError):
        raise TransportError("the other doctor's figures make no sense: install the same release") from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


class Bench:
    """The messages of one rail: both ends call the same method with the same numbers."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self._channel = channel
        self._rank = rank
        self._drives = rank == CLIENT
        self._step_id = 0

    def _keys(self, count: int) -> tuple[Callable[[int], Key], Callable[[int], Key]]:
        """Names of messages to the end that follows, and of those to the end that drives."""
        self._step_id += 1
        step_id = self._step_id
        return (
            lambda number: Key(step_id, Direction.ACTIVATION, SERVER, number),
            lambda number: Key(step_id, Direction.GRADIENT, CLIENT, number),
        )

    def trips(self, count: int, nbytes: int) -> list[float]:
        """Round trips of four bytes (s); none at the end that follows."""
        there, back = self._keys(count)
        data, taken = torch.zeros(1), []
        for number in range(count):
            start = time.perf_counter()
            if self._drives:
                self._channel.send(there(number), [data])
                self._channel.recv(back(number)).wait()
                taken.append(time.perf_counter() - start)
            else:
                self._channel.recv(there(number)).wait()
                self._channel.send(back(number), [data])
        return taken

    def there(self, count: int, nbytes: int) -> float:
        """Messages to the end that follows, which answers the last one; seconds."""
        there, back = self._keys(count)
        start = time.perf_counter()
        if self._drives:
            self._send(there, count, nbytes)
            self._channel.recv(back(0)).wait()
        else:
            self._receive(there, count)
            self._channel.send(back(0), [])
        return time.perf_counter() - start

    def back(self, count: int, nbytes: int) -> float:
        """Messages from the end that follows, once it is asked; seconds."""
        there, back = self._keys(count)
        start = time.perf_counter()
        if self._drives:
            self._channel.send(there(0), [])
            self._receive(back, count)
        else:
            self._channel.recv(there(0)).wait()
            self._send(back, count, nbytes)
        return time.perf_counter() - start

    def _send(self, key: Callable[[int], Key], count: int, nbytes: int) -> None:
        data = torch.zeros(nbytes, dtype=torch.uint8)
        for number in range(count):
            self._channel.send(key(number), [data])

    def _receive(self, key: Callable[[int], Key], count: int) -> None:
        for number in range(count):
            self._channel.recv(key(number)).wait()
