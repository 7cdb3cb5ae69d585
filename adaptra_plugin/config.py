"""The one typed configuration: the `"adaptra"` block of the host's JSON configuration.

Unknown keys and out-of-range values are refused with one line per mistake that names the key, the value and what is
allowed (`ConfigError`). Types are strict (no `"off"` for false, no `true` for 1), but a whole number may stand for a
fraction. What two keys must fulfil together is checked on one of them, so that it is reported beside other mistakes.
Times are milliseconds where a name ends in `_ms`, seconds where it ends in `_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from adaptra_plugin.errors import ConfigError
from adaptra_plugin.schedule.names import SCHEDULES

NonNegative = Annotated[float, Field(ge=0)]
if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[tuple(name for name, entry in SCHEDULES.items() if entry.for_jobs)]


class _Block(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TlsConfig(_Block):
    """Files (PEM) of one rank, each with its path on that rank's host."""

    certificate: str = Field(min_length=1)
    """The rank's certificate, with the intermediate certificates up to the authority, if any."""
    key: str = Field(min_length=1)
    """The rank's private key, not encrypted. Nobody else should be able to read it."""
    authority: str = Field(min_length=1)
    """Certificate of the authority that has signed all ranks' certificates. Every holder of such a certificate may try to connect."""


class TransportConfig(_Block):
    """How activations and gradients travel between stages."""

    rail: Literal["auto", "shm", "rdma", "tcp"] = "auto"
    """Which kind of rail carries the bytes. `auto` takes the best one that both ends have."""
    proxy: Literal["process", "thread"] = "process"
    """What moves the bytes: a process of its own per rank, or a thread of the training process."""
    direct: bool = True
    """Ranks of one host tell each other of messages in shared memory themselves, past their proxies. Not over a link to which
    `simulate` does something."""
    connections_per_direction: int = Field(2, ge=1, le=16)
    """Lanes per link for activations, and as many for gradients. Each has staging rings and a TCP connection of its own."""
    ring_mib: Literal["auto"] | int = "auto"
    """Size of the staging ring of each lane, at each end (MiB). `auto`: 64, or four times the longest message so far if that
    is more, at most `ring_max_mib`. Memory is taken as it is needed. A full ring blocks the producer."""
    ring_max_mib: int = Field(1024, ge=1, le=65536)
    """Largest size of a ring that grows (`ring_mib` is `auto`, MiB). A longer message is refused."""
    segment_kib: int = Field(1024, ge=64, le=65536)
    """A message travels in segments of this size (KiB), so that several rails can carry it."""
    deadline_s: float = Field(300.0, gt=0, le=86400)
    """Longest wait for one transfer. After it the rank ends with an error that names the peer."""
    connect_deadline_s: Literal["auto"] | float = "auto"
    """Longest wait at the start for the other ranks to come, and then for them to connect. `auto`: ranks may come as late as
    the process group's timeout allows, and then have 120 s to connect."""
    handshake_timeout_s: float = Field(5.0, gt=0, le=600)
    """Longest time a new connection may take to prove knowledge of the job's secret."""
    reconnect_s: float = Field(5.0, gt=0, le=3600)
    """A peer is lost when no rail to it could be restored within this time."""
    bind: str = "auto"
    """Address to listen on. `auto`: the local address that routes to the launcher's master address. If that is loopback, the
    one that routes to the ranks of other hosts."""
    interfaces: Annotated[tuple[str, ...], Field(strict=False)] = ()  # JSON has lists only
    """More addresses, or names of interfaces, to listen on. Each is one more TCP rail."""
    rdma_devices: Literal["auto"] | tuple[str, ...] = "auto"
    """RDMA devices to use. `auto`: all that work. An empty list: none."""
    checksum: Literal["auto", "on", "off"] = "auto"
    """Verify every segment at the receiver (xxh3). `auto`: only segments from another host."""
    max_message_mib: int = Field(4096, ge=1, le=1 << 20)
    """Largest accepted message (MiB). A frame with a longer length is refused before memory is touched."""
    warn_full_after_ms: NonNegative = 100.0
    """A producer that a full ring blocks for longer than this is logged."""
    spin_us: Literal["auto"] | int = "auto"
    """How long a thread that waits for a transfer polls before it sleeps. `auto`: 20, or 0 if it has at most 4 CPUs."""
    cpus: Literal["auto"] | tuple[int, ...] | None = "auto"
    """CPUs for the proxy. `auto`: those of the training thread's NUMA node, less its own if it is pinned to one. null: any."""
    nice: int = Field(0, ge=-20, le=19)
    """Niceness of the proxy process."""
    tls: TlsConfig | None = None
    """Encrypt TCP, with certificates of the job's own authority at both ends. null: off."""

    @field_validator("tls")
    @classmethod
    def _encrypts(cls, value: TlsConfig | None, info: ValidationInfo) -> TlsConfig | None:
        if value is not None and info.data.get("rail") == "rdma":
            raise ValueError(
                "rail is 'rdma', which does not encrypt; with rail 'auto' or 'tcp', TCP is used between hosts"
            )
        return value

    @property
    def ring_bytes(self) -> int:
        """Size of a ring that does not grow, and what one that does may grow to."""
        return (self.ring_max_mib if self.ring_mib == "auto" else self.ring_mib) << 20

    @property
    def ring_grows(self) -> bool:
        return self.ring_mib == "auto"

    @property
    def connect_s(self) -> float:
        """Longest time for connections between ranks that are there (s)."""
        return 120.0 if self.connect_deadline_s == "auto" else self.connect_deadline_s

    @field_validator("ring_mib", "connect_deadline_s", "rdma_devices", "spin_us", "cpus", mode="before")
    @classmethod
    def _or_auto(cls, value: Any, info: ValidationInfo) -> Any:
        # before the types are looked at: a value that is none of them would be reported once for each
        value = tuple(value) if isinstance(value, list | tuple) else value
        if value == "auto" or (value is None and info.field_name == "cpus"):
            return value
        if info.field_name == "connect_deadline_s":
            if type(value) not in (int, float) or not 0 < value <= 86400:
                raise ValueError("'auto', or a number of seconds above 0, up to 86400")
            value = float(value)
        elif info.field_name == "ring_mib":
            if type(value) is not int or not 1 <= value <= 65536:
                raise ValueError("'auto', or a whole number from 1 to 65536")
        elif info.field_name == "spin_us":
            if type(value) is not int or not 0 <= value <= 10_000:
                raise ValueError("'auto', or a whole number from 0 to 10000")
        elif info.field_name == "cpus":
            if not isinstance(value, tuple) or not value or any(type(cpu) is not int or cpu < 0 for cpu in value):
                raise ValueError("'auto', a list of numbers of CPUs, or null")
        elif not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
            raise ValueError("'auto', or a list of names of devices")
        return value


class DetectorConfig(_Block):
    """When a link or a stage counts as slow, and when as healed."""

    enabled: bool = True
    """Measure, detect and replan. Off: the initial plan runs for the whole job."""
    window: int = Field(16, ge=4, le=4096)
    """Iterations of healthy history that form the baseline (median and spread)."""
    warmup_iterations: int = Field(3, ge=1, le=1000)
    """First iterations that are not used, because allocation, caches and connection start-up distort them."""
    min_history: int = Field(3, ge=2, le=4096)
    """Iterations of baseline needed before anything may be called slow."""
    confirm: int = Field(2, ge=1, le=100)
    """Consecutive iterations over the threshold before an event is raised."""
    heal: int = Field(3, ge=1, le=100)
    """Consecutive iterations under the release threshold before a link or stage counts as healed."""
    spread_factor: float = Field(6.0, ge=1, le=100)
    """Threshold over the baseline median, in robust standard deviations (1.4826 MAD)."""
    min_delay_ms: NonNegative = 2.0
    """A link is never called slow for an extra delay below this."""
    min_delay_fraction: float = Field(0.25, ge=0, le=100)
    """A link is never called slow for an extra delay below this fraction of the mean forward time of a microbatch."""
    min_slowdown: float = Field(1.25, gt=1, le=100)
    """A stage is called slow when the ratio of its share of the work to its usual share is above this."""
    release: float = Field(0.5, gt=0, lt=1)
    """A link or stage has healed below `baseline + release * (threshold - baseline)`. This hysteresis prevents flapping."""

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
    """Folder of the JSONL files, one per rank. null: no files."""
    max_file_mib: int = Field(64, ge=1, le=65536)
    """A JSONL file that reaches this size is renamed to `.jsonl.1`. It replaces the older file of that name."""
    queue_records: int = Field(4096, ge=16, le=1 << 20)
    """Records that may wait for the writer thread. Beyond this number the oldest are dropped and counted."""
    wandb: Literal["auto", "on", "off"] = "auto"
    """`auto`: use the host's W&B run if there is one. `on`: open one if there is none. `off`: never use W&B."""
    wandb_project: str = "adaptra"
    """Project of Adaptra's own W&B run (`wandb: "on"`, and the host has no run)."""
    wandb_alert_interval_s: NonNegative = 60.0
    """At most one W&B alert per link or stage within this time."""
    metrics_every: int = Field(1, ge=1, le=1_000_000)
    """Write metrics of every n-th iteration."""
    spans: bool = False
    """Also write start and end of every action (about 60 bytes each). Measured timelines are drawn from them."""


def _another_stage(value: int, info: ValidationInfo) -> int:
    if value == info.data.get("src"):
        raise ValueError(f"src is {value} too, and a link joins two different stages")
    return value


def _after_begin(value: float | None, info: ValidationInfo) -> float | None:
    name = str(info.field_name).replace("to_", "from_")
    first = info.data.get(name)
    if value is not None and first is not None and value <= first:
        raise ValueError(f"it must be greater than {name} ({first:g})")
    return value


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
    """First iteration without it again. null: until the end."""

    @field_validator("dst")
    @classmethod
    def _two_stages(cls, value: int, info: ValidationInfo) -> int:
        return _another_stage(value, info)

    @field_validator("to_iteration")
    @classmethod
    def _after_the_first(cls, value: float | None, info: ValidationInfo) -> float | None:
        return _after_begin(value, info)

    def active(self, iteration: int) -> bool:
        return self.from_iteration <= iteration and (self.to_iteration is None or iteration < self.to_iteration)


_OF_KIND: dict[str, dict[str, bool]] = {  # what a kind of fault has, and whether it needs it
    "latency": {"ms": True},
    "jitter": {"ms": True},
    "bandwidth": {"mb_per_s": True},
    "stall": {},
    "corruption": {"rate": True, "part": False},
    "death": {"rate": False},
}


class Fault(_Block):
    """A fault of the rails between two stages, in both directions. The transport's protocol has to live with it."""

    kind: Literal["latency", "jitter", "bandwidth", "stall", "corruption", "death"]
    """What happens to frames. In this order: all are late by `ms`; late by up to `ms`; limited to `mb_per_s`; held until the fault
    ends; a share `rate` is damaged; ends the connection (without `rate` no connection lasts)."""
    src: int = Field(ge=0)
    """Pipeline stage at one end."""
    dst: int = Field(ge=0)
    """Pipeline stage at the other end."""
    rail: str = Field("any", pattern=r"^(any|tcp\d*|shm|rdma\d*)$")
    """Rails with the fault: `any`, all of a kind (`tcp`, `rdma`, `shm`), or one (`tcp0`)."""
    ms: float | None = Field(None, ge=0, le=60_000, validate_default=True)
    """For latency and jitter: how late frames are."""
    mb_per_s: float | None = Field(None, gt=0, validate_default=True)
    """For bandwidth: millions of bytes per second."""
    rate: float | None = Field(None, gt=0, le=1, validate_default=True)
    """For corruption and death: the share of frames."""
    part: Literal["body", "header"] | None = Field(None, validate_default=True)
    """For corruption: the damaged part of a frame. null: the body. A damaged header ends the connection."""
    seed: int = 0
    """The same seed and the same frames give the same random faults in every run."""
    from_iteration: int = Field(0, ge=0)
    """First iteration (0-based) with the fault."""
    to_iteration: int | None = Field(None, ge=1)
    """First iteration without it again. null: until the end."""
    from_s: float = Field(0.0, ge=0)
    """Time after the start of the transport at which the fault begins."""
    to_s: float | None = Field(None, gt=0)
    """Time after the start of the transport at which the fault ends. null: never."""

    @field_validator("kind", mode="before")
    @classmethod
    def _can_be(cls, value: Any) -> Any:
        if value in ("loss", "duplication", "reordering"):
            raise ValueError(
                "no rail does that: its frames come once and in order until it stalls ('stall') or fails ('death')"
            )
        return value

    @field_validator("dst")
    @classmethod
    def _two_stages(cls, value: int, info: ValidationInfo) -> int:
        return _another_stage(value, info)

    @field_validator("ms", "mb_per_s", "rate", "part")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kind, name = info.data.get("kind"), str(info.field_name)
        known = _OF_KIND.get(str(kind))
        if known is not None and value is None and known.get(name):
            raise ValueError(f"a fault of kind {kind!r} needs it")
        if known is not None and value is not None and name not in known:
            raise ValueError(f"a fault of kind {kind!r} has {' and '.join(known) or 'none'} instead")
        return value

    @field_validator("to_iteration", "to_s")
    @classmethod
    def _ends_after_its_begin(cls, value: float | None, info: ValidationInfo) -> float | None:
        return _after_begin(value, info)


class PacedCompute(_Block):
    """Budgets per microbatch: a stage really trains, then sleeps until the budget is spent."""

    forward_ms: NonNegative
    """Budget of a forward."""
    backward_input_ms: NonNegative
    """Budget of a backward with respect to the input."""
    backward_weight_ms: NonNegative
    """Budget of a backward with respect to the weights. An unsplit backward takes both budgets."""


class SimulateConfig(_Block):
    """Faults and paced compute for demonstrations and tests. Leave it out in production."""

    links: Annotated[tuple[SlowLink, ...], Field(strict=False)] = ()  # JSON has lists only
    """Links made slow."""
    faults: Annotated[tuple[Fault, ...], Field(strict=False)] = ()
    """Faults of rails: latency, jitter, bandwidth, stall, corruption, death."""
    compute: PacedCompute | None = None
    """Paced compute, for machines that cannot run all stages at full speed at once."""


class AdaptraConfig(_Block):
    """The `"adaptra"` block."""

    enabled: bool = True
    """Off: the host behaves exactly as without the plug-in."""
    schedule: ScheduleName = "slack-adaptive"
    """Which schedule to run; only `slack-adaptive` replans."""
    split_backward: bool = True
    """Run the backward of linear layers in two parts (input first, weights when there is time)."""
    max_activations: int | tuple[int, ...] | None = None
    """Microbatches a stage may hold between the start of its forward and the end of its weight gradients: one number for
    all stages, or a list with one per stage. null: no limit but the number of microbatches."""
    refine_s: float = Field(10.0, ge=0, le=3600)
    """Time for the exact solver (CP-SAT) to improve a running plan that is not proven within 0.5 % of the optimum. It is a
    process of its own on rank 0's host, at the lowest priority. 0, or no OR-tools installed: off."""
    coordinator: Literal["auto", "thread", "process"] = "auto"
    """Where rank 0 judges the reports of all ranks and plans. `thread`: in its training process. `process`: in a process of its
    own beside it. `auto`: a process in jobs of more than 32 ranks."""
    peer_exit_grace_s: float = Field(30.0, gt=0, le=3600)
    """After the loss of a peer, a rank that is stuck outside Adaptra (in a collective, say) is ended after this time."""
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
