"""Speed of the transport between two processes of this host, against gloo and memcpy measured in the same run.

    python -m benchmarks.transport [--rails shm tcp] [--sizes-kib 64 1024 16384 65536] [--repeats 7] [--json FILE]

Beside them stands what the machine allows: transfers that do nothing but the copies (`bare.py`). A transport that hands its
bytes to somebody else is hardly faster than the bare form of its rail (`staged`, `relayed`), none over TCP faster than `socket`.

Each rail is measured in a run of its own, with the proxies in processes of their own (`--proxy thread`: in the ranks). Every
row moves `--volume-mib` per repeat and way of moving; ways take turns, so that a change of the machine's load meets all of
them. Printed are medians over the repeats and, in brackets, the spread (median absolute deviation, %).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from adaptra_plugin.config import TransportConfig
from adaptra_plugin.transport import Direction, Endpoint, EndpointInfo, Key, PeerInfo
from benchmarks.bare import Bare, HandshakeConnection, copy

MIB = 1 << 20
SECRET = b"benchmark, two ranks of one host"
DEADLINE_S = 120.0
FLOORS = {"shm": ("staged",), "tcp": ("relayed", "socket"), "rdma": ()}
"""What is measured beside a rail."""


class Side:
    """One of the two processes: rank 0 sends, rank 1 receives and answers each batch with one byte."""

    def __init__(
        self, rank: int, pipe: Any, options: argparse.Namespace, port: int, rail: str, connection: HandshakeConnection
    ) -> None:
        self.rank = rank
        self.pipe = pipe
        torch.set_num_threads(1)
        cpus = sorted(os.sched_getaffinity(0))
        if options.pin:
            os.sched_setaffinity(0, {cpus[rank * len(cpus) // 2]})  # and, with it, its proxy and gloo's thread
        config = TransportConfig.model_validate(
            {
                "rail": rail,
                "cpus": None,
                "proxy": options.proxy,
                "ring_mib": options.ring_mib,
                "connections_per_direction": options.connections,
                "deadline_s": DEADLINE_S,
            }
        )
        infos = [PeerInfo(r, r, platform.node()) for r in (0, 1)]
        self.endpoint = Endpoint(infos[rank], config, SECRET, bind_host="127.0.0.1")
        pipe.send(self.endpoint.endpoint_info.to_text())
        other = EndpointInfo.parse(pipe.recv())
        self.endpoint.connect({1 - rank: (infos[1 - rank], other)}, neighbours=[1 - rank], coordinator=0)
        self.channel = self.endpoint.channel(1 - rank)
        self.step_id = 0
        self.bare = Bare(rank, connection, max(options.sizes_kib) << 10)
        self.floors = FLOORS[rail]
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def adaptra(self, data: torch.Tensor, count: int) -> None:
        self.step_id += 1
        done = Key(self.step_id, Direction.GRADIENT, 0, 0)
        if self.rank == 0:
            answer = self.channel.recv(done)
            for number in range(count):
                self.channel.send(Key(self.step_id, Direction.ACTIVATION, 1, number), [data])
            answer.wait(DEADLINE_S)
        else:
            works = deque(self.channel.recv(Key(self.step_id, Direction.ACTIVATION, 1, n)) for n in range(count))
            while works:
                works.popleft().wait(DEADLINE_S)  # and lets go of it: gloo, too, receives into few buffers
            self.channel.send(done, [])

    def gloo(self, data: torch.Tensor, count: int) -> None:
        one = torch.zeros(1)
        if self.rank == 0:
            for work in [dist.isend(data, 1) for _ in range(count)]:
                work.wait()
            dist.recv(one, 1)
        else:
            buffers = [torch.empty_like(data) for _ in range(min(count, 4))]
            works: list[Any] = []
            for number in range(count):
                if len(works) == len(buffers):
                    works.pop(0).wait()
                works.append(dist.irecv(buffers[number % len(buffers)], 0))
            for work in works:
                work.wait()
            dist.send(one, 0)

    def memcpy(self, data: torch.Tensor, count: int) -> None:
        if self.rank == 0:
            target = self.bare.target(data)
            for _ in range(count):
                copy(target, data)

    def round_trip(self, repeats: int) -> list[float]:
        """Microseconds of a message of four bytes there and back."""
        taken = []
        data = torch.zeros(1)
        for number in range(repeats):
            self.step_id += 1
            there = Key(self.step_id, Direction.ACTIVATION, 1, number)
            back = Key(self.step_id, Direction.GRADIENT, 0, number)
            start = time.perf_counter()
            if self.rank == 0:
                self.channel.send(there, [data])
                self.channel.recv(back).wait(DEADLINE_S)
                taken.append((time.perf_counter() - start) * 1e6)
            else:
                self.channel.recv(there).wait(DEADLINE_S)
                self.channel.send(back, [data])
        return taken

    def gloo_round_trip(self, repeats: int) -> list[float]:
        """The same by gloo."""
        taken = []
        data = torch.zeros(1)
        for _ in range(repeats):
            start = time.perf_counter()
            if self.rank == 0:
                dist.send(data, 1)
            dist.recv(data, 1 - self.rank)
            if self.rank == 1:
                dist.send(data, 0)
            taken.append((time.perf_counter() - start) * 1e6)
        return taken

    def send_call(self, repeats: int) -> list[float]:
        """Microseconds until `send` of 4 KiB returns while 64 MiB wait in the staging rings."""
        taken = []
        small = torch.zeros(1024)
        big = torch.zeros(16 * MIB, dtype=torch.uint8)
        for _ in range(repeats):
            self.step_id += 1
            keys = [Key(self.step_id, Direction.ACTIVATION, 1, n) for n in range(36)]
            done = Key(self.step_id, Direction.GRADIENT, 0, 0)
            if self.rank == 0:
                answer = self.channel.recv(done)
                for key in keys[:4]:
                    self.channel.send(key, [big])
                for key in keys[4:]:
                    start = time.perf_counter()
                    self.channel.send(key, [small])
                    taken.append((time.perf_counter() - start) * 1e6)
                answer.wait(DEADLINE_S)
            else:
                for key in keys:
                    self.channel.recv(key).wait(DEADLINE_S)
                self.channel.send(done, [])
        return taken

    def cpu(self, count: int) -> float:
        """Microseconds of CPU time, of this rank and its proxy, for each of `count` messages of 4 KiB one way."""
        data = torch.zeros(1024)
        self.adaptra(data, count)
        dist.barrier()
        before = _cpu_s()
        self.adaptra(data, count)
        return (_cpu_s() - before) * 1e6 / count

    def run(self, options: argparse.Namespace) -> dict[str, Any]:
        ways: dict[str, Callable[[torch.Tensor, int], None]] = {
            "memcpy": self.memcpy,
            "gloo": self.gloo,
            **{name: getattr(self.bare, name) for name in self.floors},
            "adaptra": self.adaptra,
        }
        rows = []
        for kib in options.sizes_kib:
            size = kib << 10
            data = torch.ones(size, dtype=torch.uint8)  # written to: fresh zeros are all one page of memory
            count = max(2, options.volume_mib * MIB // size)
            speeds: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(options.repeats + 1):
                for name, move in ways.items():
                    dist.barrier()
                    start = time.perf_counter()
                    move(data, count)
                    if repeat:  # the first one touches memory for the first time
                        speeds[name].append(size * count / (time.perf_counter() - start) / 1e9)
            rows.append({"kib": kib, "count": count, "gb_per_s": speeds})
        dist.barrier()
        trips = self.round_trip(options.trips)
        dist.barrier()
        gloo_trips = self.gloo_round_trip(options.trips)
        dist.barrier()
        calls = self.send_call(options.repeats)
        dist.barrier()
        cpu = self.cpu(options.messages)
        dist.barrier()
        self.endpoint.close()
        dist.destroy_process_group()
        return {
            "rows": rows,
            "round_trip_us": trips,
            "gloo_round_trip_us": gloo_trips,
            "send_call_us": calls,
            "cpu_us": cpu,
        }


def _cpu_s() -> float:
    """CPU time of this process and its children (s)."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (here, *here.children(recursive=True)))


def _main(
    rank: int, pipe: Any, options: argparse.Namespace, port: int, rail: str, connection: HandshakeConnection
) -> None:
    result = Side(rank, pipe, options, port, rail, connection).run(options)
    pipe.send(result)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(options: argparse.Namespace, rail: str) -> dict[str, Any]:
    """Runs both processes; what rank 0 measured."""
    context = multiprocessing.get_context("fork")
    port, connection = _free_port(), HandshakeConnection(max(options.sizes_kib) << 10)
    pipes, processes = [], []
    for rank in (0, 1):
        here, there = context.Pipe()
        process = context.Process(target=_main, args=(rank, there, options, port, rail, connection))
        process.start()
        pipes.append(here)
        processes.append(process)
    endpoint_infos = [pipe.recv() for pipe in pipes]
    for pipe, endpoint_info in zip(pipes, reversed(endpoint_infos), strict=True):
        pipe.send(endpoint_info)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(30)
    return {**results[0], "cpu_us": [result["cpu_us"] for result in results]}


def _middle(values: list[float]) -> tuple[float, float]:
    """Median and median absolute deviation in percent of it."""
    middle = statistics.median(values)
    return middle, 100 * statistics.median(abs(v - middle) for v in values) / middle


def _ratio(speeds: dict[str, list[float]], one: str, other: str) -> float:
    """Of the same repeats: what the machine did meanwhile cancels out."""
    return statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summarise(result: dict[str, Any], options: argparse.Namespace, rail: str) -> dict[str, Any]:
    rows = []
    for row in result["rows"]:
        speeds = {name: _middle(values) for name, values in row["gb_per_s"].items()}
        pairs = row["gb_per_s"]
        ratios = {name: _ratio(pairs, "adaptra", name) for name in pairs if name != "adaptra"}
        rows.append(
            {
                "kib": row["kib"],
                "gb_per_s": {name: round(middle, 3) for name, (middle, _) in speeds.items()},
                "spread_percent": {name: round(spread, 1) for name, (_, spread) in speeds.items()},
                "ratio_to": {name: round(value, 3) for name, value in ratios.items()},
                "of_gloo": {name: round(_ratio(pairs, name, "gloo"), 3) for name in (*FLOORS[rail], "memcpy")},
            }
        )
    latency = {
        name: {"p50": round(_quantile(result[name], 0.5), 1), "p99": round(_quantile(result[name], 0.99), 1)}
        for name in ("round_trip_us", "gloo_round_trip_us", "send_call_us")
    }
    return {
        "rail": rail,
        "proxy": options.proxy,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load": os.getloadavg()[0],
        "connections_per_direction": options.connections,
        "ring_mib": options.ring_mib,
        "repeats": options.repeats,
        "sizes": rows,
        "cpu_us_of_4_kib": [round(value) for value in result["cpu_us"]],
        **latency,
    }


def table(summary: dict[str, Any]) -> str:
    lines = [f"rail {summary['rail']}, proxy in a {summary['proxy']}"]
    names = list(summary["sizes"][0]["gb_per_s"])
    others = [name for name in names if name != "adaptra"]
    lines += [f"{'size':>10} " + " ".join(f"{name + ' GB/s':>16}" for name in names)]
    lines[-1] += "".join(f" {'/ ' + name:>10}" for name in others)
    for row in summary["sizes"]:
        size = f"{row['kib']} KiB" if row["kib"] < 1024 else f"{row['kib'] / 1024:g} MiB"
        cells = [f"{row['gb_per_s'][name]:8.2f} (±{row['spread_percent'][name]:3.0f}%)" for name in names]
        ratios = [f"{row['ratio_to'][name]:10.2f}" for name in others]
        lines.append(" ".join([f"{size:>10}", *(f"{cell:>16}" for cell in cells), *ratios]))
    lines.append("of gloo's speed, without any protocol:")
    for row in summary["sizes"]:
        limits = ", ".join(f"{name} {value:.2f}" for name, value in row["of_gloo"].items())
        lines.append(f"{row['kib'] / 1024:>6g} MiB {limits}")
    trip, gloo, call = (summary[name] for name in ("round_trip_us", "gloo_round_trip_us", "send_call_us"))
    lines.append(
        f"round trip of 4 B: p50 {trip['p50']} us, p99 {trip['p99']} us; gloo p50 {gloo['p50']} us: "
        f"{trip['p50'] / gloo['p50']:.2f} times as long"
    )
    lines.append(f"send() of 4 KiB with 64 MiB queued returns after: p50 {call['p50']} us, p99 {call['p99']} us")
    sender, receiver = summary["cpu_us_of_4_kib"]
    lines.append(f"CPU time of a message of 4 KiB: {sender} us at its sender, {receiver} us at its receiver")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rails", nargs="+", choices=["shm", "tcp", "rdma"], default=["shm", "tcp"])
    parser.add_argument(
        "--pin", action="store_true", help="each rank, with its proxy and gloo's thread, on one processor"
    )
    parser.add_argument("--proxy", choices=["process", "thread"], default="process")
    parser.add_argument("--sizes-kib", type=int, nargs="+", default=[64, 1024, 4096, 16384, 65536])
    parser.add_argument("--volume-mib", type=int, default=256, help="bytes moved per size, way and repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trips", type=int, default=1000)
    parser.add_argument("--messages", type=int, default=5000, help="of 4 KiB, for their CPU time")
    parser.add_argument("--connections", type=int, default=2)
    parser.add_argument("--ring-mib", type=int, default=72)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    summaries = []
    for rail in options.rails:
        summaries.append(summarise(measure(options, rail), options, rail))
        print(table(summaries[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(summaries, indent=2) + "\n")


if __name__ == "__main__":
    main()
