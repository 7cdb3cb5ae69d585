"""What real jobs do beyond training one whole model: adapters, frozen stages, other callers of the schedule, optimizers that gather
parameters in their step."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.forked import run_ranks
from tests.megatron.runs import SLOW, assert_same, both, loaded, microbatches, run

loaded()
pytestmark = pytest.mark.multiprocess

GATHERED = GptJob(
    chunks=2,
    dtype="bf16",
    distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    aligned=True,
    optimizer={"overlap_param_gather_with_optimizer_step": True},
)


def test_parameters_gathered_in_the_optimizers_step():
    stock, ours = both(GATHERED, 4, SLOW)
    assert_same(stock, ours)
    assert all(result["status"]["sessions"][0]["level"] == "full" for result in ours)


class Adapter(torch.nn.Module):
    """Low-rank, beside a frozen linear layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        size, width = layer.weight.shape
        self.down = torch.nn.Linear(width, 4, bias=False)
        self.up = torch.nn.Linear(4, size, bias=False)


def adapted(model):
    """Freezes all, and puts adapters beside the linear layers of the blocks."""
    model.requires_grad_(False)
    for layer in list(model.decoder.modules()):
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            layer.adapter = Adapter(layer)
            layer.register_forward_hook(add)


def add(layer, inputs, outputs):
    y, bias = outputs
    return y + layer.adapter.up(layer.adapter.down(inputs[0])), bias


def frozen_first(model):
    """Like a vision tower that is not trained."""
    if model.pre_process:
        model.requires_grad_(False)


def frozen_layers(model):
    """The lower half of each stage's layers, and the output layer."""
    model.decoder.layers[0].requires_grad_(False)
    if model.post_process:
        model.output_layer.requires_grad_(False)


FROZEN = {
    "adapters": GptJob(prepare=adapted),
    "adapters-vpp2": GptJob(prepare=adapted, chunks=2),
    "first stage": GptJob(prepare=frozen_first, pipeline=4),
    "layers": GptJob(prepare=frozen_layers, distributed_optimizer=True),
    "layers-vpp2": GptJob(prepare=frozen_layers, chunks=2, overlap_grad_reduce=True),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_not_trained(name):
    job = FROZEN[name]
    stock, ours = both(job, job.pipeline, SLOW)
    assert_same(stock, ours)
    assert all(result["status"]["sessions"][0]["level"] == "full" for result in ours)


def with_a_teacher(rank, block):
    """Another model of the same process runs forward only, with a forward step and results of its own; then the model is trained."""
    from megatron.core.pipeline_parallel import schedules

    job, results, teachers = GptJob(), [], []

    def logits(iterator, model):
        tokens, _ = next(iterator)
        positions = torch.arange(tokens.shape[1]).unsqueeze(0).expand_as(tokens)
        mask = torch.triu(torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool), 1)
        return model(tokens, positions, mask), lambda output, non_loss_data=True: output.detach().float().sum().item()

    def during(trainer, step):
        if not teachers:
            torch.manual_seed(5)
            teachers.append(trainer._chunk(0))
        with torch.no_grad():
            results.append(
                schedules.get_forward_backward_func()(
                    forward_step_func=logits,
                    data_iterator=microbatches(job, 3, step, ()),
                    model=teachers[0],
                    num_microbatches=3,
                    seq_length=job.sequence,
                    micro_batch_size=job.micro_batch,
                    forward_only=True,
                    collect_non_loss_data=True,
                )
            )

    found = run(rank, job, block, (4, 4, 4), during=during)
    return {**found, "evaluations": results, "sessions": len(found["status"]["sessions"])}


def test_a_second_model_that_runs_forward_only():
    stock, ours = run_ranks(with_a_teacher, 2, None), run_ranks(with_a_teacher, 2, SLOW)
    assert_same(stock, ours)
    assert len(stock[1]["evaluations"][2]) == 3 and isinstance(stock[1]["evaluations"][0][0], float)
    assert all(result["sessions"] == 2 for result in ours)
