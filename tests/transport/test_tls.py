"""`transport.tls` from the configuration to the peers."""

import time
from types import SimpleNamespace

import pytest
import torch

from adaptra_plugin.config import TlsConfig, parse_config
from adaptra_plugin.errors import ConfigError, HandshakeError, TransportError
from adaptra_plugin.transport.proxy.loop import Loop
from adaptra_plugin.transport.proxy.peer import Neighbour, Peer
from adaptra_plugin.transport.proxy.rails.registry import FACTORIES
from adaptra_plugin.transport.proxy.settings import ProxySettings
from adaptra_plugin.transport.types import Address, EndpointInfo, PeerInfo
from tests.transport.proxy import certificates

from .support import activation, config, connect_line, endpoint, everywhere, gradient, proxy_settings

BLOCK = {"certificate": "a", "key": "b", "authority": "c"}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    job, other = certificates.authority(folder), certificates.authority(folder, "other")
    return [certificates.certificate(folder, f"rank{rank}", job) for rank in range(2)] + [
        certificates.certificate(folder, "stranger", other)
    ]


@pytest.fixture
def start():
    made = []

    def begin(rank, block, **changes):
        tls = None if block is None else TlsConfig(**block)
        made.append(endpoint(rank, config(rail="tcp", tls=tls, **changes)))
        return made[-1]

    yield begin
    everywhere(*(e.close for e in made))


@pytest.mark.parametrize("proxy", ["thread", "process"])
def test_transfers_over_tls(start, blocks, proxy):
    first, second = (start(rank, blocks[rank], proxy=proxy) for rank in (0, 1))
    assert connect_line([first, second]) == [None, None]
    for number in range(6):
        x = torch.randn(10 ** (number % 6) + 1)
        first.channel(1).send(activation(number), [x])
        assert torch.equal(second.channel(0).recv(activation(number)).wait().tensors[0], x)
        second.channel(0).send(gradient(number), [x])
        assert torch.equal(first.channel(1).recv(gradient(number)).wait().tensors[0], x)


@pytest.mark.parametrize(
    ("mine", "reason"),
    [(None, "adaptra.transport.tls is not set here|where TLS begins"), (2, "certificate")],
    ids=["one end only", "another authority"],
)
def test_ranks_that_do_not_fit_together_say_so_within_the_handshake_timeout(start, blocks, mine, reason):
    first, second = start(0, blocks[0]), start(1, None if mine is None else blocks[mine])
    began = time.monotonic()
    with pytest.raises(HandshakeError, match=reason):
        # the coordinator is dialled, and hears of it in its log
        second.connect({e.me.rank: (e.me, e.endpoint_info) for e in (first, second)}, neighbours=[0], coordinator=0)
    assert time.monotonic() - began < 5


def test_a_rank_whose_files_cannot_be_used_does_not_start(blocks, tmp_path):
    block = TlsConfig(**{**blocks[0], "key": str(tmp_path / "none")})
    with pytest.raises(TransportError, match=r"adaptra\.transport\.tls\.key: .*none cannot be read"):
        endpoint(0, config(tls=block))


def test_the_configuration_wants_three_files_and_no_rdma_beside_them():
    found = parse_config({"transport": {"tls": BLOCK}}).transport
    assert found.tls == TlsConfig(**BLOCK) and parse_config({}).transport.tls is None
    assert ProxySettings.of(found.model_dump(mode="json")).tls == BLOCK
    for block, reason in (
        ({"rail": "rdma", "tls": BLOCK}, r"adaptra\.transport\.tls: .*rail is 'rdma', which does not encrypt"),
        ({"tls": {"certificate": "a", "key": "b"}}, r"adaptra\.transport\.tls\.authority: missing"),
        ({"tls": {**BLOCK, "key": ""}}, r"adaptra\.transport\.tls\.key: '' is not allowed"),
        ({"tls": {**BLOCK, "ca": "c"}}, r"adaptra\.transport\.tls\.ca: unknown key"),
    ):
        with pytest.raises(ConfigError, match=reason):
            parse_config({"transport": block})


@pytest.mark.parametrize(("tls", "boot", "skipped"), [(True, "x", True), (True, "b", False), (False, "x", False)])
def test_rdma_is_not_used_between_hosts_and_the_reason_is_reported(tls, boot, skipped):
    def endpoint_info(name):
        return EndpointInfo((Address("127.0.0.1", 1),), 1 << 20, 2, boot=name, unix="u")

    loop = Loop()
    try:
        owner = SimpleNamespace(
            settings=proxy_settings(),
            endpoint_info=endpoint_info("b"),
            loop=loop,
            tls=object() if tls else None,
            factories=[make() for make in FACTORIES],
        )
        peer = Peer(owner, PeerInfo(1, 1, "h"), endpoint_info(boot), Neighbour({}, 1), dials=False)
        why = peer.skipped.get("rdma", "")
        assert ("adaptra.transport.tls is set, and RDMA does not encrypt" in why) == skipped
    finally:
        loop.close()
