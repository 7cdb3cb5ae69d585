"""Plans in their binary form: the same plan comes back, and whatever else comes is refused with a sentence."""

from __future__ import annotations

import base64
import json
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule import packing
from adaptra_plugin.schedule.names import SCHEDULES
from adaptra_plugin.schedule.packing import MOST_CHUNKS, PackedPlan, pack, unpack
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.schedule import Schedule

STAGE = StageProfile(1.1, 1 / 3, 0.7, 5)
PROFILE = Profile(6, (STAGE,) * 4, (LinkProfile(1, 2, 0.1 + 0.2), LinkProfile(2, 1, 7.0, 0.5)))
CHUNKS = Profile(8, (StageProfile(1.0, 1.0, 1.0),) * 8, virtual_stages=2)
PACKED = pack(PROFILE, plan(PROFILE))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("profile", [PROFILE, CHUNKS])
def test_every_plan_comes_back_equal(name, profile):
    try:
        made = plan(profile, schedule=name)
    except PlanError:
        pytest.skip("not with so many stages a rank")
    found, back = unpack(pack(profile, made))
    assert found == profile and back == made and back.schedule.ranks == made.schedule.ranks
    assert (back.warmup, back.peak_activations, back.gap) == (made.warmup, made.peak_activations, made.gap)
    assert back.to_json() == made.to_json()


def test_a_schedule_with_both_kinds_of_backwards_and_stages_anywhere_comes_back():
    """The first stage and the last one on one rank; a fused backward between split ones."""
    words = [
        ["0F0", "3F0", "3I0", "3W0", "0B0", "0F1", "3F1", "3B1", "0I1", "0W1"],
        ["2F0", "2B0", "2F1", "2I1", "2W1"],
    ]
    words.append(["1F0", "1I0", "1W0", "1F1", "1B1"])
    schedule = Schedule.from_text(words)
    facts = {"schedule": "mine", "makespan_ms": 3.0, "lower_bound_ms": 2.0, "optimal": False, "gap": 0.5}
    profile = Profile(2, (StageProfile(1.0, 1.0, 1.0),) * 3)
    _, back = unpack(pack(profile, Plan.of(schedule, facts)))
    assert back.schedule.to_text() == words


def test_a_large_plan_is_small_and_its_actions_are_not_made():
    profile = Profile(512, (StageProfile(1.0, 1.0, 1.0),) * 64)
    packed = PackedPlan(profile, plan(profile, schedule="zb-h1"))
    assert len(packed.text) < 32 << 10
    back = PackedPlan.from_text(packed.text)
    assert back.plan == packed.plan and "ranks" not in vars(back.plan.schedule)


def body(header: object, codes: bytes, version: int = packing.VERSION) -> bytes:
    text = json.dumps(header).encode()
    return bytes([version]) + zlib.compress(len(text).to_bytes(4, "little") + text + codes)


HEADER = {
    "profile": Profile(1, (StageProfile(1.0, 1.0, 1.0),)).to_json(),
    "plan": {"schedule": "x", "makespan_ms": 2.0, "lower_bound_ms": 2.0, "optimal": True, "gap": 0.0},
    "stage_rank": [0],
    "actions": [2],
}
RIGHT = b"\0\3"  # F, B


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "starts with nothing instead of 01"),
        (b"\2" + PACKED[1:], "starts with 02 instead of 01"),
        (PACKED[:-3], "is cut"),
        (PACKED + b"x", "has an appendix"),
        (b"\1abc", "cannot be unpacked"),
        (b"\1" + zlib.compress(b"\xff\xff\xff\xff{}"), "announces a header that ends at 4294967299"),
        (b"\1" + zlib.compress(bytes(60 << 20)), "too large"),
        (body(HEADER, RIGHT + b"\0"), "announces 2 actions and has 3"),
        (body(HEADER | {"actions": [0]}, b""), "announces 0 actions"),
        (body(HEADER | {"actions": [2.0]}, RIGHT), "actions of a packed plan is no list of numbers"),
        (body(HEADER | {"actions": [-1, 3]}, RIGHT), "no list of numbers from 0"),
        (body(HEADER | {"stage_rank": {}}, RIGHT), "stage_rank of a packed plan is no list"),
        (body(HEADER | {"stage_rank": [1]}, RIGHT), "puts 1 stages on ranks up to 1 of 1"),
        (body(HEADER | {"stage_rank": []}, RIGHT), "puts 0 stages on ranks up to -1 of 1"),
        (body(HEADER, b"\0\7"), "chunk 1 on rank 0, which holds 1 stages"),
        (body(HEADER, b"\3\0"), "before F of the same microbatch"),
        (body(HEADER, b"\0\0"), "missing"),
        (body(HEADER | {"more": 1}, RIGHT), "is not an object with actions, plan"),
        (body([], RIGHT), "is not an object with"),
        (body(HEADER | {"plan": {}}, RIGHT), "plan lacks schedule"),
        (body(HEADER | {"plan": HEADER["plan"] | {"gap": "wide"}}, RIGHT), "plan: could not convert"),
        (body(HEADER | {"plan": []}, RIGHT), "plan is a list"),
        (body(HEADER | {"profile": []}, RIGHT), "profile is a list"),
    ],
)
def test_what_is_no_plan_is_refused(data, said):
    assert unpack(body(HEADER, RIGHT))[1].schedule.to_text() == [["0F0", "0B0"]]
    with pytest.raises(PlanError, match=said):
        unpack(data)


@pytest.mark.parametrize(("text", "said"), [(None, "a NoneType"), ("é", "is not base64"), ("AAA", "is not base64")])
def test_text_that_is_none(text, said):
    with pytest.raises(PlanError, match=said):
        PackedPlan.from_text(text)


def test_a_rank_with_too_many_stages_is_refused_by_the_sender():
    chunks = MOST_CHUNKS + 1
    schedule = Schedule.from_text([[f"{s}F0" for s in range(chunks)] + [f"{s}B0" for s in reversed(range(chunks))]])
    profile = Profile(1, (StageProfile(1.0, 1.0, 1.0),) * chunks, virtual_stages=chunks)
    with pytest.raises(PlanError, match="65 stages on a rank: at most 64"):
        pack(profile, Plan.of(schedule, HEADER["plan"]))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(data):
    """Bytes are changed before and after compression: PlanError, or a plan that keeps every rule."""
    inner = bytearray(zlib.decompress(PACKED[1:]) if data.draw(st.booleans()) else b"")
    raw = inner or bytearray(PACKED)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        _, found = unpack(bytes([packing.VERSION]) + zlib.compress(bytes(raw)) if inner else bytes(raw))
    except PlanError as error:
        assert len(str(error)) < 5000
    else:
        assert Schedule(found.schedule.ranks) == found.schedule


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=200))
def test_garbage_is_refused(raw):
    with pytest.raises(PlanError):
        unpack(raw)
    with pytest.raises(PlanError):
        PackedPlan.from_text(base64.b64encode(b"\1" + raw).decode())
