"""Combinations of settings at random (tests/patches/combos.py), each trained by stock DeepSpeed and by ours on CPU ranks.

    python -m benchmarks.combos --count 60 --seed 1      60 combinations, from this one on
    python -m benchmarks.combos --seed 17 --count 1      this one again
    python -m benchmarks.combos --long 200               one job of 200 steps: fp16, ZeRO-1, 2 stages x 2 tensor ranks

Prints what differs, and how many combinations ran.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import sys
import time
import traceback

from tests.combos import StockFails
from tests.patches.combos import COUNTS, Combo, compare

SECONDS = 30.0
"""Allowed for a step, of both runs."""


def long_run(iterations: int) -> Combo:
    """Loss scaling, ZeRO-1 and tensor parallelism, with a link that turns slow and heals several times."""
    choose = random.Random(0)
    return Combo(
        stages=2,
        tensor=2,
        data=1,
        precision="fp16-dynamic",
        overflow=True,
        zero=1,
        clipping=True,
        optimizer="Adam",
        tied=True,
        dropout=0.2,
        checkpoints="off",
        partitioned=True,
        dynamic=False,
        steps=tuple(choose.choice(COUNTS[2]) for _ in range(iterations)),
        evaluations=tuple(range(10, iterations, 50)),
        max_activations=None,
        settings="slack-adaptive",
        slow=True,
    )


@contextlib.contextmanager
def quiet():
    """What the ranks print goes nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    both = os.dup(2)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.dup2(both, 2)
        for descriptor in (kept, nowhere, both):
            os.close(descriptor)


def outcome(combo: Combo) -> tuple[str, str]:
    """`same`, `stock fails` or `DIFFERS`, and details."""
    try:
        with quiet():
            results = compare(combo, timeout=SECONDS * len(combo.steps))
    except StockFails as error:
        return "stock fails", str(error)
    except AssertionError:
        return "DIFFERS", traceback.format_exc()
    return "same", f"plan v{results[0]['plan_version']}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the first combination; the others follow")
    parser.add_argument("--iterations", type=int, default=8, help="steps of each")
    parser.add_argument("--long", type=int, metavar="STEPS", help="the long run instead")
    options = parser.parse_args(argv)
    seeds = range(options.seed, options.seed + options.count)
    combos = [(seed, Combo.draw(seed, options.iterations)) for seed in seeds]
    if options.long:
        combos = [(0, long_run(options.long))]
    counts: collections.Counter[str] = collections.Counter()
    for seed, combo in combos:
        started = time.monotonic()
        word, details = outcome(combo)
        counts[word] += 1
        print(f"{seed}: {word}, {time.monotonic() - started:.0f} s ({combo})\n    {details}")
        sys.stdout.flush()
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return 1 if counts["DIFFERS"] else 0


if __name__ == "__main__":
    sys.exit(main())
