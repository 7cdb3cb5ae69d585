"""What the proxy is told at its start: plain values, without the library that checked them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from adaptra_plugin.transport.memfd import extent_of, growth_limit


@dataclass(frozen=True)
class ProxySettings:
    """What the proxy needs of the `transport` block: `adaptra_plugin.config.TransportConfig` has checked it and knows the
    defaults."""

    rail: str
    direct: bool
    connections_per_direction: int
    ring_mib: str | int
    ring_max_mib: int
    max_message_mib: int
    segment_kib: int
    checksum: str
    interfaces: tuple[str, ...]
    rdma_devices: str | Sequence[str]
    handshake_timeout_s: float
    reconnect_s: float
    cpus: Sequence[int] | None
    nice: int
    spin_us: float
    tls: Mapping[str, Any] | None

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> ProxySettings:
        """From the whole block, as plain values. Raises KeyError for one that is incomplete."""
        return cls(**{field.name: block[field.name] for field in fields(cls)})

    @property
    def ring_bytes(self) -> int:
        return growth_limit(self.ring_max_mib << 20) if isinstance(self.ring_mib, str) else self.ring_mib << 20

    @property
    def ring_extent(self) -> int | None:
        """See `transport.memfd`."""
        return extent_of(self.segment_kib << 10, grows=isinstance(self.ring_mib, str))

    def wants(self, kind: str) -> bool:
        """Whether rails of that kind are tried; TCP need not ask, it brings the others up and is the last resort."""
        return self.rail in ("auto", kind)

    def demands(self, kind: str) -> bool:
        """Whether a link without a rail of that kind is an error."""
        return self.rail == kind

    def checked(self, *, same_host: bool) -> bool:
        """Whether segments carry a checksum: what does not leave a host's memory needs none."""
        return self.checksum == "on" or (self.checksum == "auto" and not same_host)
