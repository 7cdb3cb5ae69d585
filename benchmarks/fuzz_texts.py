"""Cases of `benchmarks.fuzz` with JSON: infos of endpoints, and the bridge between an endpoint and its proxy."""

from __future__ import annotations

import array
import json
import random
import socket
from collections import deque
from typing import Any

from adaptra_plugin.errors import TransportError
from adaptra_plugin.transport import bridge
from adaptra_plugin.transport.proxy.handshake_connection import _socket_towards
from adaptra_plugin.transport.types import PROTOCOL, Address, EndpointInfo
from benchmarks.fuzz_inputs import TEXTS, mutated, number, odd_json, odd_value

_ENDPOINT_INFO: dict[str, Any] = {
    "addresses": ["127.0.0.1:4000", "[::1]:4001"],
    "ring_bytes": 1 << 20,
    "connections": 2,
    "boot": "b",
    "unix": "u",
    "rdma": [{"device": "mlx5_0", "port": 1}],
    "protocol": PROTOCOL,
}
_ADDRESSES = ("1.2.3.4:5", "[::1]:1", "a:b", ":", "[]:1", "x:" + "1" * 5000, "x:١٢", "\0:1", "a b:1", "é:1", "\ud800:1")


def endpoint_info(rng: random.Random) -> str:
    """A card is refused with a TransportError, or every address in it can be dialled, or fails to be, with an OSError."""
    if rng.random() < 0.5:
        changed = dict(_ENDPOINT_INFO)
        changed[rng.choice(list(_ENDPOINT_INFO))] = odd_value(rng)
        if rng.random() < 0.4:
            changed["addresses"] = [rng.choice((*_ADDRESSES, *TEXTS)) + rng.choice(("", ":1")) for _ in range(3)]
        try:
            text = json.dumps(changed)
        except RecursionError:
            return "none"
    else:
        text = odd_json(rng, _ENDPOINT_INFO).decode("utf-8", "replace")
    try:
        found = EndpointInfo.parse(text)
    except TransportError as error:
        assert len(str(error)) < 1000, f"the reason has {len(str(error))} characters"
        return "refused"
    assert EndpointInfo.parse(found.to_text()) == found
    targets: tuple[Address | str, ...] = (*found.addresses[:3], found.unix)
    for target in targets:
        try:
            _socket_towards(target, None)[0].close()
        except OSError:
            pass
    return "taken"


class _Stream:
    """The read end of a control stream."""

    def __init__(self, parts: list[tuple[bytes, list[int]]]) -> None:
        self._parts = deque(parts)

    def recvmsg(self, limit: int, space: int, flags: int) -> tuple[bytes, list[Any], int, None]:
        if not self._parts:
            return b"", [], 0, None
        data, numbers = self._parts.popleft()
        if len(data) > limit:
            self._parts.appendleft((data[limit:], []))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers).tobytes())] if numbers else []
        return data[:limit], ancillary, 0, None


def bridge_reader(rng: random.Random) -> str:
    """The reader of control messages ends: it has everything, or says what is wrong."""
    parts = []
    for _ in range(rng.randint(1, 5)):
        count = rng.choice((0, 0, 1, 3))
        raw = bridge.encode({"op": "control", "rank": 1, "message": rng.choice(("", "x" * 3000))}, count)
        which = rng.random()
        if which < 0.2:
            raw = bridge._LENGTH.pack(number(rng, 32), number(rng, 32)) + raw[8:]
        elif which < 0.4:
            body = odd_json(rng, {"op": "stats", "id": 1})
            raw = bridge._LENGTH.pack(len(body), count) + body
        elif which < 0.6:
            raw = mutated(rng, raw)
        parts.append((raw, list(range(1000, 1000 + count))))
    reader = bridge.Reader(_Stream([part for part in parts if part[0]]))  # type: ignore[arg-type]
    messages = 0
    for _ in range(1000):
        try:
            found = reader.receive()
        except TransportError:
            return "refused"
        if found is None:
            return "taken"
        assert all(isinstance(message, dict) for message, _ in found)
        messages += len(found)
    raise AssertionError("the reader does not come to an end")
