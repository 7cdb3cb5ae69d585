"""A project's own training script on four CPU ranks, stock and with the "adaptra" block: what the comparisons have in common.

The ranks of a run are forked from one process that has imported the project and what stands in for a GPU. Nothing of a project is
changed: the script runs as `__main__`, and what it hands to `deepspeed.initialize` says whether Adaptra takes part.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

STAGES = TENSOR = 2
RANKS = STAGES * TENSOR
PRECISIONS = ("fp16", "bf16")
DEADLINE_S = 900.0
FIGURES = re.compile(
    r"iteration +\d+/|lm[ _]loss: [\d.E+-]+|grad norm: (?:[\d.]+|inf)|loss scale: [\d.]+|skipped iterations: +\d+"
)
SLOW_FROM = 4
SETTLED = 10
"""Iterations at the end of a run that are measured: the slow link has been found by then, and the new plan runs."""
LIMITS = {"stock slow / ours slow": (1.8, None), "ours slow / ours healthy": (None, 1.25)}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        block: the "adaptra" block, switched off for a stock run.
        more: arguments of the user's, on top of the project's.
    """

    precision: str
    microbatches: int
    iterations: int
    block: Mapping[str, Any]
    more: Sequence[str] = ()


@dataclass
class Trace:
    """What a rank has seen: the bits, and the seconds of each iteration."""

    losses: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    parameters: str = ""
    skipped: int = 0
    stage: int = 0
    sessions: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What a run has printed and computed."""

    figures: list[str]
    ranks: list[Trace]

    @property
    def milliseconds(self) -> float:
        return statistics.median(1e3 * s for s in self.ranks[0].seconds[-SETTLED:])


@dataclass(frozen=True)
class Project:
    """What a comparison brings.

    Attributes:
        script: in the checkout.
        missing: packages that are not needed to train and need not be there: names in them are empty classes.
        load: makes ready what the script wants to find (CUDA, say), and imports what every rank would import.
        write: writes tokens under a path without suffix.
        arguments: of the script, for a job, given the checkout, a folder to write to, and where the tokens are.
    """

    title: str
    script: str
    missing: Sequence[str]
    load: Callable[[], None]
    write: Callable[[Path], None]
    arguments: Callable[[Job, Path, Path, Path], list[str]]


class _Absent(ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - of a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absences:
    """Finds modules that are not there."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = [name for name in names if not _is_there(name)]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        absent = any(name == known or name.startswith(f"{known}.") for known in self._names)
        return ModuleSpec(name, self, is_package=True) if absent else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def main(project: Project) -> int:
    parser = argparse.ArgumentParser(description=project.title)
    parser.add_argument("checkout", type=Path, help="a work tree of the project")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="which; both if it is not given")
    parser.add_argument("--slow-link", action="store_true", help="measure iterations instead: compute is paced")
    parser.add_argument("--iterations", type=int, default=20)
    given, more = parser.parse_known_args()
    checkout = given.checkout.resolve()
    _load(project, checkout)
    precisions = given.precision or PRECISIONS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = folder / "tokens"
        project.write(tokens)

        def run(precision: str, microbatches: int, block: Mapping[str, Any]) -> Run:
            return _run(project, Job(precision, microbatches, given.iterations, block, more), checkout, folder, tokens)

        if given.slow_link:
            return _measure(run, precisions[-1])
        return max(_compare(run, precision) for precision in precisions)


def _load(project: Project, checkout: Path) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    from tests.forked import import_deepspeed

    import_deepspeed()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    sys.meta_path.append(_Absences(project.missing))  # type: ignore[arg-type]
    sys.path.insert(0, str(checkout))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # what they build with
    project.load()
    print(f"{project.title} with DeepSpeed {deepspeed.__version__} ({Path(deepspeed.__file__).parent})", flush=True)


def _run(project: Project, job: Job, checkout: Path, folder: Path, tokens: Path) -> Run:
    from tests.forked import run_ranks

    arguments = project.arguments(job, checkout, folder, tokens)
    try:
        traces = run_ranks(_rank, RANKS, checkout / project.script, arguments, folder, job.block, timeout=DEADLINE_S)
    except AssertionError:
        for rank in range(RANKS):
            print(f"--- rank {rank}", _printed(folder, rank)[-3000:], sep="\n")
        raise
    figures = [figure for rank in range(RANKS) for figure in FIGURES.findall(_printed(folder, rank))]
    return Run(figures, traces)


def _printed(folder: Path, rank: int) -> str:
    path = folder / f"rank{rank}.log"
    return path.read_text(errors="replace") if path.exists() else ""


# --- a rank


def _rank(rank: int, script: Path, arguments: list[str], folder: Path, block: Mapping[str, Any]) -> Trace:
    import adaptra_plugin
    from adaptra_plugin.launch.train_gpt import hash_parameters

    log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(folder)
    trace = Trace()
    engines = _watch(trace, block)
    sys.argv = [str(script), *arguments]
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    (engine,) = engines
    trace.parameters = hash_parameters(engine.module)
    trace.stage, trace.skipped = engine.stage_id, engine.skipped_steps
    trace.sessions = adaptra_plugin.status()["sessions"]
    return trace


def _watch(trace: Trace, block: Mapping[str, Any]) -> list[Any]:
    """Notes what each batch of the engine that is built gives; where that is stock, with paced compute and the slow link."""
    import deepspeed

    from adaptra_plugin.config import parse_config
    from adaptra_plugin.launch.stock import StockSimulation

    config = parse_config(block)
    build, engines = deepspeed.initialize, []

    def initialize(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        engine = built[0]
        engines.append(engine)
        simulation = None if config.enabled else StockSimulation(engine, config.simulate)
        run = engine.train_batch

        def train_batch(*args: Any, **kwargs: Any) -> Any:
            if simulation is not None:
                simulation.set_iteration(len(trace.seconds))
            start = time.perf_counter()
            loss = run(*args, **kwargs)
            trace.seconds.append(time.perf_counter() - start)
            trace.losses.append(float(loss).hex())
            trace.norms.append(float(engine.get_global_grad_norm()).hex())
            return loss

        engine.train_batch = train_batch
        return built

    deepspeed.initialize = initialize
    return engines


# --- what is compared


def _block(enabled: bool, **simulate: Any) -> dict[str, Any]:
    return {
        "enabled": enabled,
        "transport": {"bind": "127.0.0.1"},
        "detector": {"warmup_iterations": 1, "min_history": 2},
        "report": {"directory": None, "wandb": "off"},
        "simulate": simulate,
    }


def _link(latency_ms: float) -> list[dict[str, Any]]:
    return [{"src": 0, "dst": 1, "latency_ms": latency_ms, "from_iteration": SLOW_FROM}]


def _compare(run: Callable[..., Run], precision: str) -> int:
    """Whether all figures and bits are the same; ours has a slow link on the way, so it changes its plan."""
    stock = run(precision, 8, _block(False))
    ours = run(precision, 8, _block(True, links=_link(60)))
    wrong = [name for name, same in _same(stock, ours).items() if not same]
    print(
        f"{precision}: {len(stock.figures)} printed figures, {len(stock.ranks[0].losses)} iterations "
        f"({stock.ranks[0].skipped} skipped): {'differs: ' + ', '.join(wrong) if wrong else 'the same to the bit'}"
    )
    _tell_sessions(ours)
    if wrong:
        print(stock.figures, ours.figures, sep="\n--- with Adaptra:\n")
    return int(bool(wrong))


def _same(stock: Run, ours: Run) -> dict[str, bool]:
    pairs = list(zip(stock.ranks, ours.ranks, strict=True))
    count = len(stock.ranks[0].losses)
    return {
        "figures": stock.figures == ours.figures and bool(stock.figures),
        "losses": all(a.losses == b.losses for a, b in pairs) and count > 0,
        "gradient norms": all(a.norms == b.norms for a, b in pairs),
        "parameters": all(a.parameters == b.parameters for a, b in pairs),
        "skipped iterations": all(a.skipped == b.skipped for a, b in pairs),
        "who ran": not any(a.sessions for a, _ in pairs)
        and all(b.sessions and b.sessions[0]["iteration"] == count for _, b in pairs),
    }


def _tell_sessions(run: Run) -> None:
    for rank in run.ranks[::TENSOR]:
        for session in rank.sessions:
            print(
                f"  stage {rank.stage}: {session['level']}, plan v{session['plan_version']}, {session['split_layers']} layers "
                f"split, fused: {session['fused_layers']}"
            )


def _measure(run: Callable[..., Run], precision: str) -> int:
    """Iterations with a slow link, of which both have the same."""
    pace = {"forward_ms": 48, "backward_input_ms": 48, "backward_weight_ms": 32}
    found: dict[str, float] = {}
    for name, enabled, links in (
        ("stock healthy", False, []),
        ("stock slow", False, _link(96)),
        ("ours healthy", True, []),
        ("ours slow", True, _link(96)),
    ):
        result = run(precision, 16, _block(enabled, compute=pace, links=links))
        found[name] = result.milliseconds
        print(f"{name}: {found[name]:.0f} ms an iteration", flush=True)
        _tell_sessions(result)
    print(f"compute is PACED: {pace}; transfers over the slow link take 96 ms more; median of {SETTLED} iterations")
    failed = 0
    for name, (least, most) in LIMITS.items():
        above, below = name.split(" / ")
        ratio = found[above] / found[below]
        good = (least is None or ratio >= least) and (most is None or ratio <= most)
        failed |= not good
        wanted = f"at least {least}" if most is None else f"at most {most}"
        print(f"{name}: {ratio:.2f} ({wanted}{'' if good else ': MISSED'})")
    return int(failed)
