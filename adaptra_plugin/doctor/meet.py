"""What ``adaptra doctor --serve`` and ``adaptra doctor --peer`` do with their options, and how the figures are shown."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.doctor import rendezvous
from adaptra_plugin.doctor.needs import from_file
from adaptra_plugin.doctor.peer import SIZES_MIB, WIRE_DEADLINE_S, Figures, examine_rails
from adaptra_plugin.doctor.rows import Status
from adaptra_plugin.errors import ConfigError
from adaptra_plugin.transport import Address

if TYPE_CHECKING:
    from rich.console import Console

WAIT_S = 900.0
"""How long `--serve` waits for somebody to come: an operator has to log in to the other host."""
INTERRUPTED = 130


def run_meeting(config: str | None, peer: str | None, bind: str | None, as_json: bool) -> int:
    """Measures the rails between two hosts and prints what was found.

    Args:
        config: DeepSpeed's configuration file, of which the transport block is used; None: the defaults.
        peer: where the other doctor listens (`host:port`); None: this one listens.
        bind: the address to listen on; None: the one that other hosts reach.

    Returns:
        0; 1 if no rail could be measured, or one broke meanwhile; 130 after Ctrl-C.

    Raises:
        ConfigError, TransportError: wrong options or secret, or the other doctor is not there.
    """
    transport = _transport(config)
    try:
        if peer is None:
            wire, secret = _serve(transport, bind, as_json, config)
            rank = rendezvous.SERVER
        else:
            address = Address.parse(peer)
            secret = rendezvous.ask_secret()
            wire = rendezvous.dial(transport, address, secret, deadline_s=WIRE_DEADLINE_S)
            rank = rendezvous.CLIENT
        try:
            there, found = examine_rails(wire, rank, transport, secret)
        finally:
            wire.close()
    except KeyboardInterrupt:
        print("adaptra doctor: interrupted", file=sys.stderr)
        return INTERRUPTED
    here = platform.node()
    if as_json:
        document = {"here": here, "peer": there, "rails": [figures.to_json() for figures in found]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        sys.stdout.write(as_text(here, there, found))
    return int(any(figures.failed for figures in found) or all(figures.why for figures in found))


def _transport(config: str | None) -> TransportConfig:
    if config is None:
        return TransportConfig()
    parsed, row = from_file(config)
    if row.status is Status.FAIL:
        raise ConfigError(row.found)
    return parsed.transport


def _serve(
    transport: TransportConfig, bind: str | None, as_json: bool, config: str | None
) -> tuple[rendezvous.Wire, bytes]:
    out = sys.stderr if as_json else sys.stdout  # JSON stands alone on stdout
    known = rendezvous.known_secret()
    made = "" if known else rendezvous.new_secret()
    options = " --config DS_CONFIG.json" if config is not None else ""

    def ready(address: Address) -> None:
        print(f"On the other host, run:\n    adaptra doctor --peer {address}{options}", file=out)
        if made:
            print(f"and give it this secret when it asks (or as {rendezvous.VARIABLE}):\n    {made}", file=out)
        else:
            print(f"with the same {rendezvous.VARIABLE} in its environment.", file=out)
        out.flush()

    secret = known or made.encode()
    wire = rendezvous.serve(transport, bind, secret, ready, wait_s=WAIT_S, deadline_s=WIRE_DEADLINE_S)
    return wire, secret


def as_text(here: str, there: str, found: Sequence[Figures], console: Console | None = None) -> str:
    """A table of the rails that were measured, a line for each other one."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rail")
    for title in ("round trip\np50 us", "\np99 us"):
        table.add_column(title, justify="right")
    for mib in SIZES_MIB:
        table.add_column(f"{mib} MiB, GB/s\nsent", justify="right")
        table.add_column("\nreceived", justify="right")
    for figures in found:
        if not figures.why:
            cells = [f"{figures.p50_us:.0f}", f"{figures.p99_us:.0f}"]
            for speed in figures.speeds:
                cells += [f"{speed.sent_gb_per_s:.3g}", f"{speed.received_gb_per_s:.3g}"]
            table.add_row(figures.rail, *cells)
    with console.capture() as captured:
        console.print(Text(f"{here} and {there}"))
        if table.row_count:
            console.print(table)
        for figures in found:
            if figures.why:
                style = "bold red" if figures.failed else ""
                verb = "failed" if figures.failed else "not available"
                console.print(Text(f"{figures.rail} {verb}: {figures.why}", style=style), soft_wrap=True)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
