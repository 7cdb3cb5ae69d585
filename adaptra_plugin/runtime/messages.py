"""Control messages between ranks: a model for each type, read once where they arrive.

What does not fit is refused with a sentence and does nothing. What takes the job's pipelines to judge is checked by the
functions below, by those who have them.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from adaptra_plugin.detect import IterationReport
from adaptra_plugin.errors import PlanError
from adaptra_plugin.report import StragglerEvent
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule.packing import PackedPlan
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.transport import PeerInfo

AHEAD = 16
"""Iterations that a rank may be ahead of rank 0. Ranks wait for each other in every iteration, so more is garbage, which
would put off every new plan until then."""
_MOST = 1 << 53


def _reader(cls: type, read: Callable[[Any], Any]) -> PlainValidator:
    """Reads a field that has its own JSON form; whatever is wrong with it is a reason to refuse the message."""

    def validate(value: Any) -> Any:
        try:
            return value if isinstance(value, cls) else read(value)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    return PlainValidator(validate)


def _numbered(metrics: dict[str, Any]) -> dict[str, Any]:
    if type(metrics.get("iteration")) is not int:
        raise ValueError(f"pipeline: {metrics.get('iteration')!r:.80} is no iteration")
    return metrics


_WRITER = PlainSerializer(lambda value: value.to_json())
_Event = Annotated[StragglerEvent, _reader(StragglerEvent, StragglerEvent.from_json), _WRITER]
_PackedPlan = Annotated[
    PackedPlan, _reader(PackedPlan, PackedPlan.from_text), PlainSerializer(lambda packed: packed.text)
]
_Overview = Annotated[dict[str, Any], AfterValidator(_numbered)]
# pydantic refuses what is not UTF-8, such as a file's name in the text of an error
_Text = Annotated[
    str,
    BeforeValidator(lambda text: text.encode(errors="backslashreplace").decode() if isinstance(text, str) else text),
]
_Count = Annotated[int, Field(ge=0, le=_MOST)]


class _Base(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    by_coordinator: ClassVar[bool] = False
    """Nobody else may send it."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the `type`."""
        return self.model_dump()


class Report(_Base):
    """To the coordinator: what a rank has measured in one iteration."""

    type: Literal["report"] = "report"
    packed: str
    """Base64 of the report's binary form. It is read where it is judged, not on the control thread."""

    @classmethod
    def of(cls, report: IterationReport) -> Report:
        """Raises ValueError for a report that has no form on the wire."""
        return cls(packed=base64.b64encode(report.to_bytes()).decode())

    def unpack(self) -> IterationReport:
        """Raises ValueError, with a sentence, for what is no report."""
        try:
            data = base64.b64decode(self.packed, validate=True)
        except ValueError as error:
            raise ValueError(f"report: {self.packed!r:.80} is not base64: {error}") from None
        return IterationReport.from_bytes(data)


class Rail(_Base):
    """To the coordinator: a rail of a link is lost, or works again."""

    type: Literal["rail"] = "rail"
    event: _Event


class Show(_Base):
    """To the rank with the W&B run: an event, or the overview of an iteration."""

    by_coordinator = True
    type: Literal["show"] = "show"
    event: _Event | None = None
    pipeline: _Overview | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Show:
        if self.event is None and self.pipeline is None:
            raise ValueError("neither an event nor the overview of an iteration")
        return self


class Lost(_Base):
    """A rank is gone."""

    type: Literal["lost"] = "lost"
    rank: _Count
    host: _Text
    why: _Text


class Departed(_Base):
    """A rank has left a schedule."""

    type: Literal["departed"] = "departed"
    rank: _Count
    pp_rank: _Count
    host: _Text
    step_id: int
    """Number of that schedule."""
    final: bool
    """It takes part in none after it."""
    broken: bool
    """By an error, so that what it has left cannot be of use to anybody."""
    why: _Text

    @property
    def peer(self) -> PeerInfo:
        return PeerInfo(self.rank, self.pp_rank, self.host)

    def concerns(self, step_id: int) -> bool:
        return step_id == self.step_id or (self.final and step_id > self.step_id)


class Prepare(_Base):
    """From the coordinator: a plan to switch to, which nobody runs before it is committed."""

    by_coordinator = True
    type: Literal["prepare"] = "prepare"
    version: int = Field(ge=1, le=_MOST)
    """Increases with every plan that is prepared."""
    first_iteration: _Count
    """The first iteration to run it."""
    packed: _PackedPlan
    """The plan, for `profile.microbatches`, and what it is made from."""

    @property
    def profile(self) -> Profile:
        """Plans for other numbers of microbatches are computed from it, the same on every rank."""
        return self.packed.profile

    @property
    def plan(self) -> Plan:
        return self.packed.plan


class Vote(_Base):
    """To the coordinator: whether a rank can run a prepared plan from its first iteration on."""

    type: Literal["vote"] = "vote"
    version: _Count
    ok: bool
    begun: int = Field(ge=-1, le=_MOST)
    """The newest iteration that has begun there."""


class Commit(_Base):
    """From the coordinator: every rank runs the prepared plan."""

    by_coordinator = True
    type: Literal["commit"] = "commit"
    version: _Count


class Abort(_Base):
    """From the coordinator: no rank runs the prepared plan."""

    by_coordinator = True
    type: Literal["abort"] = "abort"
    version: _Count


Message = Report | Rail | Show | Lost | Departed | Prepare | Vote | Commit | Abort
_KINDS: dict[str, type[Message]] = {kind.model_fields["type"].default: kind for kind in get_args(Message)}
_MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


@dataclass(frozen=True)
class Refused:
    """A message that makes no sense.

    Attributes:
        type: what it says it is.
        kind: the model of that type; None: there is none.
        why: a sentence.
        version: of the plan that it is about, if it has a sensible one.
    """

    type: Any
    kind: type[Message] | None
    why: str
    version: int | None = None


def read(data: Any) -> Message | Refused:
    """A message as another rank has sent it. Never raises."""
    try:
        return _MESSAGES.validate_python(data)
    except ValidationError as error:
        fields = data if isinstance(data, dict) else {}
        version = fields.get("version")
        known = version if type(version) is int and version > 0 else None
        text = fields.get("type")
        kind = _KINDS.get(text) if isinstance(text, str) else None
        return Refused(text, kind, _sentence(error), known)


_WORDS = {
    "missing": "is missing",
    "int_type": "is not a whole number",
    "bool_type": "is neither true nor false",
    "string_type": "is not a text",
    "dict_type": "is not an object",
}


def _sentence(error: ValidationError) -> str:
    """The first mistake: the field, its value, what is allowed."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return "ignored, its type is unknown"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    message = first["msg"].replace("Input should be", "is not", 1)
    value = "it" if first["type"] == "missing" else f"{first['input']!r:.80}"
    return f"{first['loc'][1]}: {value} {_WORDS.get(first['type'], message)}"


def peer_of(message: Lost | Departed, topology: Topology) -> PeerInfo:
    """Which rank is gone. Raises ValueError if it is none of the job."""
    _check_range("rank", message.rank, 0, topology.world_size - 1)
    return PeerInfo(message.rank, topology.place(message.rank)[1], message.host)


def check_vote(vote: Vote, begun: int) -> None:
    """Raises ValueError for one from the far future. `begun`: the newest iteration that has begun on this rank."""
    _check_range("begun", vote.begun, -1, begun + AHEAD)


def check_plan(prepared: Prepare, topology: Topology) -> None:
    """Raises PlanError for a plan that the job's pipelines cannot run."""
    profile, schedule = prepared.profile, prepared.plan.schedule
    here = (topology.length, topology.chunks)
    if (profile.ranks, profile.virtual_stages) != here or schedule.length != topology.length:
        raise PlanError(
            f"a plan for {schedule.length} ranks from a profile of {profile.ranks} with {profile.virtual_stages} "
            f"chunks: the pipelines have {topology.length} ranks with {topology.chunks}"
        )
    placed = tuple(stage % topology.length for stage in range(topology.stages))
    if schedule.stage_rank != placed or schedule.microbatches != profile.microbatches:
        raise PlanError(
            f"a plan of {schedule.microbatches} microbatches with stages on ranks {schedule.stage_rank}: "
            f"expected {profile.microbatches}, on {placed}"
        )


def check_report(report: IterationReport, sender: int, topology: Topology, begun: int) -> None:
    """A rank reports about itself, its stages, and the links into it.

    Args:
        begun: the newest iteration that has begun on this rank.

    Raises:
        ValueError: it is about something else.
    """
    place = topology.place(sender)
    if (report.rank, report.replica, report.pp_rank) != (sender, *place):
        raise ValueError(
            f"it is about rank {report.rank}, replica {report.replica}, stage {report.pp_rank}; its sender is rank {sender}, "
            f"replica {place[0]}, stage {place[1]}"
        )
    if len(report.chunks) != topology.chunks:
        raise ValueError(f"{len(report.chunks)} model chunks: a rank has {topology.chunks}")
    for link in report.links:
        if not topology.has_link(link.src, link.dst):
            raise ValueError(f"{link.src} -> {link.dst} is no link between neighbours of {topology.length} stages")
    if len({link.src for link in report.links}) < len(report.links):
        raise ValueError("a link is listed twice")
    if report.iteration > begun + AHEAD:
        raise ValueError(f"iteration {report.iteration}: rank 0 is in iteration {begun}")


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: {value!r:.80} is not a whole number from {least} to {most}")
