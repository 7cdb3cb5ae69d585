"""What the job asks of this node: from its configuration, or the defaults if none is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaptra_plugin.config import AdaptraConfig, parse_config
from adaptra_plugin.doctor.rows import Row, Status, gib
from adaptra_plugin.doctor.settings import load_settings
from adaptra_plugin.errors import AdaptraError
from adaptra_plugin.patches.hosts import HOSTS
from adaptra_plugin.support import Level, level_of

HOST = next(host for host in HOSTS.values() if host.has_configuration)
"""Whose configuration files are read: the first one that has the block in its own."""
NEIGHBOURS = 2
"""A stage in the middle of the pipeline: the most that a rank has."""
DIRECTIONS = 2
"""Activations and gradients have connections of their own."""
RING_BYTES = 64 << 20
"""What a staging ring that grows begins with."""
ENDS = 2
"""A lane has the ring that this rank fills, and a receive ring of the same size of the ring that the peer fills."""


@dataclass(frozen=True)
class Needs:
    """What one node must give. `ranks`: processes of the job on this node."""

    config: AdaptraConfig = field(default_factory=AdaptraConfig)
    ranks: int = 1
    host: str | None = None
    """Distribution that the configuration is of; None: no configuration was given, any host will do."""

    @property
    def ring_bytes(self) -> int:
        """One staging ring; of those that grow what they begin with."""
        transport = self.config.transport
        return min(RING_BYTES, transport.ring_bytes) if transport.ring_grows else transport.ring_bytes

    @property
    def connections(self) -> int:
        """Lanes of a rank in the middle of the pipeline; each has a ring and a receive ring at this end."""
        return self.config.transport.connections_per_direction * DIRECTIONS * NEIGHBOURS

    @property
    def rank_bytes(self) -> int:
        """All rings of one rank, those it receives into too. An upper bound: pages are touched when messages first need them."""
        return self.ring_bytes * self.connections * ENDS

    @property
    def node_bytes(self) -> int:
        return self.rank_bytes * self.ranks

    @property
    def rail(self) -> str:
        return str(self.config.transport.rail)

    @property
    def wants_rdma(self) -> bool:
        return self.rail in ("auto", "rdma") and self.rdma_devices != ()

    @property
    def rdma_devices(self) -> tuple[str, ...] | None:
        """Devices that the configuration names; None: all that work."""
        named = getattr(self.config.transport, "rdma_devices", "auto")  # a key that older configurations lack
        return None if named == "auto" else tuple(named)

    @property
    def interfaces(self) -> tuple[str, ...]:
        """Names and addresses of further interfaces that the configuration names."""
        return tuple(getattr(self.config.transport, "interfaces", ()))

    @property
    def insists_on_rdma(self) -> bool:
        return self.rail == "rdma"

    def rings(self) -> str:
        """The sum in words."""
        transport = self.config.transport
        more = f"; each grows with the messages to hold 4 of the longest one, at most {gib(transport.ring_bytes)}"
        return (
            f"up to {gib(self.rank_bytes)} a rank ({gib(self.ring_bytes)} x {transport.connections_per_direction} lanes x "
            f"{DIRECTIONS} directions x {NEIGHBOURS} neighbours, a ring and a receive ring each, touched as messages need them"
            f"{more if transport.ring_grows else ''})"
        )


def from_file(path: str) -> tuple[AdaptraConfig, Row]:
    """The `"adaptra"` block of a DeepSpeed configuration, and a row that says what is wrong with it; then the defaults stand
    in for it, so that the rest can be examined. Raises nothing."""
    check = "configuration"
    try:
        settings = load_settings(path)
        if "adaptra" not in settings:
            advice = 'add "adaptra": {"enabled": true} to it; the defaults were examined'
            return AdaptraConfig(), Row(
                check, Status.WARN, f'{path} has no "adaptra" block: the plug-in stays off', advice
            )
        config = parse_config(settings["adaptra"])
        if not config.enabled:
            found = f"{path}: valid, but the plug-in is off (adaptra.enabled is false)"
            return config, Row(check, Status.WARN, found, "set adaptra.enabled to true")
        reasons = HOST.judge(settings)
    except OSError as error:
        found = f"{path}: {error.strerror or error}"
        return AdaptraConfig(), Row(check, Status.FAIL, found, "give the file that the job is started with")
    except AdaptraError as error:
        return AdaptraConfig(), Row(
            check, Status.FAIL, f"{path}: {error}", "correct it as said; the defaults were examined"
        )
    if reasons:
        refused = level_of(reasons) is Level.REFUSED
        found = f"{path}: {'; '.join(it.why for it in reasons)}"
        advice = "; ".join(it.remedy for it in reasons)
        what = "the job will be refused" if refused else "valid, but the job keeps the stock order of microbatches"
        return config, Row(check, Status.FAIL if refused else Status.WARN, f"{what}: {found}", advice)
    count = len(config.model_fields_set | config.transport.model_fields_set)
    transport = config.transport
    found = (
        f"{path}: valid, {count} keys set; rail {transport.rail}, {transport.connections_per_direction} connections per "
        f"direction, rings of {'up to ' if transport.ring_grows else ''}{transport.ring_bytes >> 20} MiB"
    )
    return config, Row(check, Status.OKAY, found)
