"""Cases of `benchmarks.fuzz` with what travels packed in control messages: reports and plans."""

from __future__ import annotations

import random
import zlib

from adaptra_plugin.detect import IterationReport, LinkDelay, StageTimes
from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule import packing
from adaptra_plugin.schedule.planner import plan
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile
from adaptra_plugin.schedule.schedule import Schedule
from benchmarks.fuzz_inputs import mutated

_TIMES, _LINKS = StageTimes(10.0, 10.0, 6.0), (LinkDelay(0, 1, 0.4, 8, 4096.0), LinkDelay(2, 1, 0.4, 8, 4096.0))
_REPORT = IterationReport(0, 1, 1, "node-1", 7, 8, 300.0, 2, (_TIMES,), _LINKS, 20.0, 270.0).to_bytes()
_PROFILE = Profile(5, (StageProfile(1.0, 1.0, 0.5),) * 3, (LinkProfile(0, 1, 3.0),))
_PLAN = packing.pack(_PROFILE, plan(_PROFILE, schedule="1f1b"))
_BODY = zlib.decompress(_PLAN[1:])
_ACTIONS = 5 * 3 * 2


def report(rng: random.Random) -> str:
    """A report is refused with a ValueError of a line, or is one that has the same bytes."""
    raw = mutated(rng, _REPORT)
    try:
        found = IterationReport.from_bytes(raw)
    except ValueError as error:
        assert len(str(error)) < 400, f"the reason has {len(str(error))} characters"
        return "refused"
    assert found.to_bytes() == raw
    return "taken"


def packed_plan(rng: random.Random) -> str:
    """A plan is refused with a PlanError, or its schedule keeps every rule. Damaged before or after it is compressed."""
    which = rng.random()
    if which < 0.7:
        body = _swapped(rng) if which < 0.3 else mutated(rng, _BODY)
        raw = bytes([packing.VERSION]) + zlib.compress(body, 1)
    else:
        raw = mutated(rng, _PLAN)
    try:
        _, found = packing.unpack(raw)
    except PlanError:
        return "refused"
    assert Schedule.from_text(found.schedule.to_text()) == found.schedule
    return "taken"


def _swapped(rng: random.Random) -> bytes:
    """Two neighbouring actions change places, which may break a rule or none."""
    body = bytearray(_BODY)
    at = rng.randrange(len(body) - _ACTIONS, len(body) - 1)
    body[at], body[at + 1] = body[at + 1], body[at]
    return bytes(body)
