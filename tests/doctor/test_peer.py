"""Two doctors as real processes on loopback: figures of both ends, wrong secrets, ends that go away."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from adaptra_plugin.cli import main
from adaptra_plugin.doctor import meet, peer, rendezvous
from adaptra_plugin.doctor.peer import Figures, Speed
from adaptra_plugin.errors import ConfigError, HandshakeError, TransportError
from adaptra_plugin.transport import Address

SECRET = "a secret of the tests of doctors"
PATIENCE_S = 60.0
CONFIG = {"adaptra": {"enabled": True, "transport": {"proxy": "thread"}}}


class Doctor:
    """A process, with what it prints in files."""

    def __init__(self, folder: Path, name: str, *options: str, secret: str | None = SECRET, typed: str = "") -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("ADAPTRA_SECRET", "MASTER_ADDR")}
        if secret is not None:
            environment["ADAPTRA_SECRET"] = secret
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        # measurements of a moment: what is tested is not how fast this machine is
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # shells' background jobs ignore it
            "from adaptra_plugin.doctor import peer; peer.MEASURE_S = 0.05; "
            "from adaptra_plugin.cli import main; sys.exit(main())"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "doctor", *options],
            stdin=subprocess.PIPE,
            stdout=self.out.open("wb"),
            stderr=self.err.open("wb"),
            env=environment,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(typed.encode())
        self.process.stdin.close()

    def address(self) -> str:
        """Where it listens, once it has said so."""
        return self.said(r"--peer (127\.0\.0\.1:\d+)")

    def said(self, pattern: str) -> str:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            found = re.search(pattern, self.text())
            if found:
                return found[1] if found.re.groups else found[0]
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)
        raise AssertionError(f"{pattern} did not come: {self.text()}")

    def text(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def ends(self) -> int:
        return self.process.wait(PATIENCE_S)

    def proxies(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@pytest.fixture
def doctors(tmp_path: Path) -> Iterator:
    started: list[Doctor] = []

    def start(*options: str, **more) -> Doctor:
        started.append(Doctor(tmp_path, f"doctor{len(started)}", *options, **more))
        return started[-1]

    yield start
    for doctor in started:
        doctor.process.kill()
        doctor.process.wait()


def test_both_ends_print_the_same_figures(doctors):
    server = doctors("--serve", "--bind", "127.0.0.1", "--json")
    client = doctors("--peer", server.address(), "--json")
    assert (client.ends(), server.ends()) == (0, 0), server.text() + client.text()
    # nothing but JSON on stdout, nothing to worry about on stderr
    mine, theirs = json.loads(client.out.read_text()), json.loads(server.out.read_text())
    assert client.err.read_text() == ""
    assert SECRET not in server.text()
    rails = {row["rail"]: row for row in mine["rails"]}
    assert list(rails) == ["shm", "rdma", "tcp"]
    for name in ("shm", "tcp"):
        row = rails[name]
        assert row["measured"], row
        assert 0 < row["round_trip_us"]["p50"] <= row["round_trip_us"]["p99"]
        assert [speed["mib"] for speed in row["bandwidth"]] == [1, 16]
        assert all(speed["sent_gb_per_s"] > 0 and speed["received_gb_per_s"] > 0 for speed in row["bandwidth"])
    if not rails["rdma"]["measured"]:
        assert "\n" not in rails["rdma"]["why"]
        assert "RDMA" in rails["rdma"]["why"]
    # what one end sends is what the other receives
    for here, there in zip(rails["tcp"]["bandwidth"], theirs["rails"][2]["bandwidth"], strict=True):
        assert here["sent_gb_per_s"] == there["received_gb_per_s"]
        assert here["received_gb_per_s"] == there["sent_gb_per_s"]


def test_a_secret_that_was_made_is_pasted_and_another_is_refused(doctors, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    options = ("--config", str(tmp_path / "ds.json"))
    server = doctors("--serve", "--bind", "127.0.0.1", *options, secret=None)
    secret = server.said(r"\n +([0-9a-f]{32})\n")
    stranger = doctors("--peer", server.address(), *options, secret="x" * 32)
    assert stranger.ends() == 2
    assert "does not know the job's secret" in stranger.text()
    server.said("it does not know the secret of this job")
    assert server.process.poll() is None  # it waits for the right one
    client = doctors("--peer", server.address(), *options, secret=None, typed=secret + "\n")
    assert (client.ends(), server.ends()) == (0, 0), server.text() + client.text()
    assert re.search(r"^ *tcp +\d+ +\d+ +[\d.]+ ", client.text(), re.MULTILINE)


@pytest.mark.parametrize("who", ["server", "client"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_that_goes_away_ends_both_and_nothing_stays(doctors, who, how):
    server = doctors("--serve", "--bind", "127.0.0.1")
    client = doctors("--peer", server.address())
    goes, stays = (server, client) if who == "server" else (client, server)
    end = time.monotonic() + PATIENCE_S
    while not (goes.proxies() and stays.proxies()):  # in the middle of a rail
        assert time.monotonic() < end
        time.sleep(0.01)
    proxies = server.proxies() + client.proxies()
    goes.process.send_signal(how)
    assert goes.ends() == (130 if how == signal.SIGINT else -how)
    started = time.monotonic()
    assert stays.ends() == 2
    assert time.monotonic() - started < 20
    assert "the other doctor is gone" in stays.text()
    assert "Traceback" not in stays.text() + goes.text()
    _, alive = psutil.wait_procs(proxies, timeout=10)
    assert alive == []


def test_a_stranger_that_talks_nonsense_costs_nothing(doctors):
    server = doctors("--serve", "--bind", "127.0.0.1")
    address = Address.parse(server.address())
    with socket.create_connection((address.host, address.port)) as stranger:
        stranger.sendall(b'\x10\0\0\0{"host": "evil"}' * 20)
        stranger.settimeout(PATIENCE_S)
        try:
            while stranger.recv(4096):
                pass
        except ConnectionResetError:
            pass
    server.said("refused: connection from")
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    assert server.ends() == 130


def test_nobody_there_and_nobody_comes():
    settings = meet.TransportConfig(connect_deadline_s=0.3)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", unused.getsockname()[1])
        with pytest.raises(TransportError, match=r"has not answered within 0.3 s .*refused"):
            rendezvous.dial(settings, address, SECRET.encode(), deadline_s=1)
    with pytest.raises(TransportError, match="nobody has come with the secret"):
        rendezvous.serve(settings, "127.0.0.1", SECRET.encode(), lambda _: None, wait_s=0.1, deadline_s=1)


def test_what_listens_without_the_secret_gets_no_card(tmp_path):
    """A listener that has another secret is told nothing but the proof that it cannot check."""
    import threading

    address: list[Address] = []
    ready = threading.Event()

    def serve() -> None:
        def listening(where: Address) -> None:
            address.append(where)
            ready.set()

        with pytest.raises(TransportError):
            rendezvous.serve(meet.TransportConfig(), "127.0.0.1", b"y" * 32, listening, wait_s=3, deadline_s=1)

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(10)
    with pytest.raises(HandshakeError, match="refused"):
        rendezvous.dial(meet.TransportConfig(), address[0], b"x" * 32, deadline_s=1)
    thread.join(10)
    assert not thread.is_alive()


def wire_pair() -> tuple[rendezvous.Wire, socket.socket]:
    ours, theirs = socket.socketpair()
    return rendezvous.Wire(ours, 0.2), theirs


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"\xff\xff\xff\xff", "announces a message of 4294967295 bytes"),
        (b"\x02\0\0\0[]", "sent a list"),
        (b"\x02\0\0\0{{", "is not JSON"),
        (b"\x02\0\0", "has said nothing for 0.2 s"),
    ],
)
def test_messages_that_are_none(sent, words):
    wire, theirs = wire_pair()
    with theirs:
        theirs.sendall(sent)
        with pytest.raises(TransportError, match=words):
            wire.receive()
    wire.close()


@pytest.mark.parametrize(
    "order",
    [
        {"do": "close", "count": 1, "nbytes": 1},
        {"do": "there", "count": 1 << 40, "nbytes": 1},
        {"do": "there", "count": 2, "nbytes": 1 << 40},
        {"do": "back", "count": True, "nbytes": 1},
        {"do": "trips"},
        {"do": "end", "figures": {"measured": True, "round_trip_us": {"p50": "1", "p99": 2}, "bandwidth": []}},
        {"do": "end", "figures": {"measured": True, "round_trip_us": {"p50": 1, "p99": float("nan")}, "bandwidth": []}},
        {"do": "end"},
    ],
)
def test_orders_that_make_no_sense_are_refused(order):
    wire, theirs = wire_pair()
    with theirs:
        other = rendezvous.Wire(theirs, 1.0)
        other.send(order)
        with pytest.raises(TransportError, match="install the same release"):
            peer._follow("tcp", wire, None, None)  # type: ignore[arg-type]  nothing of it may be used
    wire.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bind", "127.0.0.1"], "--bind says where --serve listens"),
        (["--serve", "--ranks", "2"], "--ranks is about this node alone"),
        (["--peer", "nowhere"], "is not an address"),
        (["--serve", "--config", "/nowhere.json"], "/nowhere.json"),
        (["--serve", "--bind", "192.0.2.1"], "cannot listen on"),
    ],
)
def test_wrong_options(options, words, capsys, monkeypatch):
    monkeypatch.setenv("ADAPTRA_SECRET", SECRET)
    assert main(["doctor", *options]) == 2
    assert words in capsys.readouterr().err


def test_short_secrets_are_refused(monkeypatch):
    monkeypatch.setenv("ADAPTRA_SECRET", "short")
    with pytest.raises(ConfigError, match="ADAPTRA_SECRET has 5 bytes"):
        rendezvous.known_secret()
    monkeypatch.delenv("ADAPTRA_SECRET")
    monkeypatch.setattr(sys, "stdin", StringIO("\n"))
    with pytest.raises(ConfigError, match="first line of stdin"):
        rendezvous.ask_secret()


def test_the_table_fits_80_columns_and_failures_exit_with_1():
    found = [
        Figures("shm", p50_us=12.3, p99_us=45678.9, speeds=(Speed(1, 12.345, 0.0123), Speed(16, 23.4, 1.0))),
        Figures("rdma", "no device"),
        Figures("tcp", "it broke", failed=True),
    ]
    text = meet.as_text("n0", "n1", found, Console(file=StringIO(), width=80))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"shm +12 +45679 +12.3 +0.0123 +23.4 +1", text)
    assert "rdma not available: no device" in text
    assert "tcp failed: it broke" in text
    assert found[0].seen_from_there().speeds[0] == Speed(1, 0.0123, 12.345)
