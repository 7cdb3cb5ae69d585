"""What the split costs a forward: a stack of linear layers with calls of `F.linear` intercepted, against the same stack without.

    python -m benchmarks.interception --rows 128 --layers 8

Forwards of both kinds take turns, and each pair gives one ratio, so that other work on the machine meets both alike.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from adaptra_plugin.runtime.split import SplitLinears
from adaptra_plugin.runtime.weight_grad_store import WeightGradStore


def measure(width: int, layers: int, rows: int, pairs: int) -> tuple[float, float]:
    """Median time of a stock forward (ms), and by how much (%) an intercepted one takes longer: from the fastest tenths of both, which
    nothing has disturbed."""
    torch.set_num_threads(1)
    stack = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    x = torch.randn(rows, width)
    store = WeightGradStore()
    split = SplitLinears(stack, store)
    for microbatch in range(2):  # the first iteration observes, the second one splits
        split.begin()
        with split.recording():
            y = stack(x)
        with store.collect(microbatch):
            y.sum().backward()
        store.run(microbatch)
        split.finalize()
    if split.report.split != layers:
        raise RuntimeError(f"{split.report.split} of {layers} layers are split")
    times: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(pairs):
        for intercepted in (False, True) if pair % 2 else (True, False):
            began = time.thread_time()  # not counting what runs beside it
            if intercepted:
                with split.recording():
                    stack(x)
            else:
                stack(x)
            times[intercepted].append((time.thread_time() - began) * 1e3)
    stock, ours = (statistics.mean(sorted(times[kind])[: max(1, pairs // 10)]) for kind in (False, True))
    return statistics.median(times[False]), (ours / stock - 1) * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=128, help="tokens of a microbatch; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=300)
    options = parser.parse_args()
    took_ms, longer = measure(options.width, options.layers, options.rows, options.pairs)
    print(
        f"{options.layers} layers of {options.width}, {options.rows} rows, one thread: stock forward {took_ms:.2f} ms, "
        f"intercepted {longer:+.2f} %"
    )


if __name__ == "__main__":
    main()
