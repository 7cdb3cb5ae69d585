"""What happens to a job when something goes wrong in the middle of training."""

from __future__ import annotations

import os
import re
import signal
import socket
import time

import pytest

from tests.forked import finish_ranks, import_deepspeed, run_ranks, start_ranks
from tests.patches.models import assert_same, train
from tests.report.wandb_files import Run
from tests.switching import CAUSED, FIRST, plans_follow

import_deepspeed()
pytestmark = pytest.mark.multiprocess


def dies(rank, stages, victim, at_step):
    """The victim is killed while it computes the forward of a microbatch."""

    def during(engine, step):
        if rank == victim and step == at_step:
            forwards = iter(range(100))

            def hook(*_):
                if next(forwards) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            engine.module.register_forward_pre_hook(hook)
            engine.module.forward_funcs[0].register_forward_pre_hook(hook)

    train({}, {"peer_exit_grace_s": 10}, [8] * 20, stages=stages, during=during)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_others_with_an_error_that_names_it(victim):
    begun = time.monotonic()
    outcomes = finish_ranks(start_ranks(dies, 4, 4, victim, 2), timeout=60)
    assert time.monotonic() - begun < 45
    assert outcomes[victim].exitcode == -signal.SIGKILL
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.error is not None and outcome.error.startswith("PeerLostError"), outcome.error
            first_line = outcome.error.splitlines()[0]
            assert re.search(rf"rank {victim} \(stage {victim}, host \S+\)", first_line), first_line


def refusals(engine):
    return engine.adaptra.status()["transport"]["refused_connections"]


def attacked(rank):
    """Strangers talk to rank 0's port while it trains."""
    steps = [5, 8, 5, 8]
    stock = train({}, None, steps, stages=2)
    refused = []

    def during(engine, step):
        if rank == 0:
            host, port = engine.adaptra._endpoint.address.host, engine.adaptra._endpoint.address.port
            for junk in (b"", b"GET / HTTP/1.1\r\n\r\n" * 20, os.urandom(4096), b"\x00" * 100):
                with socket.create_connection((host, port), timeout=5) as stranger:
                    try:
                        stranger.sendall(junk)
                        stranger.shutdown(socket.SHUT_WR)
                        while stranger.recv(4096):
                            pass
                    except OSError:
                        pass  # refused in the middle of the junk: just as well
            until = time.monotonic() + 10  # the stranger may see the end before it is counted
            while time.monotonic() < until and refusals(engine) < 4 * (step + 1):
                time.sleep(0.01)
            refused.append(refusals(engine))

    ours = train({}, {}, steps, stages=2, during=during)
    assert_same(stock, ours)
    return refused


def test_strangers_are_refused_and_training_is_unharmed():
    refused, _ = run_ranks(attacked, 2)
    assert refused[-1] == 4 * 4


def user_error(rank):
    def during(engine, step):
        if rank == 1 and step == 1:
            raise ZeroDivisionError("in the user's own code")

    train({}, {"transport": {"deadline_s": 20}}, [8] * 5, stages=2, during=during)


def test_an_error_in_one_rank_ends_the_other_one():
    healthy, failed = finish_ranks(start_ranks(user_error, 2), timeout=60)
    assert failed.error is not None and failed.error.startswith("ZeroDivisionError")
    assert healthy.error is not None and "rank 1 (stage 1" in healthy.error.splitlines()[0]


def broken_data(rank):
    """The data loader of the last stage fails in the middle of an iteration."""
    import deepspeed

    import adaptra_plugin
    from tests.patches.models import BASE_CONFIG, QUIET, batches, build

    adaptra_plugin.activate()
    deepspeed.init_distributed()
    model = build("tied", 4)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config={**BASE_CONFIG, "adaptra": QUIET}
    )
    engine.train_batch(iter(batches(8, 2, seed=1)))

    def loader():
        yield from batches(3, 2, seed=2)
        if rank == 3:
            raise OSError("the disk is gone")
        yield from batches(5, 2, seed=3)

    engine.train_batch(loader())


def test_all_ranks_hear_why_one_of_them_failed():
    outcomes = finish_ranks(start_ranks(broken_data, 4), timeout=60)
    assert outcomes[3].error is not None and outcomes[3].error.startswith("OSError")
    for outcome in outcomes[:3]:
        first_line = (outcome.error or "").splitlines()[0]
        assert "rank 3 (stage 3" in first_line and "OSError: the disk is gone" in first_line


def life(rank):
    """Several engines, one after the other, in one process."""
    import gc
    import threading

    import deepspeed

    import adaptra_plugin
    from tests.patches.models import BASE_CONFIG, QUIET, batches, build

    deepspeed.init_distributed()
    counts = []
    for ending in ("destroy", "dropped", "deactivate"):
        adaptra_plugin.activate()
        model = build("tied", 2)
        engine = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config={**BASE_CONFIG, "adaptra": QUIET}
        )[0]
        engine.eval_batch(iter(batches(40, 2, seed=1)), num_micro_batches=40)
        assert len(engine.pipe_buffers["outputs"]) == 2, "an evaluation keeps two microbatches, however many it has"
        engine.train_batch(iter(batches(8, 2, seed=1)))
        assert all(slot is None for slots in engine.pipe_buffers.values() for slot in slots)
        if ending == "destroy":
            engine.destroy()
        elif ending == "deactivate":
            adaptra_plugin.deactivate()
        if ending != "dropped":
            assert not any("forward" in vars(m) for m in model.modules())
        del engine, model  # DeepSpeed's hooks on the model keep the engine alive
        gc.collect()
        counts.append((len(adaptra_plugin.status()["sessions"]), [t.name for t in threading.enumerate()]))
    return counts


def test_a_session_ends_with_its_engine():
    for counts in run_ranks(life, 2):
        for sessions, threads in counts:
            assert sessions == 0
            assert not [name for name in threads if name.startswith("adaptra")]


def too_small(rank):
    from adaptra_plugin.errors import PlanError

    with pytest.raises(PlanError, match="stage 0 allows 1 activations, 1f1b needs 2"):
        train({}, {"schedule": "1f1b", "max_activations": 1}, [], stages=2)


def test_limits_that_cannot_be_kept_are_refused_at_start():
    run_ranks(too_small, 2)


def resumed(rank, folder):
    """Saved under Adaptra, loaded by a new engine under Adaptra and by a stock one: both go on alike."""

    def save(engine, step):
        if step == 1:
            engine.save_checkpoint(folder, tag="t")

    whole = train({}, None, [5, 5, 8, 8], stages=2)
    saved = train({}, {}, [5, 5, 8, 8], stages=2, during=save)
    assert_same(whole, saved)
    again = [train({}, block, [8, 8], stages=2, load=(folder, 2)) for block in (None, {})]
    assert_same(*again)
    assert again[0]["losses"][0] < whole["losses"][0], "the checkpoint was loaded"


def test_checkpoints_are_interchangeable_with_stock(tmp_path):
    run_ranks(resumed, 2, str(tmp_path))


def wandb_run(rank, folder):
    import wandb

    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true")
    report = {"report": {"directory": f"{folder}/events", "wandb": "auto"}}
    links = {"simulate": {"links": [{"src": 0, "dst": 1, "latency_ms": 120, "from_iteration": 6}]}}
    block = {**report, **links, **CAUSED}
    host = {"wandb": {"enabled": True, "project": "host"}}
    train(host, block, [8] * 12, stages=2, during=plans_follow(block, (FIRST, 6)))
    if wandb.run is None:
        return None
    run_id = wandb.run.id
    wandb.finish()
    return run_id


def test_events_reach_the_wandb_run_of_deepspeeds_monitor(tmp_path):
    run_id, other = run_ranks(wandb_run, 2, str(tmp_path))
    assert run_id is not None, "Adaptra must not finish the host's run"
    assert other is None
    run = Run(tmp_path)  # fails if there are two
    assert run.path.name == f"run-{run_id}.wandb"
    assert len(run.series("Train/Samples/train_loss")) == 12, "the host's own values are all there"
    assert run.series("adaptra/iteration")
    rows = [row[1:3] for row in run.table("adaptra/events")["data"]]
    assert rows == [["link 0-1", "slow"]]
    assert any(alert.text.startswith("link 0-1 ") for alert in run.alerts)
