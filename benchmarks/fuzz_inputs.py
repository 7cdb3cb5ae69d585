"""Hostile inputs for `benchmarks.fuzz`: mutated bytes, odd numbers, odd JSON. All of it from the generator it is given."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from adaptra_plugin.transport.proxy.wire import MAX_BODY_BYTES

NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 1 << 20, MAX_BODY_BYTES),
    *(MAX_BODY_BYTES + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 53, (1 << 63) - 64, (1 << 63) - 1),
    *(1 << 63, (1 << 63) + 64, (1 << 64) - 64, (1 << 64) - 1),
)
TIMES = (0.0, -1.0, 1e-300, 1e18, -1e18, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "\0", "shm", "tcp0", "tcp1", "rdma0", "..", "\ud800", "é", "a" * 300, "1.2.3.4", "%s%n", "\u2028", "١")
NAMES = ("closed", "skip", "why", "mapped", "open", "rank", "op", "event", "data", "a", "")
COMMON = 1 << 12
"""Most inputs stay below this length (bytes), so that a million of them take minutes."""


def number(rng: random.Random, bits: int, near: int = 0) -> int:
    """An unsigned number of so many bits: a limit, a neighbour of `near`, or anything."""
    which = rng.random()
    if which < 0.5:
        value = rng.choice(NUMBERS)
    elif which < 0.8:
        value = near + rng.choice((-64, -2, -1, 1, 2, 64, 128))
    else:
        value = rng.getrandbits(rng.randint(1, bits))
    return value % (1 << bits)


def mutated(rng: random.Random, raw: bytes, others: Sequence[bytes] = ()) -> bytes:
    """`raw` with bits flipped, a piece cut out, doubled, inserted, or exchanged for one of `others`. May be `raw` itself."""
    data = bytearray(raw)
    for _ in range(1 + (rng.random() < 0.3)):
        size = len(data)
        kind = rng.randrange(9)
        at = rng.randrange(size + 1)
        to = min(size, at + rng.choice((1, 2, 4, 8, 16, 32, 64)))
        if kind == 0 and at < size:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < size:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.getrandbits(8)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at:to]
        elif kind == 4:
            data[at:at] = data[at:to] * rng.randint(1, 8)
        elif kind == 5:
            data[at:at] = rng.randbytes(rng.randint(1, 64))
        elif kind == 6 and others:
            other = rng.choice(others)
            data[at : at + len(other)] = other[at:]
        elif kind == 7 and others:
            data[at:at] = rng.choice(others)
        else:
            data[at:to] = rng.randbytes(to - at)
    return bytes(data)


def odd_value(rng: random.Random) -> Any:
    """What a field of a JSON message is not expected to be."""
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice((None, True, False, [], {}, [[]], [{}], [None], {"": None}))
    if kind <= 3:
        return number(rng, 64) * rng.choice((1, 1, 1, -1, 1 << 64))
    if kind == 4:
        return rng.choice(TIMES)
    if kind == 5:
        return rng.choice(TEXTS) * rng.choice((1, 1, 1, 50))
    if kind == 6:
        return [rng.choice(TEXTS) for _ in range(rng.randint(0, 40))]
    if kind == 7:
        deep: Any = rng.choice(TEXTS)
        for _ in range(rng.choice((1, 10, 100, 400, 900))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    if kind == 8:
        return 10 ** rng.choice((18, 19, 100, 4000))
    return rng.choice(TEXTS)


def odd_json(rng: random.Random, model: dict[str, Any]) -> bytes:
    """JSON like `model` with something changed, or text that is none; sometimes with megabytes of nesting."""
    kind = rng.randrange(10)
    if kind <= 5:
        changed = dict(model)
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            name = rng.choice((*model, *NAMES))
            if rng.random() < 0.2:
                changed.pop(name, None)
            else:
                changed[name] = odd_value(rng)
        try:
            text = json.dumps(changed, ensure_ascii=rng.random() < 0.7)
        except RecursionError:
            return b"[" * 5000
        raw = text.encode("utf-8", "surrogatepass")
        return mutated(rng, raw) if kind == 5 else raw
    if kind == 6:
        # the longest ones seldom: they are slow, and one in a thousand is a thousand in a million
        count = rng.choice((10, 900, 1000, 5000)) if rng.random() < 0.99 else rng.choice((100_000, 1_000_000))
        return rng.choice((b"[", b'{"a":', b"[[],", b"[1,")) * count
    if kind == 7:
        return rng.choice((b'{"a":', b"")) + rng.choice((b"9", b"-1", b"0.", b"1e", b"\\u")) * rng.choice(
            (1, 2200, 5000)
        )
    if kind == 8 and rng.random() < 0.5:
        depth = rng.choice((99, 100, 101, 500, rng.randint(900, 1000)))
        return b'{"why":%s%s,"skip":"shm"}' % (b"[" * depth, b"]" * depth)
    if kind == 8:
        start = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b""))
        return start + json.dumps(model).encode(rng.choice(("utf-8", "utf-16", "utf-32")))
    return rng.randbytes(rng.randint(0, 200))
