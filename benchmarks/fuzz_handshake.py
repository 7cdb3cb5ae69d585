"""Cases of `benchmarks.fuzz` before authentication: the handshake in memory, and a real listener on real sockets."""

from __future__ import annotations

import random
import socket
import types
from collections.abc import Callable
from typing import Any

from adaptra_plugin.errors import HandshakeError
from adaptra_plugin.transport.proxy import handshake
from adaptra_plugin.transport.proxy.handshake import AcceptorMachine, Claim, InitiatorMachine, Purpose, Settings
from adaptra_plugin.transport.proxy.handshake_connection import Acceptor
from adaptra_plugin.transport.proxy.loop import Loop
from adaptra_plugin.transport.proxy.rails import stream
from adaptra_plugin.transport.proxy.rails.base import Rail, RailKind
from adaptra_plugin.transport.proxy.wire import FrameHeader, FrameKind
from benchmarks.fuzz_inputs import mutated

SECRET = b"the secret that strangers lack.."
CLAIM = Claim(source=1, pp_rank=1, target=0, purpose=Purpose.TCP, index=1)
SETTINGS = Settings(connections=2, ring_bytes=1 << 20)


def reproducible(rng: random.Random) -> None:
    """Nonces come from the case's own generator."""
    handshake.secrets = types.SimpleNamespace(token_bytes=rng.randbytes)  # type: ignore[assignment]


def fresh(secret: bytes = SECRET) -> tuple[AcceptorMachine, InitiatorMachine]:
    return AcceptorMachine(SECRET, 0, SETTINGS), InitiatorMachine(secret, CLAIM, SETTINGS)


def recorded(secret: bytes = SECRET) -> list[bytes]:
    """All four messages of a handshake."""
    acceptor, initiator = AcceptorMachine(secret, 0, SETTINGS), InitiatorMachine(secret, CLAIM, SETTINGS)
    greeting = acceptor.start()
    proof = initiator.feed(greeting)
    welcome = acceptor.feed(proof)
    return [greeting, proof, welcome, initiator.feed(welcome)]


def in_memory(rng: random.Random) -> str:
    """Somebody between two genuine ends exchanges one of their messages, or what a stranger says is no answer at all."""
    reproducible(rng)
    acceptor, initiator = fresh(rng.choice((SECRET, SECRET, SECRET, rng.randbytes(32), b"")))
    target = rng.randrange(4)
    earlier = recorded() if rng.random() < 0.7 else recorded(rng.randbytes(32))
    said: list[bytes] = []
    changed = False

    def passed(number: int, raw: bytes) -> bytes:
        nonlocal changed
        if number == target:
            # replayed, reflected, or mutated and spliced
            which = rng.random()
            if which < 0.15:
                new = earlier[number]
            elif which < 0.25 and said:
                new = rng.choice(said)
            else:
                new = mutated(rng, raw, [*earlier, *said])
            if rng.random() < 0.7:  # what a socket would deliver: as many bytes as are expected
                new = new[: len(raw)].ljust(len(raw), b"\0")
            changed = changed or new != raw
            raw = new
        said.append(raw)
        return raw

    try:
        greeting = passed(0, acceptor.start())
        proof = passed(1, initiator.feed(greeting))
        welcome = passed(2, acceptor.feed(proof))
        confirm = passed(3, initiator.feed(welcome))
        acceptor.feed(confirm)
    except HandshakeError:
        pass
    genuine = not changed and initiator._secret == SECRET
    assert acceptor.done == genuine, "a handshake that was tampered with has passed, or a genuine one has not"
    assert not (acceptor.done and acceptor.refused)
    assert genuine or target == 3 or not initiator.done, "the dialling side took a stranger for a peer"
    # whatever comes afterwards changes nothing
    before = (acceptor.done, acceptor.refused, acceptor.claim)
    for raw in (rng.choice(said), rng.choice(earlier), b""):
        for machine in (acceptor, initiator):
            try:
                machine.feed(raw)
            except HandshakeError:
                pass
    assert acceptor.done == before[0] and (acceptor.refused == before[1] or not before[1])
    return "passed" if genuine else "refused"


class _Sink:
    """Counts the frames of genuine peers."""

    limit, lanes = 1 << 16, 2

    def __init__(self) -> None:
        self.frames = 0

    def place(self, rail: Rail, header: FrameHeader) -> None:
        return None

    def arrived(self, rail: Rail, header: FrameHeader, body: bytes = b"") -> None:
        self.frames += 1

    def failed(self, rail: Rail, reason: str) -> None: ...


class _Entrance:
    """Stands for a listening socket: what is accepted are ends of socket pairs."""

    family = socket.AF_UNIX

    def __init__(self) -> None:
        self._end, self._bell = socket.socketpair()
        self._waiting: list[socket.socket] = []

    def fileno(self) -> int:
        return self._end.fileno()

    def come(self) -> socket.socket:
        outside, inside = socket.socketpair()
        outside.setblocking(False)
        self._waiting.append(inside)
        self._bell.send(b"!")
        return outside

    def accept(self) -> tuple[socket.socket, str]:
        if not self._waiting:
            raise BlockingIOError
        self._end.recv(1)
        return self._waiting.pop(), ""

    def close(self) -> None:
        self._end.close()
        self._bell.close()


LOCAL = Claim(source=1, pp_rank=1, target=0, purpose=Purpose.SHM, index=0)


class ListenerCase:
    """A listener that stays for all cases: strangers must not spoil it for the genuine peers that come in between."""

    def __init__(self) -> None:
        self.now = 0.0
        self.loop = Loop(lambda: self.now)
        self._entrance = _Entrance()
        self._sink = _Sink()
        self._rails: list[stream.StreamRail] = []
        self._parsed = 0
        self._acceptor = Acceptor(self.loop, self._entrance, SECRET, 0, SETTINGS, 5.0, self._peer)  # type: ignore[arg-type]

    def close(self) -> None:
        self._acceptor.close()
        self.loop.close()

    def _peer(self, sock: socket.socket, claim: Claim, settings: Settings) -> None:
        rail = stream.StreamRail(RailKind.TCP, claim.rail, self._sink, self.loop, sock)
        self._rails.append(rail)

    def _turns(self, count: int) -> None:
        for _ in range(count):
            self.loop.post(self.loop.stop)
            self.loop.run()
            self.loop._stopped = False

    def _read(self, sock: socket.socket, expected: int) -> bytes:
        """What the listener has sent; less than expected if it sends no more, or has hung up."""
        data = b""
        for _ in range(3):
            try:
                while len(data) < expected and (part := sock.recv(expected - len(data))):
                    data += part
            except BlockingIOError:
                pass
            except ConnectionError:
                break
            if len(data) == expected:
                break
            self._turns(1)
        return data

    def _say(self, rng: random.Random | None, sock: socket.socket, raw: bytes) -> None:
        """In one piece or, of a stranger, in several."""
        cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(rng.choice((0, 0, 1, 2)))) if rng and raw else []
        for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            try:
                sock.send(raw[start:stop])
            except OSError:
                return
            self._turns(1)

    def __call__(self, rng: random.Random) -> str:
        reproducible(rng)
        parsed: list[Any] = []
        real_parse: Callable[..., FrameHeader] = stream.parse

        def parse(raw: memoryview, **limits: int) -> FrameHeader:
            parsed.append(bytes(raw))
            return real_parse(raw, **limits)

        stream.parse = parse  # type: ignore[assignment]
        try:
            refused = self._acceptor.refused
            genuine = self._stranger(rng)
            assert genuine or not (self._rails or parsed), "bytes of a stranger came to the parser of frames"
            assert genuine or self._acceptor.refused > refused, "a stranger was not counted"
            assert not self._acceptor._half_open, "a connection of a stranger is left"
            self._clear()
            parsed.clear()
            self._genuine()
            assert len(parsed) == 1 and self._sink.frames, "a genuine peer was not let in after a stranger"
            self._clear()
            return "passed" if genuine else "refused"
        finally:
            stream.parse = real_parse

    def _clear(self) -> None:
        for rail in self._rails:
            rail.close()
        self._rails.clear()
        self._sink.frames = 0

    def _genuine(self) -> None:
        sock = self._entrance.come()
        try:
            initiator = InitiatorMachine(SECRET, LOCAL, SETTINGS)
            self._say(None, sock, initiator.feed(self._read(sock, initiator.expects)))
            self._say(None, sock, initiator.feed(self._read(sock, initiator.expects)))
            self._turns(1)
            self._say(None, sock, FrameHeader(FrameKind.PING, sent=1.0).pack())
            self._turns(1)
        finally:
            sock.close()

    def _stranger(self, rng: random.Random) -> bool:
        """Whether it turned out to be a genuine peer after all."""
        sock = self._entrance.come()
        genuine = False
        try:
            frame = FrameHeader(FrameKind.PING, sent=1.0).pack()
            if rng.random() < 0.4:
                raw = mutated(rng, b"".join(recorded()[1:4:2]), [handshake.MAGIC, frame])
                self._say(rng, sock, raw if rng.random() < 0.8 else handshake.MAGIC + raw)
            else:
                genuine = self._conversation(rng, sock, frame)
            if rng.random() < 0.5:
                try:
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass
            self._turns(2)
            self.now += 6.0  # those that neither speak nor go
            self._turns(2)
        finally:
            sock.close()
        self._turns(1)
        return genuine

    def _conversation(self, rng: random.Random, sock: socket.socket, frame: bytes) -> bool:
        """Answers what it is asked, with something wrong in one of the two answers, and sends a frame too early."""
        secret = SECRET if rng.random() < 0.7 else rng.randbytes(32)
        claim = LOCAL if rng.random() < 0.8 else CLAIM  # which has no place on a socket of this host
        initiator = InitiatorMachine(secret, claim, SETTINGS)
        greeting = self._read(sock, initiator.expects)
        spoilt = rng.randrange(4)  # 0: the proof, 1: the confirmation, 2: a frame comes too early, 3: nothing
        try:
            proof = initiator.feed(greeting)
            sent = mutated(rng, proof, [greeting, frame]) if spoilt == 0 else proof
            sent += frame if spoilt == 2 else b""
            self._say(rng, sock, sent)
            welcome = self._read(sock, initiator.expects)
            confirm = initiator.feed(welcome)
        except HandshakeError:
            return False
        last = mutated(rng, confirm, [proof[-32:], welcome[-32:]]) if spoilt == 1 else confirm
        self._say(rng, sock, last + frame)
        return secret == SECRET and claim == LOCAL and (sent + last).startswith(proof + confirm)
