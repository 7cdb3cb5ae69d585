"""The hosts' supported versions, oldest to newest: results of stock, to the bit."""

from __future__ import annotations

import pytest

from tests.compat.hosts import run

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(240)]


@pytest.mark.parametrize(
    ("host", "version"),
    [
        ("deepspeed", "0.16.9"),
        ("deepspeed", "0.18.9"),
        ("deepspeed", "0.19.8"),
        ("megatron-core", "0.14.0"),
        ("megatron-core", "0.16.1"),
        ("megatron-core", "0.19.2"),
    ],
)
def test_a_short_training(host, version):
    assert f"{host} {version}: the same to the bit" in run(host, version)
