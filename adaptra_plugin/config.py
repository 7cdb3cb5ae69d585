"""The one typed configuration: the `"adaptra"` block of the host's JSON configuration.

Unknown keys and out-of-range values are refused with one line per mistake that names the key, the value and what is
allowed (`ConfigError`). Types are strict (no `"off"` for false, no `true` for 1), but a whole number may stand for a
fraction. What two keys must fulfil together is checked on one of them, so that it is reported beside other mistakes.
Times are milliseconds where a name ends in `_ms`, seconds where it ends in `_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from adaptra_plugin.errors import ConfigError

NonNegative = Annotated[float, Field(ge=0)]


class _Block(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TransportConfig(_Block):
    """How activations and gradients travel between stages."""

    rail: Literal["auto", "tcp"] = "auto"
    """Which rail carries the bytes; `auto` takes the best that both ends have."""
    connections_per_direction: int = Field(2, ge=1, le=16)
    """Connections per link for activations, and as many for gradients."""
    ring_mib: int = Field(64, ge=1, le=65536)
    """Size of the staging ring of each connection, at each end (MiB). A full ring blocks the producer."""
    deadline_s: float = Field(300.0, gt=0, le=86400)
    """Longest wait for one transfer; past it the rank ends with an error that names the peer."""
    connect_deadline_s: float = Field(120.0, gt=0, le=86400)
    """Longest wait at start for all neighbours to be connected."""
    handshake_timeout_s: float = Field(5.0, gt=0, le=600)
    """Longest time a new connection may take to prove knowledge of the job's secret."""
    bind: str = "auto"
    """Address to listen on; `auto` is the local address that routes to the launcher's master address."""
    max_message_mib: int = Field(4096, ge=1, le=1 << 20)
    """Largest accepted message (MiB); a longer length in a frame is refused before memory is touched."""
    warn_full_after_ms: NonNegative = 100.0
    """A producer blocked by a full ring for longer than this is logged."""


class DetectorConfig(_Block):
    """When a link or a stage counts as slow, and when as healed."""

    enabled: bool = True
    """Measure, detect and replan. Off: the initial plan runs for the whole job."""
    window: int = Field(16, ge=4, le=4096)
    """Iterations of healthy history that form the baseline (median and spread)."""
    warmup_iterations: int = Field(3, ge=1, le=1000)
    """First iterations that are not used: allocation, caches and connection start-up distort them."""
    min_history: int = Field(3, ge=2, le=4096)
    """Iterations of baseline needed before anything may be called slow."""
    confirm: int = Field(2, ge=1, le=100)
    """Consecutive iterations over the threshold before an event is raised."""
    heal: int = Field(3, ge=1, le=100)
    """Consecutive iterations under the release threshold before the link counts as healed."""
    spread_factor: float = Field(6.0, ge=1, le=100)
    """Threshold over the baseline median, in robust standard deviations (1.4826 MAD)."""
    min_delay_ms: NonNegative = 2.0
    """A link is never called slow for less extra delay than this."""
    min_delay_fraction: float = Field(0.25, ge=0, le=100)
    """... nor for less than this fraction of the mean forward time of a microbatch."""
    min_slowdown: float = Field(1.25, gt=1, le=100)
    """A stage is called slow above this ratio of its compute time to its baseline."""
    release: float = Field(0.5, gt=0, lt=1)
    """Healed below `baseline + release * (threshold - baseline)`: hysteresis against flapping."""

    @field_validator("min_history")
    @classmethod
    def _can_be_reached(cls, value: int, info: ValidationInfo) -> int:
        window = info.data.get("window", value)
        if value > window:
            raise ValueError(f"it must be at most window ({window}), or it is never reached")
        return value


class ReportConfig(_Block):
    """Where events and per-iteration metrics go. Reporting never blocks and never fails training."""

    directory: str | None = "adaptra-logs"
    """Folder of the JSONL files, one per rank; null writes none."""
    max_file_mib: int = Field(64, ge=1, le=65536)
    """A JSONL file that reaches this size is rotated once (`.1`); older records go."""
    queue_records: int = Field(4096, ge=16, le=1 << 20)
    """Records waiting for the writer thread; beyond it the oldest are dropped and counted."""
    wandb: Literal["auto", "on", "off"] = "auto"
    """`auto`: use the host's W&B run if there is one. `on`: open one if there is none. `off`: never."""
    wandb_project: str = "adaptra"
    """Project of a run of our own (`wandb: "on"` without a host's run)."""
    wandb_alert_interval_s: NonNegative = 60.0
    """At most one W&B alert per link or stage within this time."""
    metrics_every: int = Field(1, ge=1, le=1_000_000)
    """Write per-iteration metrics every so many iterations."""
    spans: bool = False
    """Write start and end of every action too (about 60 bytes each): what measured timelines are drawn from."""


class SlowLink(_Block):
    """A link made slow on purpose, both directions."""

    src: int = Field(ge=0)
    """Pipeline stage at one end."""
    dst: int = Field(ge=0)
    """Pipeline stage at the other end."""
    latency_ms: NonNegative
    """Extra one-way delay of every transfer."""
    from_iteration: int = Field(0, ge=0)
    """First iteration (0-based) with the delay."""
    to_iteration: int | None = Field(None, ge=1)
    """First iteration without it again; null: until the end."""

    @field_validator("dst")
    @classmethod
    def _two_stages(cls, value: int, info: ValidationInfo) -> int:
        if value == info.data.get("src"):
            raise ValueError(f"src is {value} too, and a link joins two different stages")
        return value

    @field_validator("to_iteration")
    @classmethod
    def _after_the_first(cls, value: int | None, info: ValidationInfo) -> int | None:
        first = info.data.get("from_iteration")
        if value is not None and first is not None and value <= first:
            raise ValueError(f"it must be greater than from_iteration ({first})")
        return value

    def active(self, iteration: int) -> bool:
        return self.from_iteration <= iteration and (self.to_iteration is None or iteration < self.to_iteration)


class PacedCompute(_Block):
    """Budgets per microbatch: a stage really trains, then sleeps until the budget is spent."""

    forward_ms: NonNegative
    """Budget of a forward."""
    backward_input_ms: NonNegative
    """Budget of a backward with respect to the input."""
    backward_weight_ms: NonNegative
    """Budget of a backward with respect to the weights; an unsplit backward takes both budgets."""


class SimulateConfig(_Block):
    """Faults and paced compute for demonstrations and tests. Leave it out in production."""

    links: Annotated[tuple[SlowLink, ...], Field(strict=False)] = ()  # JSON has lists only
    """Links made slow."""
    compute: PacedCompute | None = None
    """Paced compute, for machines that cannot run all stages at full speed at once."""


class AdaptraConfig(_Block):
    """The `"adaptra"` block."""

    enabled: bool = True
    """Off: the host behaves exactly as without the plug-in."""
    schedule: Literal["slack-adaptive", "1f1b", "zb-h1"] = "slack-adaptive"
    """Which schedule to run; only `slack-adaptive` replans."""
    split_backward: bool = True
    """Run the backward of linear layers in two parts (input first, weights when there is time)."""
    max_activations: int | tuple[int, ...] | None = None
    """Microbatches a stage may hold between the start of its forward and the end of its weight gradients: one number
    for all stages or one per stage; null: no limit but the number of microbatches."""
    refine_s: float = Field(10.0, ge=0, le=3600)
    """Time for the exact solver to improve a plan that is not proven within 0.5 % of the optimum, while it runs: CP-SAT in
    a process of its own on rank 0's host, at the lowest priority. 0, or no OR-tools installed: off."""
    peer_exit_grace_s: float = Field(30.0, gt=0, le=3600)
    """After a peer is lost, a rank that is stuck outside Adaptra (in a collective, say) is ended after this time."""
    transport: TransportConfig = TransportConfig()
    detector: DetectorConfig = DetectorConfig()
    report: ReportConfig = ReportConfig()
    simulate: SimulateConfig = SimulateConfig()

    @field_validator("max_activations", mode="before")
    @classmethod
    def _limits(cls, value: Any) -> Any:
        # before the types are looked at: a value that is neither a number nor a list would be reported once for each
        limits = tuple(value) if isinstance(value, list | tuple) else value
        for limit in limits if isinstance(limits, tuple) and limits else (limits,):
            if limits is not None and (type(limit) is not int or limit < 1):
                raise ValueError("a whole number of at least 1, a list of such numbers with one per stage, or null")
        return limits


def parse_config(block: Mapping[str, Any] | bool | None) -> AdaptraConfig:
    """Validates the `"adaptra"` block (null or absent: disabled, true/false: all defaults, on or off).

    Raises:
        ConfigError: with one line per mistake.
    """
    if block is None or isinstance(block, bool):
        return AdaptraConfig(enabled=bool(block))
    if not isinstance(block, Mapping):
        raise ConfigError(f'"adaptra" is {block!r}: it must be an object such as {{"enabled": true}}')
    try:
        return AdaptraConfig.model_validate(dict(block))
    except ValidationError as error:
        lines = [_sentence(item) for item in error.errors()]
        count = f"{len(lines)} mistake" + ("s" if len(lines) > 1 else "")
        raise ConfigError(
            f'{count} in the "adaptra" configuration:\n' + "\n".join(f"  - {line}" for line in lines)
        ) from None


def _sentence(item: Any) -> str:
    """One mistake in words: the key, the value, what is allowed."""
    loc = [str(part) for part in item["loc"]]
    key = ".".join(["adaptra", *loc])
    if item["type"] == "extra_forbidden":
        known = sorted(_model_at(loc[:-1]).model_fields)
        return f"{key}: unknown key (value {item['input']!r}); allowed here: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{key}: missing; it has no default"
    if item["type"] == "model_type":
        message = f"it must be an object with some of the keys {', '.join(_model_at(loc).model_fields)}"
    else:
        message = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
        message = message[:1].lower() + message[1:]
    return f"{key}: {item['input']!r} is not allowed: {message}"


def _model_at(loc: list[str]) -> type[BaseModel]:
    model: type[BaseModel] = AdaptraConfig
    for part in loc:
        if part.isdigit():
            continue
        field = model.model_fields.get(part)
        for candidate in _models_in(field.annotation if field else None):
            model = candidate
            break
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for inner in getattr(annotation, "__args__", ()):
        found += _models_in(inner)
    return found
