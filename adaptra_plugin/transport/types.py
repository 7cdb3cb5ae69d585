"""Names of things: directions, transfers, addresses, peers, and the card by which endpoints know each other. No torch."""

from __future__ import annotations

import enum
import json
import reprlib
from dataclasses import asdict, dataclass
from typing import Any

from adaptra_plugin.errors import TransportError

PROTOCOL = 4
"""What endpoints and proxies speak; all ranks of a job speak the same."""
MAX_LANES = 16
RING_UNIT = 4096
"""Rings are whole multiples of this (bytes)."""


class Direction(enum.IntEnum):
    """Which way a transfer runs through the pipeline; the numbers travel in frames."""

    ACTIVATION = 0
    GRADIENT = 1

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Key:
    """Names one transfer. `stage` is the receiving stage; `step_id` counts executed schedules."""

    step_id: int
    direction: Direction
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.direction.word} of microbatch {self.microbatch} to stage {self.stage} (step {self.step_id})"


@dataclass(frozen=True)
class Address:
    """Where an endpoint listens; its text form (`host:port`, `[v6]:port`) goes through the launcher's store."""

    host: str
    port: int

    def to_text(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """The inverse of `to_text`.

        Raises:
            TransportError: if the text is no address.
        """
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (colon and _is_host(host) and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
            raise TransportError(
                f"{text[:300]!r} is not an address: host:port or [host]:port is expected, port 1 to 65535"
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        return self.to_text()


@dataclass(frozen=True)
class PeerInfo:
    """Who is at the other end, in words for messages: `rank 2 (stage 2, host n1)`."""

    rank: int
    pp_rank: int
    """Position in its pipeline."""
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (stage {self.pp_rank}, host {self.host})"


def _is_host(text: str) -> bool:
    """Whether a name or an address may be asked for: Python encodes it before the system says that there is none."""
    try:
        return bool(text) and text.isascii() and text.isprintable() and " " not in text and bool(text.encode("idna"))
    except UnicodeError:
        return False


def _is_flat(way: Any) -> bool:
    return isinstance(way, dict) and not any(isinstance(value, list | dict) for value in way.values())


def _short(value: Any) -> str:
    """A value in an error: of no more than a line, however long or deep it is."""
    return reprlib.repr(value)


@dataclass(frozen=True)
class EndpointInfo:
    """What others must know to reach an endpoint; its text form (JSON) goes through the launcher's store."""

    addresses: tuple[Address, ...]
    """Where it listens for TCP, one per interface; the first one is the main one."""
    ring_bytes: int
    """Size of its staging rings; of two endpoints the smaller size counts."""
    connections: int
    """Lanes per direction; equal on all ranks."""
    boot: str = ""
    """Identity of its host, for shared memory."""
    unix: str = ""
    """Name of its abstract socket, for peers on the same host; empty: none."""
    rdma: tuple[dict[str, Any], ...] = ()
    """Ways to reach it by RDMA."""
    protocol: int = PROTOCOL

    def to_text(self) -> str:
        return json.dumps(asdict(self) | {"addresses": [address.to_text() for address in self.addresses]})

    @classmethod
    def parse(cls, text: str) -> EndpointInfo:
        """The inverse of `to_text`.

        Raises:
            TransportError: says which field is wrong, or that the other side speaks another protocol.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TransportError(f"the info of an endpoint is not JSON ({error}): {text[:80]!r}") from None
        if not isinstance(data, dict):
            raise TransportError(f"the info of an endpoint is no JSON object: {text[:80]!r}")
        if data.get("protocol") != PROTOCOL:
            raise TransportError(
                f"it speaks protocol version {_short(data.get('protocol'))}, this side {PROTOCOL}: install the same release "
                "of adaptra_plugin on all ranks"
            )
        fields: list[Any] = [data.get(name) for name in ("addresses", "ring_bytes", "connections", "rdma")]
        addresses, ring, lanes, rdma = fields
        checks = {
            "addresses": isinstance(addresses, list) and addresses and all(isinstance(a, str) for a in addresses),
            "ring_bytes": type(ring) is int and ring >= RING_UNIT and ring % RING_UNIT == 0,
            "connections": type(lanes) is int and 1 <= lanes <= MAX_LANES,
            "boot": isinstance(data.get("boot"), str),
            # its name has to fit behind a NUL into the address of a socket
            "unix": isinstance(unix := data.get("unix"), str) and unix.isascii() and len(unix) < 107,
            "rdma": isinstance(rdma, list) and all(map(_is_flat, rdma)),
        }
        for name, right in checks.items():
            if not right:
                raise TransportError(
                    f"the info of an endpoint has {name} {_short(data.get(name))}, which makes no sense"
                )
        return cls(
            tuple(Address.parse(address) for address in addresses), ring, lanes, data["boot"], data["unix"], tuple(rdma)
        )

    def __str__(self) -> str:
        return ", ".join(map(str, self.addresses))
