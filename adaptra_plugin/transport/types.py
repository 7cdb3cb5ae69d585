"""Names of things: directions, transfers, addresses, peers, and the message a receive returns."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import torch

from adaptra_plugin.errors import TransportError


class Direction(enum.IntEnum):
    """Which way a transfer runs through the pipeline; the numbers travel in frames."""

    ACTIVATION = 0
    GRADIENT = 1

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Key:
    """Names one transfer. `stage` is the receiving stage; `epoch` counts executed schedules."""

    epoch: int
    direction: Direction
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.direction.word} of microbatch {self.microbatch} to stage {self.stage} (epoch {self.epoch})"


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
        if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
            raise TransportError(f"{text!r} is not an address: host:port or [host]:port is expected, port 1 to 65535")
        return cls(host, int(port))

    def __str__(self) -> str:
        return self.to_text()


@dataclass(frozen=True)
class PeerInfo:
    """Who is at the other end, in words for messages: `rank 2 (stage 2, host n1)`."""

    rank: int
    stage: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (stage {self.stage}, host {self.host})"


@dataclass(frozen=True, slots=True)
class Message:
    """What arrived: fresh, writable tensors that belong to the caller."""

    tensors: tuple[torch.Tensor, ...]
    tag: int
    """The number that the sender gave to `send`."""
    delay_ms: float
    """From the moment the whole message lay in the sender's ring to complete arrival in the receiver's (ms, >= 0), without
    the difference of clocks. Waiting for room in the sender's ring and copying into it do not count; waiting there behind
    other messages does."""
    delayed_by_ring: bool = False
    """The receiving proxy had stopped reading while this message was under way, for lack of room in its own ring: then
    `delay_ms` tells of the consumer, not of the link."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Message:
        """The same message with its tensors on `device`."""
        return replace(self, tensors=tuple(t.to(device, non_blocking=non_blocking) for t in self.tensors))
