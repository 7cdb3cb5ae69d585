"""What the proxy is told at its start: plain values, without the library that checked them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from adaptra_plugin.transport.memfd import extent_of, growth_limit
from adaptra_plugin.transport.proxy.rails.base import RailKind


@dataclass(frozen=True)
class ProxySettings:
    """The `transport` block of the configuration, see `adaptra_plugin.config.TransportConfig`."""

    rail: str = "auto"
    connections_per_direction: int = 2
    ring_mib: str | int = "auto"
    ring_max_mib: int = 1024
    max_message_mib: int = 4096
    segment_kib: int = 1024
    checksum: str = "auto"
    interfaces: tuple[str, ...] = ()
    rdma_devices: str | Sequence[str] = "auto"
    handshake_timeout_s: float = 5.0
    reconnect_s: float = 5.0
    cpus: Sequence[int] | None = None
    nice: int = 0
    spin_us: float = 0.0
    tls: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> ProxySettings:
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in block.items() if name in known})

    @property
    def ring_bytes(self) -> int:
        return growth_limit(self.ring_max_mib << 20) if isinstance(self.ring_mib, str) else self.ring_mib << 20

    @property
    def ring_extent(self) -> int | None:
        """See `transport.memfd`."""
        return extent_of(self.segment_kib << 10, grows=isinstance(self.ring_mib, str))

    def wants(self, kind: RailKind) -> bool:
        """Whether rails of that kind are tried; TCP always is, it brings the others up and is the last resort."""
        return kind is RailKind.TCP or self.rail in ("auto", kind.word)

    def demands(self, kind: RailKind) -> bool:
        """Whether a link without a rail of that kind is an error."""
        return self.rail == kind.word

    def checked(self, *, same_host: bool) -> bool:
        """Whether segments carry a checksum: what does not leave a host's memory needs none."""
        return self.checksum == "on" or (self.checksum == "auto" and not same_host)
