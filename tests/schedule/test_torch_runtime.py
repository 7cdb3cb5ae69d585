"""torch's own pipeline runtime loads our CSV and runs it on four real ranks: gradients equal those of its 1F1B."""

from __future__ import annotations

import multiprocessing
import warnings

import pytest

from adaptra_plugin.schedule.planner import plan
from tests.schedule.helpers import even

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.pipelining")

RANKS, WIDTH, BATCH = 4, 16, 8


def chunk(stage):
    torch.manual_seed(100 + stage)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())


def gradients(make, stages_of_rank, total, microbatches, data, target, rank):
    from torch.distributed.pipelining import PipelineStage

    mods = [chunk(s) for s in stages_of_rank]
    stages = [PipelineStage(m, s, total, torch.device("cpu")) for m, s in zip(mods, stages_of_rank, strict=True)]
    runtime = make(stages, microbatches)
    inputs = (data,) if 0 in stages_of_rank else ()
    extra = {"target": target, "losses": []} if total - 1 in stages_of_rank else {}
    runtime.step(*inputs, **extra)
    return {
        f"{s}.{name}": p.grad.clone()
        for m, s in zip(mods, stages_of_rank, strict=True)
        for name, p in m.named_parameters()
    }


def rank_main(rank, directory, csvs, virtual, microbatches, out):
    warnings.filterwarnings("ignore")
    import torch.distributed as dist
    from torch.distributed.pipelining import schedules

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    data, target = torch.randn(microbatches * BATCH, WIDTH), torch.randn(microbatches * BATCH, WIDTH)
    loss = torch.nn.MSELoss()
    total = RANKS * virtual
    mine = list(range(rank, total, RANKS))

    def stock(stages, n):
        if virtual == 1:
            return schedules.Schedule1F1B(stages[0], n, loss_fn=loss)
        return schedules.ScheduleInterleaved1F1B(stages, n, loss_fn=loss)

    def ours(path):
        def make(stages, n):
            runtime = schedules._PipelineScheduleRuntime(stages, n, loss_fn=loss)
            runtime._load_csv(path, format="compute_only")
            return runtime

        return make

    wanted = gradients(stock, mine, total, microbatches, data, target, rank)
    worst = 0.0
    for path in csvs:
        got = gradients(ours(path), mine, total, microbatches, data, target, rank)
        assert got.keys() == wanted.keys()
        for name, grad in got.items():
            worst = max(worst, float((grad - wanted[name]).abs().max() / wanted[name].abs().max()))
    out.put((rank, worst))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("virtual", "names"),
    [
        (1, ["slack-adaptive", "zb-h1", "zb-h2", "1f1b", "gpipe"]),
        (2, ["slack-adaptive-interleaved", "interleaved-1f1b"]),
    ],
)
def test_torch_runs_our_schedules(virtual, names, tmp_path):
    microbatches = 8
    profile = even(RANKS * virtual, microbatches, (3, 4, 2), links=[(1, 2, 12.0)], virtual=virtual)
    csvs = []
    for name in names:
        path = tmp_path / f"{name}.csv"
        path.write_text(plan(profile, schedule=name).schedule.to_csv())
        csvs.append(str(path))
    context = multiprocessing.get_context("fork")  # the parent has imported torch: ranks start at once
    out = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(r, str(tmp_path), csvs, virtual, microbatches, out), daemon=True)
        for r in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        results = dict(out.get(timeout=90) for _ in ranks)
        for process in ranks:
            process.join(30)
        assert [process.exitcode for process in ranks] == [0] * RANKS
    finally:
        for process in ranks:
            process.kill()
    assert max(results.values()) < 1e-5
