"""Mutual proof of the job's secret, before anything else is read from a connection.

    acceptor  -> initiator   GREETING  version, nonce
    initiator -> acceptor    PROOF     version, who, to whom, for what, nonce, MAC
    acceptor  -> initiator   WELCOME   status, settings, MAC
    initiator -> acceptor    CONFIRM   MAC

All messages have a fixed length. Each MAC is HMAC-SHA256 over the role of its maker and everything said so far, so none
can be reflected, replayed, or used for another connection. The initiator proves first: a stranger learns nothing but a
nonce. CONFIRM tells the acceptor that the initiator has not given up meanwhile (it would have dialled again).

The classes below do no I/O: `feed` takes exactly `expects` bytes and returns what to send.
"""

from __future__ import annotations

import enum
import hmac
import secrets
import struct
from dataclasses import dataclass

from adaptra_plugin.errors import HandshakeError

VERSION = 2
MAX_INDEX = 256
"""Connections of one kind to a peer."""
MAGIC = b"adaptra\x01"
MAC_BYTES = 32
NONCE_BYTES = 32
_GREETING = struct.Struct(f"<8sHxx{NONCE_BYTES}s")
_PROOF = struct.Struct(f"<8sHBBiiiHxxQ{NONCE_BYTES}s")
_WELCOME = struct.Struct("<8sHBxHxxQ")


class Purpose(enum.IntEnum):
    """Which kind of rail a connection becomes."""

    TCP = 0
    SHM = 1


class Status(enum.IntEnum):
    ACCEPTED = 0
    WRONG_SECRET = 1
    WRONG_RANK = 2
    OTHER_SETTINGS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """What both ends must know of each other. `connections` must be equal; the smaller `ring_bytes` limits messages."""

    connections: int
    ring_bytes: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Which connection this is: whose, to whom, for what, and which of several."""

    source: int
    pp_rank: int
    target: int
    purpose: Purpose
    index: int

    def __str__(self) -> str:
        return self.rail

    @property
    def rail(self) -> str:
        """Name of the rail: `tcp0`, `tcp1`, `shm`."""
        return "shm" if self.purpose == Purpose.SHM else f"tcp{self.index}"


class Refused(HandshakeError):
    """The other end gave a reason for refusing; trying again does not help."""


def _mac(secret: bytes, role: bytes, *said: bytes) -> bytes:
    return hmac.digest(secret, b"adaptra transport " + role + b"\0" + b"".join(said), "sha256")


def _check_start(raw: bytes, version: int) -> None:
    if not raw.startswith(MAGIC):
        raise HandshakeError("what it sent is not a handshake of this transport")
    if version != VERSION:
        raise HandshakeError(
            f"it speaks protocol version {version}, this side {VERSION}: install the same release everywhere"
        )


def _check_turn(raw: bytes, expects: int, *, over: bool) -> None:
    # the callers see to it; should they ever not, nothing may come of it
    if over or len(raw) != expects:
        raise HandshakeError(f"{len(raw)} bytes came where {0 if over else expects} were expected")


class AcceptorMachine:
    """The listening side."""

    def __init__(self, secret: bytes, rank: int, settings: Settings) -> None:
        self._secret = secret
        self._rank = rank
        self._settings = settings
        self._said = b""
        self.claim: Claim | None = None
        self.peer_settings: Settings | None = None
        self.done = False
        self.refused: str | None = None
        """Why the connection is to be closed once the last answer is out."""
        self.expects = _PROOF.size + MAC_BYTES

    @property
    def expects_magic(self) -> bool:
        return self.claim is None

    def start(self) -> bytes:
        self._said = _GREETING.pack(MAGIC, VERSION, secrets.token_bytes(NONCE_BYTES))
        return self._said

    def feed(self, raw: bytes) -> bytes:
        """Raises HandshakeError with the reason for the log."""
        _check_turn(raw, self.expects, over=self.done or self.refused is not None)
        return self._proof(raw) if self.claim is None else self._confirm(raw)

    def _proof(self, raw: bytes) -> bytes:
        proof, mac = raw[:-MAC_BYTES], raw[-MAC_BYTES:]
        _, version, purpose, index, source, target, stage, connections, ring, _ = _PROOF.unpack(proof)
        _check_start(raw, version)
        if not hmac.compare_digest(mac, _mac(self._secret, b"initiator", self._said, proof)):
            self.refused = "it does not know the secret of this job"
            return self._answer(Status.WRONG_SECRET)
        if purpose not in iter(Purpose) or index >= MAX_INDEX:
            raise HandshakeError(f"connection {index} for unknown purpose {purpose}")
        self.claim = Claim(source, stage, target, Purpose(purpose), index)
        self.peer_settings = Settings(connections, ring)
        self._said += raw
        if target != self._rank:
            self.refused = f"rank {source} looks for rank {target}, this is rank {self._rank}"
            return self._answer(Status.WRONG_RANK)
        if connections != self._settings.connections:
            self.refused = (
                f"rank {source} has adaptra.transport.connections_per_direction {connections}, "
                f"this rank {self._settings.connections}"
            )
            return self._answer(Status.OTHER_SETTINGS)
        self.expects = MAC_BYTES
        return self._answer(Status.ACCEPTED)

    def _answer(self, status: Status) -> bytes:
        welcome = _WELCOME.pack(MAGIC, VERSION, status, self._settings.connections, self._settings.ring_bytes)
        # whoever does not know the secret gets no proof of it
        mac = bytes(MAC_BYTES) if self.claim is None else _mac(self._secret, b"acceptor", self._said, welcome)
        self._said += welcome + mac
        return welcome + mac

    def _confirm(self, raw: bytes) -> bytes:
        if not hmac.compare_digest(raw, _mac(self._secret, b"confirm", self._said)):
            raise HandshakeError("its confirmation is wrong")
        self.done = True
        return b""


class InitiatorMachine:
    """The dialling side."""

    def __init__(self, secret: bytes, claim: Claim, settings: Settings) -> None:
        self._secret = secret
        self._settings = settings
        self._said = b""
        self._greeted = False
        self.claim = claim
        self.peer_settings: Settings | None = None
        self.done = False
        self.refused: str | None = None
        self.expects = _GREETING.size

    expects_magic = True

    def start(self) -> bytes:
        return b""

    def feed(self, raw: bytes) -> bytes:
        """Raises Refused, or HandshakeError with the reason."""
        _check_turn(raw, self.expects, over=self.done)
        return self._welcome(raw) if self._greeted else self._greeting(raw)

    def _greeting(self, raw: bytes) -> bytes:
        _, version, _ = _GREETING.unpack(raw)
        _check_start(raw, version)
        self._greeted = True
        c = self.claim
        proof = _PROOF.pack(
            MAGIC,
            VERSION,
            c.purpose,
            c.index,
            c.source,
            c.target,
            c.pp_rank,
            self._settings.connections,
            self._settings.ring_bytes,
            secrets.token_bytes(NONCE_BYTES),
        )
        mac = _mac(self._secret, b"initiator", raw, proof)
        self._said = raw + proof + mac
        self.expects = _WELCOME.size + MAC_BYTES
        return proof + mac

    def _welcome(self, raw: bytes) -> bytes:
        welcome, mac = raw[:-MAC_BYTES], raw[-MAC_BYTES:]
        _, version, status, connections, ring = _WELCOME.unpack(welcome)
        _check_start(raw, version)
        if status == Status.WRONG_SECRET:
            raise Refused("it says that this rank does not know the job's secret: give the same secret to all ranks")
        if not hmac.compare_digest(mac, _mac(self._secret, b"acceptor", self._said, welcome)):
            raise Refused("it does not know the job's secret: something else listens there")
        if status == Status.WRONG_RANK:
            raise Refused(f"it is not rank {self.claim.target}: the published addresses are mixed up or old")
        if status == Status.OTHER_SETTINGS:
            raise Refused(
                f"it has adaptra.transport.connections_per_direction {connections}, this rank "
                f"{self._settings.connections}: use the same configuration on all ranks"
            )
        if status != Status.ACCEPTED:
            raise Refused(f"it answered with unknown status {status}")
        self._said += raw
        self.peer_settings = Settings(connections, ring)
        self.done = True
        return _mac(self._secret, b"confirm", self._said)
