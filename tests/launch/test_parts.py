"""The parts of the demo that need no training."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaptra_plugin.config import SimulateConfig
from adaptra_plugin.launch.corpus import Windows, read_corpus
from adaptra_plugin.launch.demo_report import measured
from adaptra_plugin.launch.progress import Progress, read
from tests.forked import import_deepspeed

import_deepspeed()


def test_windows_are_text_and_its_next_bytes_and_the_same_for_a_seed():
    corpus = read_corpus(200_000)
    inputs, labels = next(Windows(corpus, 3, 16, seed=1))
    assert inputs.shape == labels.shape == (3, 16) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert bytes(inputs[0].tolist()) in bytes(corpus.tolist())
    again = next(Windows(corpus, 3, 16, seed=1))
    assert torch.equal(inputs, again[0]) and not torch.equal(inputs, next(Windows(corpus, 3, 16, seed=2))[0])


def test_windows_leave_torchs_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    next(Windows(read_corpus(200_000), 2, 8, seed=1))
    assert torch.equal(torch.rand(1), expected)


class _Pipe(io.RawIOBase):
    """Keeps each write by itself: between two of them, another process may write to a shared pipe."""

    def __init__(self) -> None:
        self.writes: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.writes.append(bytes(data).decode())  # type: ignore[call-overload]
        return len(self.writes[-1].encode())


def test_progress_is_read_from_a_pipe_that_other_processes_write_to(monkeypatch: pytest.MonkeyPatch):
    pipe = _Pipe()
    # as `python -u` opens it
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, write_through=True))
    Progress(14, 3.41974, 416.34).say()
    (line,) = pipe.writes
    assert line.endswith("\n")
    assert read(line) == read("half a line of another rank's log" + line) == Progress(14, 3.4197, 416.3)
    assert read("adaptra-progress 14 3.41") is None and read("loss 3.4\n") is None
    Progress(15, float("nan"), 1.0).say()
    said = read(pipe.writes[-1])
    assert said is not None and said.done == 15 and said.loss != said.loss


def test_a_stock_transfer_over_a_slow_link_blocks_the_sender(monkeypatch: pytest.MonkeyPatch):
    from deepspeed.runtime.pipe import schedule

    from adaptra_plugin.launch.stock import StockSimulation

    done: list[object] = []
    monkeypatch.setattr(time, "sleep", done.append)
    config = SimulateConfig.model_validate({"links": [{"src": 1, "dst": 2, "latency_ms": 40, "from_iteration": 3}]})
    commands = (schedule.ForwardPass, schedule.BackwardPass, schedule.SendActivation, schedule.SendGrad)
    stock = {command: lambda engine, it=command.__name__: done.append(it) for command in commands}
    engine = SimpleNamespace(stage_id=1, _INSTRUCTION_MAP=stock)
    simulation = StockSimulation(engine, config)
    for iteration, command in ((2, schedule.SendActivation), (3, schedule.SendActivation), (3, schedule.SendGrad)):
        simulation.set_iteration(iteration)
        engine._INSTRUCTION_MAP[command](engine)
    assert done == ["SendActivation", 0.04, "SendActivation", "SendGrad"], (
        "only over the slow link, from the iteration on"
    )


def test_a_stage_computes_for_at_most_a_quarter_of_what_the_demo_paces_it_to():
    """CPU time, the best of several: other work on the machine does not count."""
    from adaptra_plugin.launch.demo import STAGES
    from adaptra_plugin.launch.model import Block, Embedding, GptSize

    config = json.loads((Path(__file__).parents[2] / "configs" / "demo.json").read_text())
    size, count = GptSize(), config["train_micro_batch_size_per_gpu"]
    assert size.blocks % STAGES == 0
    stage = torch.nn.Sequential(Embedding(size), *(Block(size) for _ in range(size.blocks // STAGES)))
    tokens = torch.zeros(count, size.sequence, dtype=torch.int64)
    threads, taken = torch.get_num_threads(), []
    torch.set_num_threads(1)  # as the demo's ranks
    for _ in range(30):
        began = time.thread_time()
        stage(tokens).sum().backward()
        taken.append((time.thread_time() - began) * 1e3)
    torch.set_num_threads(threads)
    assert min(taken) <= sum(config["adaptra"]["simulate"]["compute"].values()) / 4


def record(stage: int, started: float, spans: list[tuple[str, float, float]]) -> dict[str, object]:
    delays = {f"{stage - 1}-{stage}": 5.0} if stage else {}
    return {
        "type": "iteration",
        "iteration": 4,
        "pp_rank": stage,
        "started_unix_ms": started,
        "spans": spans,
        "link_delay_ms": delays,
    }


def test_measured_timelines_share_one_clock():
    first = record(0, 1000.0, [("0F0", 1.0, 3.0), ("0F1", 2.9999, 5.0)])
    second = record(1, 1002.0, [("1F0", 6.0, 8.0)])
    timeline = measured([[first], [second]], 4)
    spans = {str(span.action): (span.start_ms, span.end_ms) for span in timeline.spans}
    assert spans["0F0"] == (0.0, 2.0) and spans["1F0"] == (7.0, 9.0)
    assert spans["0F1"][0] == spans["0F0"][1], "rounding makes no overlap"
    (moved, _) = timeline.transfers
    assert (moved.src, moved.dst, moved.ready_ms, moved.end_ms) == (0, 1, 2.0, 7.0)
