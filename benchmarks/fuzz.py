"""Fuzzing of everything that listens: handshake, listener, frames, JSON, packed reports and plans.

    python -m benchmarks.fuzz [--cases 1000000] [--seed 1] [--only CASE] [--floods 20000]

What must hold: no exception but the documented ones reaches the event loop; not a byte of a stranger comes to the parser of
frames; nothing is allocated beyond the limits; no case takes long; after every stranger a genuine peer is let in. Each case
depends on the seed and its number alone: a failure prints both, and `--only` runs that one again. Prints, per sort of
case: how many, how fast, how many were refused, the slowest one; and how much memory the whole run took.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import logging
import platform
import random
import resource
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.proxy import handshake
from adaptra_plugin.transport.proxy.wire import MAX_BODY_BYTES
from benchmarks import fuzz_frames, fuzz_handshake, fuzz_packed, fuzz_texts

SLOWEST_S = 2.0
"""CPU time that no case may take (s); a machine that is busy with other things must not matter."""
PEAK_BYTES = 48 * MAX_BODY_BYTES
"""What a case may allocate at once: the longest body, read, copied, and unpacked as JSON of its shortest values."""
GROWTH_MIB = 400
"""By how much the whole run may grow (MiB)."""
TRACED_EVERY = 200
"""Every so manieth case runs under tracemalloc, which is slow."""


@dataclass
class Sort:
    """One sort of cases, and what became of them."""

    run: Callable[[random.Random], str]
    weight: float
    count: int = 0
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)
    peak: tuple[int, int] = (0, 0)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)


class Failure(AssertionError):
    """A case that does not keep the promises; says how to run it again."""


@contextlib.contextmanager
def sorts() -> Iterator[dict[str, Sort]]:
    """All sorts of cases, with what they share."""
    frames, acceptor = fuzz_frames.Frames(), fuzz_handshake.ListenerCase()
    undo = fuzz_frames.instrument()
    secrets, level, propagate = handshake.secrets, log.level, log.propagate
    handler = _Formatting()
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.DEBUG)
    try:
        yield {
            "handshake": Sort(fuzz_handshake.in_memory, 0.40),
            "acceptor": Sort(acceptor, 0.08),
            "frames": Sort(frames, 0.40),
            "endpoint_info": Sort(fuzz_texts.endpoint_info, 0.05),
            "bridge": Sort(fuzz_texts.bridge_reader, 0.05),
            "report": Sort(fuzz_packed.report, 0.01),
            "plan": Sort(fuzz_packed.packed_plan, 0.01),
        }
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
        log.setLevel(level)
        handshake.secrets = secrets
        undo()
        acceptor.close()
        frames.close()


class _Formatting(logging.Handler):
    """Log lines are made, and go nowhere."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


def run(
    seed: int,
    cases: int,
    *,
    only: int | None = None,
    failures: list[Failure] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Sort]:
    """Runs cases 0 to `cases`, or one of them. With a list for failures, those go there, and the run goes on.

    Raises:
        Failure: names seed and case; the exception behind it is its cause.
    """
    with sorts() as known:
        names, weights = list(known), [sort.weight for sort in known.values()]
        started = time.monotonic()
        for case in range(cases) if only is None else (only,):
            rng = random.Random((seed << 40) + case)
            name = rng.choices(names, weights)[0]
            try:
                _one(known[name], name, rng, seed, case, traced=case % TRACED_EVERY == 0)
            except Failure as failure:
                if failures is None:
                    raise
                failures.append(failure)
            if case and case % 100_000 == 0:
                say(f"{case} cases, {case / (time.monotonic() - started):.0f} a second, {_rss_mib():.0f} MiB")
    return known


def _one(sort: Sort, name: str, rng: random.Random, seed: int, case: int, *, traced: bool) -> None:
    if traced:
        tracemalloc.start()
    started = time.process_time()
    try:
        outcome = sort.run(rng)
        spent = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        assert traced or spent < SLOWEST_S, f"it took {spent:.2f} s"
        assert peak < PEAK_BYTES, f"it allocated {peak} bytes"
    except Exception as error:
        raise Failure(
            f"{type(error).__name__} in case {case} ({name}) of seed {seed}: {error}\n"
            f"again: python -m benchmarks.fuzz --seed {seed} --only {case}"
        ) from error
    finally:
        if traced:
            tracemalloc.stop()
    sort.count += 1
    sort.outcomes[outcome] += 1
    if not traced:
        sort.seconds += spent
        sort.slowest = max(sort.slowest, (spent, case))
    sort.peak = max(sort.peak, (peak, case))


def floods(seed: int, count: int, kinds: Sequence[str] = fuzz_frames.FLOODS) -> dict[str, tuple[int, float]]:
    """Peak of memory (bytes) and CPU time (s) of `count` harmless frames of each sort, from a peer that reads nothing.

    Raises:
        Failure: names seed and sort.
    """
    found = {}
    frames = fuzz_frames.Frames()
    try:
        with sorts():
            for kind in kinds:
                found[kind] = _flood(frames, seed, count, kind)
    finally:
        frames.close()
    return found


def _flood(frames: fuzz_frames.Frames, seed: int, count: int, kind: str) -> tuple[int, float]:
    gc.collect()
    started = time.process_time()
    tracemalloc.start()
    try:
        peer = fuzz_frames.flood(random.Random(seed), frames, count, kind)
        fuzz_frames.bounded(peer)
        found = (tracemalloc.get_traced_memory()[1], time.process_time() - started)
        peer.close()
        return found
    except Exception as error:
        raise Failure(f"{type(error).__name__} in a flood of {kind}, seed {seed}: {error}") from error
    finally:
        tracemalloc.stop()


def _rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, default=None, help="run this case alone")
    parser.add_argument("--go-on", action="store_true", help="after a failure; all of them are printed at the end")
    parser.add_argument("--floods", type=int, default=20_000, help="frames of each sort in a row; 0: none")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.cases} cases, Python {platform.python_version()}", flush=True)
    before, started = _rss_mib(), time.monotonic()
    failures: list[Failure] | None = [] if options.go_on else None
    try:
        known = run(
            options.seed,
            options.cases,
            only=options.only,
            failures=failures,
            say=lambda line: print(line, flush=True),
        )
    except Failure as error:
        traceback.print_exception(error.__cause__, limit=-12)
        sys.exit(str(error))
    spent = time.monotonic() - started
    print(f"{'':10} {'cases':>9} {'us each':>8} {'slowest ms':>11} {'peak MiB':>9}  outcomes")
    for name, sort in known.items():
        each = 1e6 * sort.seconds / max(1, sort.count)
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in sorted(sort.outcomes.items()))
        print(
            f"{name:10} {sort.count:9} {each:8.0f} {1e3 * sort.slowest[0]:11.1f} {sort.peak[0] / 2**20:9.1f}  {outcomes}"
        )
    growth = _rss_mib() - before
    print(f"{sum(sort.count for sort in known.values()) / spent:.0f} cases a second; memory grew by {growth:.0f} MiB")
    if options.only is None and options.floods:
        for kind, (peak, seconds) in floods(options.seed, options.floods).items():
            print(f"flood of {options.floods} {kind}: {peak / 2**20:.1f} MiB at most, {seconds:.2f} s")
    for failure in failures or ():
        print(failure)
    if failures:
        sys.exit(f"{len(failures)} cases failed")
    if growth > GROWTH_MIB:
        sys.exit(f"the run grew by {growth:.0f} MiB; {GROWTH_MIB} are allowed")


if __name__ == "__main__":
    main()
