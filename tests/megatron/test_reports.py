"""What Adaptra reports of a Megatron job."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.forked import run_ranks
from tests.megatron.runs import loaded, run
from tests.report.wandb_files import Run
from tests.switching import CAUSED, FIRST

loaded()
pytestmark = pytest.mark.multiprocess

BLOCK = {
    **CAUSED,
    "simulate": {
        "links": [{"src": 0, "dst": 1, "latency_ms": 60, "from_iteration": 7}],
        "compute": {"forward_ms": 4, "backward_input_ms": 4, "backward_weight_ms": 3},
    },
}


def with_a_run_on_the_last_rank(rank, folder, chunks):
    """As Megatron-LM does it: W&B on the last rank, and there only."""
    import wandb

    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true")
    last = rank == int(os.environ["WORLD_SIZE"]) - 1
    if last:
        wandb.init(project="megatron")

    def during(trainer, step):
        if last:
            wandb.log({"lm loss": 1.0 * step}, step)

    block = {**BLOCK, "report": {"directory": f"{folder}/events", "wandb": "auto"}}
    run(rank, GptJob(chunks=chunks), block, (4,) * 13, during=during, plans_after=(FIRST, 7))
    if not last:
        assert wandb.run is None
        return None
    assert wandb.run is not None, "Adaptra must not finish the host's run"
    run_id = wandb.run.id
    wandb.finish()
    return run_id


@pytest.mark.parametrize("chunks", [1, 2])
def test_events_reach_the_wandb_run_of_the_last_rank(tmp_path: Path, chunks: int) -> None:
    run_id = run_ranks(with_a_run_on_the_last_rank, 2, str(tmp_path), chunks)[-1]
    found = Run(tmp_path)  # fails if there are two
    assert found.path.name == f"run-{run_id}.wandb"
    assert len(found.series("lm loss")) == 13, "the host's own values are all there"
    assert found.series("adaptra/iteration")[-1] == 12
    assert len(found.series("adaptra/link_delay_ms/0-1")) > 5
    events = [row[1:3] for row in found.table("adaptra/events")["data"]]
    assert events == [["link 0-1", "slow"]]
    assert any(alert.text.startswith("link 0-1 ") for alert in found.alerts)
    records = [json.loads(line) for line in (tmp_path / "events/rank00000.jsonl").read_text().splitlines()]
    overviews = [record for record in records if record["type"] == "pipeline"]
    assert len(overviews) == 13 and len(overviews[0]["forward_ms"]) == 2
    plans = [record["plan"] for record in records if record["type"] == "plan"]
    assert plans and all(len(plan["ranks"]) == 2 for plan in plans)
    assert {action[0] for action in plans[-1]["ranks"][0]} == ({"0"} if chunks == 1 else {"0", "2"}), "stages of rank 0"
