"""Jobs that get less than plans: they keep the stock order or their own, with transfers, detection and reports, and results of stock."""

from __future__ import annotations

import gc
import json
import logging
import weakref

import pytest
import torch
from torch import nn

import adaptra_plugin
from adaptra_plugin.errors import UnsupportedError
from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import BASE_CONFIG, HIDDEN, QUIET, Block, assert_same, batches, build, loss_fn, train
from tests.switching import CAUSED, plans_follow

import_deepspeed()
import deepspeed  # noqa: E402
from deepspeed.pipe import LayerSpec  # noqa: E402
from deepspeed.runtime.pipe import p2p  # noqa: E402
from deepspeed.runtime.pipe.schedule import PipeInstruction, TrainSchedule  # noqa: E402

pytestmark = pytest.mark.multiprocess


class OwnSchedule(TrainSchedule):
    pass


class OnebitAdam(torch.optim.Adam):
    """Has the name of DeepSpeed's class, which cannot be built without its communication backend."""


class Mine(OnebitAdam):
    pass


def kept_order(rank, case):
    def prepare(engine):
        if case == "engine.compile":
            engine.compile(backend="eager")
        elif case == "module.compile":
            engine.module.compile(backend="eager")
        elif case == "a layer":
            next(layer for layer in engine.module.forward_funcs if isinstance(layer, Block)).compile(
                backend="aot_eager"
            )
        elif case == "contiguous checkpoints":
            deepspeed.checkpointing.configure(None, None, True, True, num_checkpoints=40)

    more = {"optimizer": lambda parameters: Mine(parameters, lr=0.01)} if case == "1-bit" else {}
    if case == "contiguous checkpoints":
        more["model_kwargs"] = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
    stock = train({}, None, [5, 8, 8], stages=2, evaluate_after=(1,), prepare=prepare, **more)
    ours = train({}, {}, [5, 8, 8], stages=2, evaluate_after=(1,), prepare=prepare, **more)
    assert_same(stock, ours)
    return ours["status"]["sessions"][0], {action[1] for action in ours["actions"]}


KEPT = {
    "engine.compile": "torch.compile",
    "module.compile": "torch.compile",
    "a layer": "torch.compile",
    "1-bit": "1-bit optimizers",
    "contiguous checkpoints": "contiguous activation checkpoints",
}


@pytest.mark.parametrize("case", KEPT)
def test_the_stock_order_is_kept_with_the_results_of_stock(case):
    for session, kinds in run_ranks(kept_order, 2, case):
        assert session["level"] == "stock-order" and kinds == {"F", "B"} and session["split_layers"] == 0
        assert KEPT[case] in session["reasons"][0]
        assert session["iteration"] == 3 and session["transport"], "its transfers are Adaptra's"


def compiled_later(rank):
    def during(engine, step):
        if step == 1:
            engine.compile(backend="eager")

    with pytest.raises(UnsupportedError, match="changed after training with plans had begun: torch"):
        train({}, {}, [5, 8, 8], stages=2, during=during)


def test_what_is_compiled_after_plans_have_begun_is_refused():
    run_ranks(compiled_later, 2)


def own_schedule(rank, since):
    """Losses and parameters are those of stock. What was logged, and what ran; the schedule is replaced before step `since`."""
    seen, handler = [], logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("adaptra").addHandler(handler)

    def replace(engine):
        engine._train_schedule = lambda: OwnSchedule(engine.micro_batches, engine.num_stages, engine.stage_id)

    at = {"prepare": replace} if since == 0 else {"during": lambda engine, step: step == since - 1 and replace(engine)}
    stock = train({}, None, [8, 8, 8], stages=2, **at)
    ours = train({}, {}, [8, 8, 8], stages=2, **at)
    assert_same(stock, ours)
    told = [text for text in seen if "OwnSchedule is no schedule that Adaptra knows" in text]
    return told, ours["status"]["sessions"][0], ours["actions"]


def moved(session):
    """Messages that were sent or received."""
    ends = [end for peer in session["transport"]["peers"].values() for end in peer["directions"].values()]
    return sum(end[way]["messages"] for end in ends for way in ("sent", "received"))


def test_an_unknown_schedule_is_followed():
    results = run_ranks(own_schedule, 2, 0)
    (line,) = results[0][0]
    assert "keeps its own schedule" in line
    for _, session, actions in results:
        assert session["level"] == "stock-order" and session["iteration"] == 3
        assert len(actions) == 16 and {action[1] for action in actions} == {"F", "B"}
        assert moved(session) >= 3 * 16, "its transfers are Adaptra's"


def test_an_unknown_schedule_that_comes_later_runs_as_it_is_with_one_warning():
    for told, session, _ in run_ranks(own_schedule, 2, 1):
        (line,) = told
        assert "it runs as DeepSpeed runs it" in line
        assert session["level"] == "full" and session["iteration"] == 1


def test_dual_pipe_is_followed():
    for session in run_ranks(dual_pipe, 2):
        assert session["level"] == "stock-order" and "DualPipeVSchedule is no schedule" in session["reasons"][0]
        assert session["iteration"] == 3 and moved(session) >= 3 * 16


def dual_pipe(rank):
    """Three steps of a model that is cut in four, on two ranks."""
    from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine

    results, names = [], []
    for adaptra in ({}, {"adaptra": QUIET}):
        if adaptra:
            adaptra_plugin.activate()
        deepspeed.init_distributed()
        layers = [LayerSpec(Block) for _ in range(8)]
        first = LayerSpec(nn.Embedding, 17, HIDDEN)
        model = deepspeed.DualPipeVModule(
            layers=[first, *layers],
            num_stages=2,
            loss_fn=loss_fn,
            partition_method="uniform",
            seed_layers=True,
            base_seed=7,
        )
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config={**BASE_CONFIG, **adaptra}
        )
        torch.manual_seed(3)
        names.append(type(engine).__name__)
        losses = [engine.train_batch(iter(batches(8, 2, seed=step))).item() for step in range(3)]
        losses.append(engine.eval_batch(iter(batches(8, 2, seed=9))).item())
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
        sessions = adaptra_plugin.status()["sessions"]
        adaptra_plugin.deactivate()
    assert names == ["DualPipeVEngine", "AdaptraDualPipeVEngine"] and deepspeed.DualPipeVEngine is DualPipeVEngine
    (stock, before), (ours, after) = results
    assert stock == ours and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return sessions[0]


def slow_link(rank, folder, prepare):
    block = {
        **CAUSED,
        "simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 40, "from_iteration": 4}]},
        "report": {"directory": str(folder), "wandb": "off"},
    }
    stock = train({}, None, [5] * 9, stages=2, prepare=prepare)
    ours = train({}, block, [5] * 9, stages=2, prepare=prepare, during=plans_follow(block, ()))
    assert_same(stock, ours)
    return ours["status"]["sessions"][0]


def compiled(engine):
    engine.compile(backend="eager")


def of_its_own(engine):
    engine._train_schedule = lambda: OwnSchedule(engine.micro_batches, engine.num_stages, engine.stage_id)


@pytest.mark.parametrize("prepare", [compiled, of_its_own])
def test_a_slow_link_is_found_without_plans(prepare, tmp_path):
    sessions = run_ranks(slow_link, 2, tmp_path, prepare)
    assert {(session["level"], session["plan_version"]) for session in sessions} == {("stock-order", 0)}
    records = [json.loads(line) for line in (tmp_path / "rank00000.jsonl").read_text().splitlines()]
    (event,) = [record for record in records if record["type"] == "event"]
    assert (event["kind"], event["link"], event["state"], event["since_iteration"]) == ("link", "0-1", "slow", 4)
    assert event["action"] == "none: schedule 1f1b does not adapt"
    assert [record["reasons"] for record in records if record["type"] == "stock-order"] == [sessions[0]["reasons"]]
    assert sum(record["type"] == "iteration" for record in records) == 9


class Greet(PipeInstruction):
    pass


class Greeting(TrainSchedule):
    """Begins with transfers that DeepSpeed has not."""

    def steps(self):
        yield [Greet()]
        yield from super().steps()


def greet(engine):
    """From the last stage to the first one, which are no neighbours; and to a neighbour, which receives in another shape."""
    if engine.stage_id == 2:
        p2p.send(torch.arange(3.0), 0)
    elif engine.stage_id == 0:
        p2p.send(torch.arange(6.0), 1)
        around = torch.empty(3)
        p2p.recv(around, 2)
        assert around.tolist() == [0.0, 1.0, 2.0]
    else:
        shaped = torch.empty(2, 3)
        p2p.recv(shaped, 0)
        assert shaped.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def greeting(engine):
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, Greet: greet}
    engine._train_schedule = lambda: Greeting(engine.micro_batches, engine.num_stages, engine.stage_id)


def unusual(rank):
    stock = train({}, None, [5, 8], stages=3, prepare=greeting)
    ours = train({}, {}, [5, 8], stages=3, prepare=greeting)
    assert_same(stock, ours)
    return ours["status"]["sessions"][0]["level"]


def test_unusual_transfers_of_a_schedule_are_its_own():
    assert run_ranks(unusual, 3) == ["stock-order"] * 3


def gone(rank):
    adaptra_plugin.activate()
    deepspeed.init_distributed()
    model = build("tied", 2)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config={**BASE_CONFIG, "adaptra": QUIET}
    )
    of_its_own(engine)
    engine.train_batch(iter(batches(8, 2, seed=1)))
    session, seen = engine.adaptra, weakref.ref(engine)
    assert session.follows and not session.closed
    del engine, model
    gc.collect()
    return seen() is None, session.closed


def test_a_followed_engine_goes_with_its_last_reference():
    assert run_ranks(gone, 2) == [(True, True)] * 2
