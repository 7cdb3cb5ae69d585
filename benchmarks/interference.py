"""What transfers cost the training process: the speed of a loop while the proxy is saturated, against the same loop in peace.

    python -m benchmarks.interference [--rail tcp] [--proxy process] [--seconds 2] [--repeats 5] [--json FILE]

Two ranks fill their staging rings with messages of 16 MiB for each other; rank 0 runs a loop (matrix products, or pure Python)
until its own have arrived, empties the other ring, and again. Only the time of the loop counts, and the same loop is timed in
peace in turn. As on a node with processors to spare, rank 0 has a processor of its own: the proxies and rank 1 are pinned to the
others (`--shared` lets the system place everything).
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.transport import Direction, Endpoint, EndpointInfo, Key, PeerInfo

MIB = 1 << 20
SIZE = 16 * MIB
BATCH = 24
RING_MIB = (BATCH + 2) * SIZE // MIB
SECRET = b"benchmark, two ranks of one host"
DEADLINE_S = 120.0
LOOK_EVERY_S = 0.005


def products() -> None:
    """Some matrix products; torch holds no interpreter lock in them."""
    torch.mm(_LEFT, _RIGHT)


def python() -> None:
    """Some pure Python, which holds the interpreter lock all the time."""
    total = 0
    for number in range(2000):
        total += number * number


_LEFT, _RIGHT = torch.randn(160, 160), torch.randn(160, 160)
LOOPS: dict[str, Callable[[], None]] = {"matrix products": products, "pure Python": python}


def rounds_until(work: Callable[[], None], over: Callable[[], bool]) -> tuple[int, float]:
    """(rounds of `work`, seconds); `over` is asked every few milliseconds."""
    rounds, start = 0, time.perf_counter()
    look = start + LOOK_EVERY_S
    while True:
        work()
        rounds += 1
        now = time.perf_counter()
        if now >= look:
            if over():
                return rounds, now - start
            look = now + LOOK_EVERY_S


def _past(until: float) -> bool:
    return time.perf_counter() >= until


class Side:
    """One of the two processes."""

    def __init__(self, rank: int, pipe: Any, options: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        self.rank, self.pipe, self.options = rank, pipe, options
        cpus = sorted(os.sched_getaffinity(0))
        others = cpus[1:] or cpus
        if not options.shared:
            os.sched_setaffinity(0, {cpus[0]} if rank == 0 else set(others))
        config = TransportConfig(
            rail=options.rail,
            proxy=options.proxy,
            cpus=None if options.shared else tuple(others),
            ring_mib=RING_MIB,
            connections_per_direction=1,
            deadline_s=DEADLINE_S,
        )
        infos = [PeerInfo(r, r, "n") for r in (0, 1)]
        self.endpoint = Endpoint(infos[rank], config, SECRET, bind_host="127.0.0.1")
        pipe.send(self.endpoint.endpoint_info.to_text())
        other = EndpointInfo.parse(pipe.recv())
        self.endpoint.connect({1 - rank: (infos[1 - rank], other)}, neighbours=[1 - rank], coordinator=0)
        self.channel = self.endpoint.channel(1 - rank)
        self.data = torch.zeros(SIZE, dtype=torch.uint8)
        self.step_id = 0

    def batch(self, loop: Callable[[], None] | None) -> tuple[int, float]:
        """Sends a batch each way; rank 0 runs the loop until its own batch has arrived."""
        self.step_id += 1
        out, back = Direction(self.rank), Direction(1 - self.rank)
        incoming = [self.channel.recv(Key(self.step_id, back, self.rank, number)) for number in range(BATCH)]
        outgoing = [self.channel.send(Key(self.step_id, out, 1 - self.rank, n), [self.data]) for n in range(BATCH)]
        found = (0, 0.0) if loop is None else rounds_until(loop, lambda: all(t.ready() for t in (*outgoing, *incoming)))
        while incoming:
            incoming.pop().wait(DEADLINE_S)
        return found

    def run(self) -> dict[str, Any]:
        options = self.options
        speeds: dict[str, dict[str, list[float]]] = {name: {"peace": [], "busy": []} for name in LOOPS}
        moved = 0.0
        for repeat in range(options.repeats + 1):
            for name, loop in LOOPS.items():
                if self.rank == 1:
                    while self.pipe.recv():
                        self.batch(None)
                    continue
                until = time.perf_counter() + options.seconds
                rounds, seconds = rounds_until(loop, functools.partial(_past, until))
                peace = rounds / seconds
                rounds, seconds = 0, 0.0
                while seconds < options.seconds:
                    self.pipe.send(True)
                    more = self.batch(loop)
                    rounds, seconds = rounds + more[0], seconds + more[1]
                    moved += 2 * BATCH * SIZE
                self.pipe.send(False)
                if repeat:  # the first one touches the rings for the first time
                    speeds[name]["peace"].append(peace)
                    speeds[name]["busy"].append(rounds / seconds)
        self.endpoint.close()
        return {"speeds": speeds, "moved_bytes": moved}


def _main(rank: int, endpoint_info: Any, steps: Any, result: Any, options: argparse.Namespace) -> None:
    side = Side(rank, endpoint_info, options)
    side.pipe = steps
    result.send(side.run())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs both processes; per loop: the ratio of the speeds, median over the repeats, and its extremes."""
    context = multiprocessing.get_context("fork")
    steps = context.Pipe()
    endpoint_infos, results = [], []
    for rank in (0, 1):
        here, there = context.Pipe()
        mine, theirs = context.Pipe()
        arguments = (rank, there, steps[rank], theirs, options)
        context.Process(target=_main, args=arguments, daemon=True).start()
        endpoint_infos.append(here)
        results.append(mine)
    texts = [pipe.recv() for pipe in endpoint_infos]
    for pipe, text in zip(endpoint_infos, reversed(texts), strict=True):
        pipe.send(text)
    found = results[0].recv()
    results[1].recv()
    rows = {}
    for name, speed in found["speeds"].items():
        ratios = [busy / peace for busy, peace in zip(speed["busy"], speed["peace"], strict=True)]
        rows[name] = {
            "ratio": round(statistics.median(ratios), 4),
            "lowest": round(min(ratios), 4),
            "highest": round(max(ratios), 4),
        }
    return {
        "rail": options.rail,
        "proxy": options.proxy,
        "pinned": not options.shared,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "moved_gb": round(found["moved_bytes"] / 1e9, 1),
        "loops": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rail", choices=["shm", "tcp", "rdma"], default="tcp")
    parser.add_argument("--proxy", choices=["process", "thread"], default="process")
    parser.add_argument("--shared", action="store_true", help="pin nothing")
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each loop, per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    summary = measure(options)
    for name, row in summary["loops"].items():
        print(f"{name}: {row['ratio']:.1%} of its speed in peace ({row['lowest']:.1%} to {row['highest']:.1%})")
    print(f"rail {summary['rail']}, proxy in a {summary['proxy']}, {summary['moved_gb']} GB moved meanwhile")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
