"""Plans in a compact binary form, for the other ranks of a job: packed once, read and checked in a few milliseconds.

    version (1 byte) | zlib of: length of the header (4 bytes, little-endian) | header (JSON) | actions

The header holds the profile, what is known of the plan, the rank of each stage, and how many actions each rank has. An action is
one byte, ``chunk * 4 + kind code``; chunks are the stages of a rank in ascending order. Microbatches are not written: each kind
comes in their order on every stage.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptra_plugin.errors import PlanError
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.profile import MOST_ACTIONS, Profile
from adaptra_plugin.schedule.schedule import B, F, I, Schedule, W, occurrence

VERSION = 1
MOST_CHUNKS = 64
"""Stages of a rank: more do not fit into a byte beside the kind."""
_MOST_HEADER = 4 << 20
_LENGTH_BYTES = 4


@dataclass(frozen=True)
class PackedPlan:
    """A profile and the plan made from it, with their form on the wire."""

    profile: Profile
    plan: Plan

    @cached_property
    def text(self) -> str:
        """Base64 of the binary form; made once. Raises PlanError for more than `MOST_CHUNKS` stages on a rank."""
        return base64.b64encode(pack(self.profile, self.plan)).decode()

    @classmethod
    def from_text(cls, text: object) -> PackedPlan:
        """The inverse of `text`. Raises PlanError for anything else."""
        if not isinstance(text, str):
            raise PlanError(f"a packed plan is a {type(text).__name__}: expected base64")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise PlanError(f"a packed plan of {len(text)} characters is not base64: {error}") from None
        found = cls(*unpack(data))
        found.__dict__["text"] = text  # what is passed on needs no other one
        return found


def pack(profile: Profile, plan: Plan) -> bytes:
    """The binary form. Raises PlanError for more than `MOST_CHUNKS` stages on a rank."""
    schedule = plan.schedule
    offsets, actions = schedule.table
    places = np.array(schedule.stage_rank, np.int64)
    chunks = occurrence(places)
    if chunks.max() >= MOST_CHUNKS:
        raise PlanError(
            f"a plan with {chunks.max() + 1} stages on a rank: at most {MOST_CHUNKS} can be sent to other ranks"
        )
    header = json.dumps(
        {
            "profile": profile.to_json(),
            "plan": plan.facts(),
            "stage_rank": places.tolist(),
            "actions": np.diff(offsets).tolist(),
        },
        separators=(",", ":"),
    ).encode()
    codes = (chunks[actions[:, 0]] * 4 + actions[:, 1]).astype(np.uint8)
    body = len(header).to_bytes(_LENGTH_BYTES, "little") + header + codes.tobytes()
    return bytes([VERSION]) + zlib.compress(body, 6)


def unpack(data: bytes) -> tuple[Profile, Plan]:
    """The inverse of `pack`. Raises PlanError for anything else, and for schedules that break a rule."""
    header, codes = _parts(data)
    places, counts = (_numbers(header, name) for name in ("stage_rank", "actions"))
    if counts.sum() != len(codes) or not len(codes):
        raise PlanError(f"a packed plan announces {counts.sum()} actions and has {len(codes)}")
    if not len(places) or places.max() >= len(counts):
        raise PlanError(
            f"a packed plan puts {len(places)} stages on ranks up to {places.max(initial=-1)} of {len(counts)}"
        )
    schedule = Schedule.from_table(np.concatenate([[0], np.cumsum(counts)]), _actions(places, counts, codes))
    return Profile.from_json(header["profile"]), Plan.of(schedule, header["plan"])


def _parts(data: bytes) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Header and actions."""
    if data[:1] != bytes([VERSION]):
        raise PlanError(f"a packed plan starts with {data[:1].hex() or 'nothing'} instead of {VERSION:02x}")
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(data[1:], MOST_ACTIONS + _MOST_HEADER)
    except zlib.error as error:
        raise PlanError(f"a packed plan of {len(data)} bytes cannot be unpacked: {error}") from None
    if not inflate.eof or inflate.unused_data:
        raise PlanError(f"a packed plan of {len(data)} bytes is cut, has an appendix, or is too large")
    end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
    if not _LENGTH_BYTES <= end <= min(len(body), _MOST_HEADER):
        raise PlanError(f"a packed plan of {len(body)} bytes announces a header that ends at {end}")
    try:
        header = json.loads(body[_LENGTH_BYTES:end])
    except (ValueError, RecursionError) as error:
        raise PlanError(f"the header of a packed plan is not JSON: {error}") from None
    names = {"profile", "plan", "stage_rank", "actions"}
    if not isinstance(header, dict) or set(header) != names:
        raise PlanError(f"the header of a packed plan is not an object with {', '.join(sorted(names))}")
    return header, np.frombuffer(body, np.uint8, offset=end)


def _numbers(header: dict[str, Any], name: str) -> NDArray[np.int64]:
    values = header[name]
    right = isinstance(values, list) and all(type(value) is int and 0 <= value <= MOST_ACTIONS for value in values)
    if not right or len(values) > MOST_ACTIONS:
        raise PlanError(f"{name} of a packed plan is no list of numbers from 0 to {MOST_ACTIONS}")
    return np.array(values, np.int64)


def _actions(places: NDArray[np.int64], counts: NDArray[np.int64], codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Actions ``[n, 3]``: stage, kind code, microbatch."""
    # stages in the order of their ranks: those of a rank are neighbours there
    order = np.argsort(places, kind="stable")
    held = np.bincount(places, minlength=len(counts))
    rank, chunk, kind = np.repeat(np.arange(len(counts)), counts), codes >> 2, codes & 3
    if (chunk >= held[rank]).any():
        wrong = int(np.argmax(chunk >= held[rank]))
        raise PlanError(
            f"a packed plan has chunk {chunk[wrong]} on rank {rank[wrong]}, which holds {held[rank[wrong]]} stages"
        )
    stage = order[(np.cumsum(held) - held)[rank] + chunk]
    microbatch = np.empty(len(codes), np.int64)
    for first, second in ((W, B), (I, B), (F, F)):  # B is both parts of a backward, and named by the second pass
        those = np.flatnonzero((kind == first) | (kind == second))
        microbatch[those] = occurrence(stage[those])
    return np.stack([stage, kind.astype(np.int64), microbatch], axis=1)
