"""A slice of the fuzzing, always the same: `python -m benchmarks.fuzz` runs a million cases and more."""

import json
import random

import pytest

from adaptra_plugin.transport import bridge, types
from adaptra_plugin.transport.proxy import handshake, inbox, link, peer, wire
from adaptra_plugin.transport.proxy.handshake import AcceptorMachine
from benchmarks import fuzz, fuzz_frames

SEED = 20
MIB = 1 << 20


def test_nothing_hostile_gets_through_or_breaks_anything():
    known = fuzz.run(SEED, 20_000)
    assert sum(sort.count for sort in known.values()) == 20_000
    for sort in known.values():
        # neither sort of outcome may be missing: then the cases would not be worth much
        assert all(count > sort.count // 100 for count in sort.outcomes.values()) and len(sort.outcomes) == 2


def test_floods_of_harmless_frames_fill_nothing():
    for kind, (peak, _) in fuzz.floods(SEED, 800).items():
        assert peak < (68 if kind == "controls" else 8) * MIB, kind


def test_a_case_is_the_same_every_time(monkeypatch):
    seen = []
    feed = AcceptorMachine.feed
    monkeypatch.setattr(AcceptorMachine, "feed", lambda self, raw: seen.append(raw) or feed(self, raw))
    fuzz.run(SEED, 20)
    first, count = list(seen), len(seen)
    fuzz.run(SEED, 20)
    assert seen[count:] == first != []


# --- the fuzzing can fail: what happens without one of the checks


@pytest.mark.parametrize(
    ("where", "name", "replacement", "reason"),
    [
        (handshake.hmac, "compare_digest", lambda one, other: True, "tampered with has passed|bytes of a stranger"),
        (handshake, "_check_turn", lambda raw, expects, *, over: None, "unpack requires a buffer"),
        (wire, "MAX_NOTE_BYTES", 1 << 40, "bytes are allocated"),
        (link, "parse_object", json.loads, "JSONDecodeError|Unicode|RecursionError|ValueError|AttributeError"),
        (types, "_is_host", bool, "UnicodeError|ValueError|UnicodeEncodeError"),
        (bridge, "_parse", json.loads, "JSONDecodeError|Unicode|RecursionError|ValueError|AssertionError"),
    ],
    ids=["macs", "lengths", "bodies", "json", "addresses", "bridge"],
)
def test_a_missing_check_is_found(monkeypatch, where, name, replacement, reason):
    monkeypatch.setattr(where, name, replacement)
    with pytest.raises(fuzz.Failure, match=rf"({reason})[^\0]*--seed {SEED} --only"):
        fuzz.run(SEED, 20_000)


@pytest.mark.parametrize(
    ("where", "name", "replacement", "kind"),
    [
        (peer, "_MAX_SKIPPED", 1 << 20, "skips"),
        (inbox.LaneInbox, "_check", lambda self, header: None, "positions"),
    ],
    ids=["skips", "positions"],
)
def test_a_missing_limit_is_found(monkeypatch, where, name, replacement, kind):
    monkeypatch.setattr(where, name, replacement)
    with pytest.raises(fuzz.Failure, match=f"flood of {kind}, seed {SEED}"):
        fuzz.floods(SEED, 2_000, [kind])


def test_a_frame_in_front_of_the_handshake_is_noticed(monkeypatch):
    acceptor = fuzz.fuzz_handshake.ListenerCase()
    try:
        monkeypatch.setattr(acceptor, "_stranger", lambda rng: acceptor._genuine() or False)
        with pytest.raises(AssertionError, match="bytes of a stranger came to the parser"):
            acceptor(random.Random(SEED))
    finally:
        acceptor._clear()
        acceptor.close()


def test_mad_frames_of_every_kind_are_among_the_cases():
    frames = fuzz_frames.Frames()
    try:
        rng = random.Random(SEED)
        kinds = {header.kind for _ in range(200) for header, _ in frames.headers(rng, by_reference=False, sent=3)}
        assert set(wire.FrameKind) <= kinds
    finally:
        frames.close()
