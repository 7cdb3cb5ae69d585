"""The command ``adaptra``: plan, simulate, check, doctor, report. A further subcommand is one more function in COMMANDS."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptra_plugin.errors import AdaptraError, PlanError, UnsupportedError

if TYPE_CHECKING:
    from adaptra_plugin.schedule.plan import Plan
    from adaptra_plugin.schedule.profile import Profile
    from adaptra_plugin.schedule.timeline import Timeline

MOST_EXACT_S = 86400.0
"""Longest exact planning (s): nobody waits longer for one command."""
MOST_RANKS = 4096
"""Most processes on one node that the doctor is asked about."""
Subparsers = Any  # argparse does not name the type
SLOW_SHARE = 0.05
"""Links whose latency exceeds this share of a stage's time for one microbatch are marked in pictures."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a node that is not ready, or 2 for input that is wrong (the
    message is on stderr) and for output that nobody reads to its end."""
    parser = argparse.ArgumentParser(prog="adaptra", description="Slack-adaptive pipeline schedules.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    options = parser.parse_args(argv)
    try:
        code = int(options.run(options) or 0)
        sys.stdout.flush()  # here, so that a reader that has gone is noticed while it can be handled
        return code
    except BrokenPipeError:
        # whoever read the output has what it wanted; what is left in the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except AdaptraError as error:
        print(f"adaptra {options.command}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"adaptra {options.command}: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
    return 2


def add_plan(commands: Subparsers) -> None:
    """``adaptra plan PROFILE.json``."""
    from adaptra_plugin.schedule.names import SCHEDULES

    parser = commands.add_parser("plan", help="plan a schedule for a profile")
    parser.add_argument("profile", metavar="PROFILE.json", help="profile, - for stdin")
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="slack-adaptive", help="default: %(default)s")
    parser.add_argument("--exact", type=float, metavar="SECONDS", help="refine with CP-SAT for at most SECONDS")
    parser.add_argument("--offload", type=float, metavar="MS", help="price of moving an activation to the host")
    parser.add_argument("--seed", type=int, default=0, help="of the search; default: %(default)s")
    parser.add_argument("--out", default="-", metavar="PLAN.json", help="default: - (stdout)")
    parser.add_argument("--csv", metavar="F", help="the schedule as CSV for torch.distributed.pipelining, - for stdout")
    parser.add_argument("--plot", metavar="F.png|F.svg", help="Gantt chart, the stock schedule above the plan")
    parser.add_argument("--trace", metavar="F.json", help="the same as a trace for Perfetto")
    parser.set_defaults(run=run_plan)


def add_simulate(commands: Subparsers) -> None:
    """``adaptra simulate PLAN.json --profile PROFILE.json``."""
    from adaptra_plugin.schedule.names import DUPLEX_MODES, LINK_MODELS

    parser = commands.add_parser("simulate", help="replay a plan on a profile")
    parser.add_argument("plan", metavar="PLAN.json", help="plan, - for stdin")
    parser.add_argument("--profile", required=True, metavar="PROFILE.json", help="profile, - for stdin")
    parser.add_argument("--link-model", choices=LINK_MODELS, default="delegated", help="default: %(default)s")
    parser.add_argument("--duplex", choices=DUPLEX_MODES, help="default: half for a blocking link under I and W")
    parser.add_argument("--plot", metavar="F.png|F.svg", help="Gantt chart")
    parser.add_argument("--trace", metavar="F.json", help="trace for Perfetto")
    parser.set_defaults(run=run_simulate)


def add_check(commands: Subparsers) -> None:
    """``adaptra check``."""
    from adaptra_plugin.patches.hosts import HOSTS

    parser = commands.add_parser(
        "check", help="say what a job can have of Adaptra, and why; exit code 1 if it is refused"
    )
    jobs = parser.add_mutually_exclusive_group(required=True)
    for host in HOSTS.values():
        jobs.add_argument(
            f"--{host.name}",
            nargs=argparse.REMAINDER if host.takes_arguments else "+",
            metavar="FILE",
            help=f"configurations of {host.title}"
            + (", and arguments of its training script; nothing else may follow" if host.takes_arguments else ""),
        )
    size = "{}, where the configuration does not say it; default: {}"
    parser.add_argument("--stages", type=int, metavar="N", help=size.format("of the pipeline", 2))
    parser.add_argument("--tensor", type=int, metavar="N", help=size.format("ranks of a tensor group", 1))
    parser.add_argument(
        "--json",
        action="store_true",
        help="print {job, level, stages, chunks, tensor, reasons}; of several jobs a list",
    )
    parser.set_defaults(run=run_check)


def add_doctor(commands: Subparsers) -> None:
    """``adaptra doctor``."""
    parser = commands.add_parser("doctor", help="examine whether this node is ready; exit code 1 if not")
    parser.add_argument("--config", metavar="DS_CONFIG.json", help="the job's configuration; default: all defaults")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes of the job on this node; default: one per GPU"
    )
    parser.add_argument("--json", action="store_true", help="print a list of {check, status, found, advice}")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--serve", action="store_true", help="measure the rails to another host: wait for it here")
    ends.add_argument("--peer", metavar="HOST:PORT", help="... and here go to the one that waits")
    parser.add_argument("--bind", metavar="ADDRESS", help="where --serve listens; default: the way out of this host")
    parser.set_defaults(run=run_doctor)


def add_report(commands: Subparsers) -> None:
    """``adaptra report``."""
    parser = commands.add_parser("report", help="what the runs of a report.directory have reported")
    parser.add_argument(
        "directory", nargs="?", default="adaptra-logs", metavar="DIRECTORY", help="default: %(default)s"
    )
    parser.add_argument("--run", dest="name", metavar="ID", help="default: the newest")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--list", action="store_true", help="all runs, the newest last")
    shown.add_argument("--records", action="store_true", help="every record of the run, one JSON object a line")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.set_defaults(run=run_report)


COMMANDS: list[Callable[[Subparsers], None]] = [add_plan, add_simulate, add_check, add_doctor, add_report]


def run_plan(options: argparse.Namespace) -> int:
    """Plans and writes what was asked for."""
    from adaptra_plugin.schedule.planner import plan
    from adaptra_plugin.schedule.profile import Profile
    from adaptra_plugin.schedule.refine import refine

    _check_plan_options(options)
    profile = Profile.from_json(_read(options.profile))
    found = plan(profile, schedule=options.schedule, seed=options.seed, offload_ms=options.offload)
    if options.exact is not None:
        found = refine(profile, found, seconds=options.exact, seed=options.seed)
    _pictures(options, lambda: _before_and_after(profile, found), profile)
    if options.csv:
        _write(options.csv, found.schedule.to_csv())
    _write(options.out, json.dumps(found.to_json()) + "\n")
    return 0


def _check_plan_options(options: argparse.Namespace) -> None:
    """All that can be known to be wrong before the profile is read: planning may take minutes, and what a mistake
    leaves behind must not be half of the files."""
    from adaptra_plugin.schedule.names import SCHEDULES, adaptive

    if options.out == "-" and options.csv == "-":
        raise PlanError("the plan and its CSV cannot both go to stdout: give --out or --csv a file")
    if options.exact is not None:
        if not 0 < options.exact <= MOST_EXACT_S:  # false for nan too
            raise PlanError(
                f"--exact {options.exact:g}: expected seconds, a number above zero and at most {MOST_EXACT_S:.0f}"
            )
        if not SCHEDULES[options.schedule].adapts:
            raise PlanError(f"--exact searches for a schedule of its own: it refines {' or '.join(adaptive())} only")
        if options.offload is not None:
            raise PlanError("--exact keeps every limit: it cannot be combined with --offload")
    if options.offload is not None:
        if not (math.isfinite(options.offload) and options.offload >= 0):
            raise PlanError(f"--offload {options.offload:g}: expected a finite time of at least 0 ms")
        if not SCHEDULES[options.schedule].adapts:
            raise PlanError(f"--offload is weighed against limits by {' or '.join(adaptive())} only")
    _check_outputs(options, "out", "csv", "plot", "trace")


def _check_outputs(options: argparse.Namespace, *names: str) -> None:
    """Whether every file can be written, and a picture drawn."""
    for name in names:
        path = getattr(options, name)
        if path in (None, "-"):
            continue
        folder = Path(path).parent
        if not folder.is_dir():
            raise PlanError(f"--{name} {path}: there is no folder {folder}")
        if Path(path).is_dir():
            raise PlanError(f"--{name} {path} is a folder: expected a file")
        if not os.access(path if Path(path).exists() else folder, os.W_OK):
            raise PlanError(f"--{name} {path}: no permission to write there")
    if options.plot:
        if Path(options.plot).suffix.lower() not in (".png", ".svg"):
            raise PlanError(f"--plot {options.plot}: expected a file that ends in .png or .svg")
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise UnsupportedError("pictures need matplotlib: pip install 'adaptra-plugin[plots]'") from error


def run_simulate(options: argparse.Namespace) -> int:
    """Replays and prints makespan, idle time by cause, peak activations and critical path."""
    from adaptra_plugin.schedule.plan import Plan
    from adaptra_plugin.schedule.profile import Profile
    from adaptra_plugin.schedule.simulator import simulate

    if options.plan == options.profile == "-":
        raise PlanError("the plan and the profile cannot both come from stdin")
    _check_outputs(options, "plot", "trace")
    loaded = Plan.from_json(_read(options.plan))
    profile = Profile.from_json(_read(options.profile))
    timeline = simulate(loaded.schedule, profile, options.link_model, duplex=options.duplex)
    _pictures(options, lambda: [(f"{loaded.name}, {options.link_model} links", timeline)], profile)
    print(json.dumps(timeline.to_json()))
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Says what a job can have."""
    from adaptra_plugin.doctor.job import run
    from adaptra_plugin.errors import ConfigError
    from adaptra_plugin.patches.hosts import HOSTS

    name, words = next((name, found) for name in HOSTS if (found := getattr(options, name)) is not None)
    as_json = options.json
    if HOSTS[name].takes_arguments:  # it takes all that follows
        if misplaced := [word for word in words if word.split("=")[0] in ("--stages", "--tensor")]:
            raise ConfigError(f"{misplaced[0]} is an option of adaptra check: give it before --{name}, or leave it out")
        as_json, words = as_json or "--json" in words, [word for word in words if word != "--json"]
    return run(HOSTS[name], words, options.stages, options.tensor, as_json)


def run_doctor(options: argparse.Namespace) -> int:
    """Examines this node, or the rails to another one, and prints what was found."""
    from adaptra_plugin.errors import ConfigError

    if options.bind is not None and not options.serve:
        raise ConfigError("--bind says where --serve listens: give both, or neither")
    if options.serve or options.peer is not None:
        if options.ranks is not None:
            raise ConfigError("--ranks is about this node alone: leave it out with --serve and --peer")
        from adaptra_plugin.doctor.meet import run_meeting

        return run_meeting(options.config, options.peer, options.bind, options.json)
    from adaptra_plugin.doctor.command import run

    if options.ranks is not None and not 1 <= options.ranks <= MOST_RANKS:
        raise ConfigError(f"--ranks {options.ranks}: expected a whole number from 1 to {MOST_RANKS}")
    return run(options.config, options.ranks, options.json)


def run_report(options: argparse.Namespace) -> int:
    """Prints a run, the list of runs, or records."""
    from adaptra_plugin.report.command import run

    return run(options.directory, options.name, listing=options.list, records=options.records, as_json=options.json)


def _before_and_after(profile: Profile, found: Plan) -> list[tuple[str, Timeline]]:
    """The stock schedule of the profile's shape on blocking links, where there is one, and the plan."""
    from adaptra_plugin.schedule.names import stock_order
    from adaptra_plugin.schedule.planner import plan
    from adaptra_plugin.schedule.profile import Profile
    from adaptra_plugin.schedule.simulator import simulate

    stock = stock_order(profile.virtual_stages)
    panels = []
    if found.name != stock and (profile.virtual_stages == 1 or profile.microbatches % profile.ranks == 0):
        data = profile.to_json()
        for stage in data["stages"]:
            stage.pop("max_activations", None)  # the stock schedule knows no limits
        before = plan(Profile.from_json(data), schedule=stock).schedule
        panels.append((f"{stock}, blocking links", simulate(before, profile, "blocking")))
    return [*panels, (f"{found.name}, delegated links", simulate(found.schedule, profile))]


def _pictures(options: argparse.Namespace, panels: Callable[[], list[tuple[str, Timeline]]], profile: Profile) -> None:
    if options.plot:
        from adaptra_plugin.report.gantt import draw_gantt

        draw_gantt(panels(), options.plot, slow_links(profile))
    if options.trace:
        from adaptra_plugin.report.trace import write_trace

        write_trace(panels(), options.trace)


def slow_links(profile: Profile) -> list[tuple[int, int]]:
    """Links worth marking, see SLOW_SHARE."""
    mean = sum(stage.total_ms for stage in profile.stages) / len(profile.stages)
    return [(k.src, k.dst) for k in profile.links if k.latency_ms + k.transfer_ms > SLOW_SHARE * mean]


def _read(path: str) -> object:
    name = "stdin" if path == "-" else path
    try:
        return json.loads(sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PlanError(f"{name} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise PlanError(f"{name} is not UTF-8 text: byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise PlanError(f"{name} is nested too deeply: neither a profile nor a plan is") from None
    except ValueError as error:  # an integer of thousands of digits
        raise PlanError(f"{name} cannot be read: {error}") from None


def _write(path: str, text: str) -> None:
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)


if __name__ == "__main__":
    sys.exit(main())
