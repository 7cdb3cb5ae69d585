"""TLS under the rails: transfers, and everything that can be wrong with certificates, with the other end, or with neither."""

import contextlib
import logging
import os
import random
import re
import socket
import ssl
import time

import pytest

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport.proxy import handshake, tls
from adaptra_plugin.transport.proxy.handshake import Claim, Purpose, Settings
from adaptra_plugin.transport.proxy.handshake_connection import Acceptor, Connector
from adaptra_plugin.transport.proxy.loop import Loop
from adaptra_plugin.transport.proxy.rails import stream
from adaptra_plugin.transport.proxy.rails.base import Frame, RailKind
from adaptra_plugin.transport.proxy.rails.stream import StreamRail
from adaptra_plugin.transport.proxy.tls import PREAMBLE, Tls
from adaptra_plugin.transport.proxy.wire import FrameHeader, FrameKind
from adaptra_plugin.transport.types import Address
from benchmarks.fuzz_inputs import mutated
from tests.transport.proxy import certificates

SECRET = b"a secret of the tests, 32 bytes."
CLAIM = Claim(source=1, pp_rank=1, target=0, purpose=Purpose.TCP, index=0)
SETTINGS = Settings(connections=1, ring_bytes=1 << 20)
MIB = 1 << 20


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """Certificates by name: two ranks of the job, one of another, one that has expired."""
    folder = tmp_path_factory.mktemp("certificates")
    job, other = certificates.authority(folder), certificates.authority(folder, "other")
    return {
        "rank 0": certificates.certificate(folder, "rank0", job),
        "rank 1": certificates.certificate(folder, "rank1", job),
        "other": certificates.certificate(folder, "stranger", other),
        "expired": certificates.certificate(folder, "expired", job, days=-1),
    }


class Sink:
    """Keeps the bytes of segments by their message, and all other frames."""

    limit, lanes = 64 * MIB, 1

    def __init__(self):
        self.segments, self.frames, self.lost = {}, [], None

    def place(self, rail, header):
        self.segments[header.message] = bytearray(header.length)
        return [memoryview(self.segments[header.message])]

    def arrived(self, rail, header, body=b""):
        self.frames.append((header.kind, header.message, body))

    def failed(self, rail, reason):
        self.lost = reason


class Handshakes:
    """A listener and a dialer in one loop. What becomes of them: `rails`, or `reasons` and the log."""

    def __init__(self, here=None, there=None, *, secret=SECRET, timeout_s=5.0):
        self.loop = Loop()
        self.turns = 0
        self.loop.turn_ended = self._turned
        self.rails, self.sinks, self.reasons, self.refusals = {}, {}, [], []
        self.condition, self.deadline = (lambda: True), 0.0
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        self.address = Address(*listening.getsockname())
        self.acceptor = Acceptor(self.loop, listening, SECRET, 0, SETTINGS, timeout_s, self._adopt("here"), tls=here)
        self.connector = Connector(
            *(self.loop, self.address, CLAIM, secret, SETTINGS, timeout_s, None, self._adopt("there")),
            lambda claim, error: self.refusals.append(str(error)),
            lambda claim, reason: self.reasons.append(reason),
            tls=there,
        )

    def _adopt(self, end):
        def adopt(sock, claim, settings):
            self.sinks[end] = Sink()
            self.rails[end] = StreamRail(RailKind.TCP, claim.rail, self.sinks[end], self.loop, sock)

        return adopt

    def _turned(self):
        self.turns += 1
        if self.condition() or time.monotonic() > self.deadline:
            self.loop.stop()

    def until(self, condition, patience_s=10.0):
        self.condition, self.deadline = condition, time.monotonic() + patience_s
        timer = self.loop.call_later(patience_s + 0.01, lambda: None)
        while not condition():
            assert time.monotonic() < self.deadline, "it did not come true"
            self.loop._stopped = False
            self.loop.run()
        timer.cancel()

    def idle(self, seconds):
        """Turns of the loop in that time."""
        before, ends = self.turns, time.monotonic() + seconds
        self.loop.call_later(seconds, lambda: None)
        self.until(lambda: time.monotonic() >= ends)
        return self.turns - before

    def close(self):
        for rail in self.rails.values():
            rail.close()
        self.connector.close()
        self.acceptor.close()
        self.loop.close()


@pytest.fixture
def meet():
    made = []

    def make(*args, **options):
        made.append(Handshakes(*args, **options))
        return made[-1]

    yield make
    for meeting in made:
        meeting.close()


@pytest.fixture
def connected(meet, blocks):
    meeting = meet(Tls(blocks["rank 0"]), Tls(blocks["rank 1"]))
    meeting.until(lambda: len(meeting.rails) == 2)
    return meeting


def segment(message, body):
    return Frame(
        FrameHeader(FrameKind.SEGMENT, 1, message=message, total=len(body), length=len(body)), [memoryview(body)]
    )


def note(number, body=b""):
    return Frame(FrameHeader(FrameKind.CONTROL, 1, message=number, length=len(body)), [body] if body else [])


# --- transfers


def test_what_arrives_is_what_was_sent_both_ways(connected):
    assert isinstance(connected.rails["here"]._sock, tls.TlsSocket)
    assert connected.rails["there"]._sock._tls.version() == "TLSv1.3"
    rng = random.Random(1)
    sent = {end: [] for end in ("here", "there")}
    notes = dict.fromkeys(sent, 0)
    for number in range(60):
        for end, rail in connected.rails.items():
            if rng.random() < 0.5:
                body = rng.randbytes(rng.choice((1, 100, 16383, 16384, 16385, 70_000, 3 * MIB)))
                rail.submit(segment(number << 30, body))
                sent[end].append((number << 30, body))
            else:
                rail.submit(note(number, rng.randbytes(rng.choice((0, 1, 5000)))))
                notes[end] += 1
    ways = (("here", "there"), ("there", "here"))
    connected.until(lambda: all(len(connected.sinks[b].frames) == len(sent[a]) + notes[a] for a, b in ways))
    for a, b in ways:
        assert {message: bytes(body) for message, body in connected.sinks[b].segments.items()} == dict(sent[a])
        assert connected.rails[a].backlog == 0


def test_frames_behind_a_long_one_do_not_wait_for_more_to_come(connected, monkeypatch):
    monkeypatch.setattr(stream, "_ROUNDS", 1)
    # all in one record: most of it lies decrypted in this process when the socket has nothing to say any more
    here, there = connected.rails["here"], connected.rails["there"]
    body = os.urandom(100_000)
    there._writing = True  # keeps back what is submitted, until all of it can go together
    there.submit(segment(0, body))
    for number in range(20):
        there.submit(note(number))
    there._writing = False
    there._pump()
    connected.until(lambda: len(connected.sinks["here"].frames) == 21, 2.0)
    assert [number for kind, number, _ in connected.sinks["here"].frames if kind is FrameKind.CONTROL] == list(
        range(20)
    )
    assert bytes(connected.sinks["here"].segments[0]) == body and not here._pending()


def test_a_frame_that_comes_together_with_the_last_of_the_handshake_is_not_left_behind(meet, blocks, monkeypatch):
    confirm = handshake.InitiatorMachine._welcome
    extra = note(7).header.pack()
    monkeypatch.setattr(handshake.InitiatorMachine, "_welcome", lambda self, raw: confirm(self, raw) + extra)
    meeting = meet(Tls(blocks["rank 0"]), Tls(blocks["rank 1"]))
    meeting.until(lambda: "here" in meeting.sinks and meeting.sinks["here"].frames, 2.0)
    assert meeting.sinks["here"].frames == [(FrameKind.CONTROL, 7, b"")]


def test_nobody_spins_while_there_is_nothing_to_do_or_no_room(connected):
    assert connected.idle(0.3) < 5
    # the other end reads nothing: the kernel's buffers fill, and the rest waits
    connected.loop.watch(connected.rails["here"]._sock, 0, connected.rails["here"]._ready)
    body = os.urandom(32 * MIB)
    connected.rails["there"].submit(segment(0, body))
    connected.idle(0.2)
    assert connected.rails["there"].backlog > MIB
    assert connected.idle(0.3) < 5
    connected.loop.watch(connected.rails["here"]._sock, 1, connected.rails["here"]._ready)
    connected.until(lambda: connected.sinks["here"].frames)
    assert bytes(connected.sinks["here"].segments[0]) == body


def test_no_low_water_mark_is_set(connected, monkeypatch):
    # the kernel would count encrypted bytes, of which there may be fewer than that left
    options = []
    monkeypatch.setattr(tls.TlsSocket, "setsockopt", lambda self, *args: options.append(args))
    connected.rails["there"].submit(segment(0, bytes(32 * MIB)))
    connected.until(lambda: connected.sinks["here"].frames)
    assert options == []


def test_an_end_that_goes_is_noticed(connected):
    connected.rails["there"].close()
    connected.until(lambda: connected.sinks["here"].lost is not None)
    assert connected.sinks["here"].lost == "its connection was closed"


def test_bytes_changed_on_the_way_end_the_rail_with_a_reason(connected):
    inner = socket.socket(fileno=os.dup(connected.rails["there"]._sock.fileno()))
    inner.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    inner.close()
    connected.until(lambda: connected.sinks["here"].lost is not None)
    assert "it broke" in connected.sinks["here"].lost or "not TLS as it should be" in connected.sinks["here"].lost
    assert connected.sinks["here"].frames == []


def test_the_secret_is_proved_inside_as_well(meet, blocks, caplog):
    caplog.set_level(logging.WARNING, "adaptra.transport")
    meeting = meet(Tls(blocks["rank 0"]), Tls(blocks["rank 1"]), secret=b"another secret of at least 16 bytes")
    meeting.until(lambda: meeting.refusals and meeting.acceptor.refused)
    assert "give the same secret to all ranks" in meeting.refusals[0]
    assert "it does not know the secret of this job" in caplog.text and meeting.rails.keys() <= {"there"}


# --- the other end


@pytest.mark.parametrize(
    ("listens", "dials", "said_by_listener", "said_by_dialer"),
    [
        (
            "rank 0",
            "other",
            "its certificate is refused|refuses the certificate",
            "its certificate is refused|refuses the",
        ),
        (
            "other",
            "rank 1",
            "its certificate is refused|refuses the certificate",
            "its certificate is refused|refuses the",
        ),
        ("rank 0", "expired", "certificate has expired", "certificate expired"),
        ("expired", "rank 1", "certificate expired", "certificate has expired"),
        (
            "rank 0",
            None,
            "it closed the connection where TLS begins",
            "it uses TLS, and adaptra.transport.tls is not set",
        ),
        (
            None,
            "rank 1",
            "it uses TLS, and adaptra.transport.tls is not set",
            "it does not use TLS, and .* is set here",
        ),
    ],
    ids=["stranger dials", "stranger listens", "expired dials", "expired listens", "plain dials", "plain listens"],
)
def test_what_does_not_fit_is_named_at_once_on_both_sides(
    meet, blocks, caplog, monkeypatch, listens, dials, said_by_listener, said_by_dialer
):
    caplog.set_level(logging.WARNING, "adaptra.transport")
    monkeypatch.setattr(Tls, "_try", lambda self, paths: None)  # a rank would not even start with such a certificate
    meeting = meet(listens and Tls(blocks[listens]), dials and Tls(blocks[dials]))
    meeting.until(lambda: meeting.refusals and meeting.acceptor.refused, 2.0)

    assert re.search(said_by_listener, caplog.text), caplog.text
    assert re.search(said_by_dialer, meeting.refusals[0]), meeting.refusals
    assert not meeting.rails and not meeting.reasons
    assert meeting.idle(0.2) < 10  # it was final: nobody dials again


def test_strangers_are_refused_and_do_not_keep_a_peer_out(meet, blocks, caplog):
    caplog.set_level(logging.WARNING, "adaptra.transport")
    meeting = meet(Tls(blocks["rank 0"]), Tls(blocks["rank 1"]), timeout_s=0.5)
    meeting.until(lambda: len(meeting.rails) == 2)
    hello = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="x").do_handshake()
    says = {
        b"GET / HTTP/1.1\r\n\r\n": "not a handshake of this transport",
        hello.read(): "not a handshake of this transport",
        PREAMBLE + os.urandom(300): "not TLS as it should be",
        PREAMBLE + b"\x16\x03\x01\xff\xff" + bytes(300): "not TLS as it should be",
        PREAMBLE + b"\x16\x03\x01": "did not complete the handshake within 0.5 s",
        PREAMBLE[:3]: "did not complete the handshake within 0.5 s",
        b"": "did not complete the handshake within 0.5 s",
    }
    for count, (raw, reason) in enumerate(says.items(), 1):
        caplog.clear()
        turns = meeting.turns
        with socket.create_connection((meeting.address.host, meeting.address.port)) as sock:
            sock.sendall(raw)
            meeting.until(lambda count=count: meeting.acceptor.refused == count, 3.0)
        assert reason in caplog.text
        assert meeting.turns - turns < 20  # waiting for the rest costs nothing
    before = dict(meeting.rails)
    again = Connector(
        *(meeting.loop, meeting.address, CLAIM, SECRET, SETTINGS, 5.0, None, lambda *found: found[0].close()),
        lambda claim, error: None,
        tls=Tls(blocks["rank 1"]),
    )
    meeting.until(lambda: meeting.rails["here"] is not before["here"])
    before["here"].close()
    again.close()


def test_nothing_older_than_tls_1_3_and_nobody_without_a_certificate(meet, blocks, caplog):
    caplog.set_level(logging.WARNING, "adaptra.transport")
    meeting = meet(Tls(blocks["rank 0"]), Tls(blocks["rank 1"]))
    meeting.until(lambda: len(meeting.rails) == 2)
    for version, reason in (
        (ssl.TLSVersion.TLSv1_2, "unsupported protocol"),
        (None, "peer did not return a certificate"),
    ):
        caplog.clear()
        refused = meeting.acceptor.refused
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if version is not None:
            context.maximum_version = version
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        end = context.wrap_bio(there, back)
        with socket.create_connection((meeting.address.host, meeting.address.port)) as sock:
            sock.sendall(PREAMBLE)
            sock.setblocking(False)
            for _ in range(10):
                with contextlib.suppress(ssl.SSLError):
                    end.do_handshake()
                meeting.idle(0.02)
                with contextlib.suppress(OSError):
                    sock.sendall(back.read())
                    there.write(sock.recv(65536).removeprefix(PREAMBLE))
            meeting.until(lambda refused=refused: meeting.acceptor.refused > refused, 3.0)
        assert reason in caplog.text


# --- the start


def test_a_block_that_fits_together_is_taken_and_a_key_that_others_may_read_is_warned_of(blocks, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "adaptra.transport")
    Tls(blocks["rank 0"])
    assert caplog.text == ""
    open_key = tmp_path / "open.key"
    open_key.write_bytes(open(blocks["rank 0"]["key"], "rb").read())  # noqa: PTH123, SIM115
    open_key.chmod(0o640)
    Tls({**blocks["rank 0"], "key": str(open_key)})
    assert f"adaptra.transport.tls.key: others may read {open_key}: give it mode 600" in caplog.text


def test_files_that_are_missing_or_do_not_fit_are_refused_with_one_sentence(blocks, tmp_path):
    block = blocks["rank 0"]
    text = tmp_path / "text"
    text.write_text("no PEM\n")
    text.chmod(0o600)
    locked = certificates.certificate(tmp_path, "locked", certificates.authority(tmp_path), password="1234")
    for changes, reason in (
        ({"key": str(tmp_path / "none")}, r"tls\.key: .*/none cannot be read \(No such file or directory\)"),
        ({"authority": str(tmp_path)}, r"tls\.authority: .* cannot be read \(Is a directory\)"),
        ({"key": blocks["rank 1"]["key"]}, "rank1.key is not the key of .*rank0.pem"),
        ({"certificate": str(text)}, "are no certificate and key"),
        ({"authority": str(text)}, r"tls\.authority: .*/text is no certificate"),
        ({"authority": blocks["other"]["authority"]}, "other.pem does not vouch for .*rank0.pem"),
        (blocks["expired"], "does not vouch for .*expired.pem: certificate has expired"),
        (locked, "the key is encrypted"),
    ):
        with pytest.raises(TransportError, match=rf"adaptra\.transport\.tls.*{reason}|adaptra\.transport\.{reason}"):
            Tls({**block, **changes})


def test_mutated_beginnings_break_nothing(meet, blocks):
    """Preambles and hellos of TLS with something changed: every one is refused, and a genuine peer is let in at the end."""
    meeting = meet(Tls(blocks["rank 0"]), Tls(blocks["rank 1"]))
    meeting.until(lambda: len(meeting.rails) == 2)
    back = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        Tls(blocks["rank 1"])._client.wrap_bio(ssl.MemoryBIO(), back).do_handshake()
    hello = PREAMBLE + back.read()
    rng = random.Random(2)
    for count in range(1, 301):
        with socket.create_connection((meeting.address.host, meeting.address.port)) as sock:
            sock.sendall(mutated(rng, hello, [PREAMBLE, handshake.MAGIC, hello]))
            sock.shutdown(socket.SHUT_WR)
            meeting.until(lambda count=count: meeting.acceptor.refused == count, 3.0)
    assert not meeting.acceptor._half_open and len(meeting.rails) == 2
    found = []
    again = Connector(
        *(meeting.loop, meeting.address, CLAIM, SECRET, SETTINGS, 5.0, None, lambda sock, *rest: found.append(sock)),
        lambda claim, error: None,
        tls=Tls(blocks["rank 1"]),
    )
    before = meeting.rails["here"]
    meeting.until(lambda: found and meeting.rails["here"] is not before)
    before.close()
    found[0].close()
    again.close()
