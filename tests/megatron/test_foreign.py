"""What other packages and users put into Megatron's pipeline, and settings that must do what they say."""

from __future__ import annotations

import functools

import pytest
import torch

from adaptra_plugin.errors import UnsupportedError
from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.forked import run_ranks
from tests.megatron.runs import SLOW, STEPS, assert_same, loaded, run

loaded()
pytestmark = pytest.mark.multiprocess
JOB = GptJob(pipeline=2)


def deferred(rank, block):
    """Trains with a block, and counts what W gets to do."""
    from adaptra_plugin.runtime import weight_grad_store

    counted, stock = [], weight_grad_store.WeightGradStore.defer

    def counting(self, weight, use):
        counted.append(weight)
        stock(self, weight, use)

    weight_grad_store.WeightGradStore.defer = counting
    return {**run(rank, JOB, block, STEPS), "deferred": len(counted)}


def test_split_backward_off_defers_nothing():
    stock = run_ranks(run, 2, JOB, None, STEPS)
    on = run_ranks(deferred, 2, {})
    off = run_ranks(deferred, 2, {**SLOW, "split_backward": False})
    assert_same(stock, on)
    assert_same(stock, off)
    assert all(result["deferred"] > 100 for result in on) and all(result["deferred"] == 0 for result in off)
    assert all(result["status"]["sessions"][0]["split_layers"] == 0 for result in off)


def patched_function(rank, block):
    """Another package replaces the Function of linear layers, by a subclass, after the plug-in is active."""
    from megatron.core.tensor_parallel import layers

    import adaptra_plugin

    name = "LinearWithGradAccumulationAndAsyncCommunication"
    stock = getattr(layers, name)

    class Theirs(stock):
        """Scales what the weight learns: if it were lost, losses would differ."""

        @staticmethod
        def backward(ctx, grad):
            found = list(stock.backward(ctx, grad))
            found[1] = found[1] * 0.5
            return tuple(found)

    activate = adaptra_plugin.activate

    def activate_and_patch(*args):
        activate(*args)
        setattr(layers, name, Theirs)

    adaptra_plugin.activate = activate_and_patch
    if block is None:
        setattr(layers, name, Theirs)
    result = run(rank, JOB, block, STEPS)
    assert getattr(layers, name) is Theirs, "deactivating does not take it away"
    return result


def test_a_function_of_another_package_is_not_lost():
    stock, ours = run_ranks(patched_function, 2, None), run_ranks(patched_function, 2, {})
    assert_same(stock, ours)
    assert all(result["status"]["sessions"][0]["plan_version"] >= 0 for result in ours), "plans run it, unsplit"


def wrapped_schedule(rank, block, calls):
    """Another package has put a schedule of its own there before the plug-in came."""
    from megatron.core.pipeline_parallel import schedules

    stock = schedules.forward_backward_pipelining_without_interleaving

    @functools.wraps(stock)
    def theirs(**arguments):
        calls.append(arguments["num_microbatches"])
        return stock(**arguments)

    schedules.forward_backward_pipelining_without_interleaving = theirs
    return {**run(rank, JOB, block, STEPS), "calls": calls}


def stepping(rank, block, who):
    """A hook on a parameter of one rank that changes it as soon as its gradient is there."""

    from adaptra_plugin.launch import megatron_gpt

    build = megatron_gpt.GptTrainer.__init__

    def built(self, job):
        build(self, job)
        if rank == who:
            for chunk in self.chunks:
                for parameter in chunk.parameters():
                    parameter.register_post_accumulate_grad_hook(lambda p: (p.data.mul_(0.999), None)[1])

    megatron_gpt.GptTrainer.__init__ = built
    return run(rank, JOB, block, STEPS)


def other_transfers(rank, block, calls):
    """Another package moves tensors by itself."""
    from megatron.core.pipeline_parallel import p2p_communication

    stock = p2p_communication._p2p_ops

    def theirs(**arguments):
        calls.append(arguments["tensor_send_next"] is not None)
        return stock(**arguments)

    p2p_communication._p2p_ops = theirs
    return {**run(rank, JOB, block, STEPS), "calls": calls}


def same_as_stock(function, *args):
    stock, ours = run_ranks(function, 2, None, *args), run_ranks(function, 2, {}, *args)
    assert_same(stock, ours)
    return ours


def levels(results):
    return [[(it["level"], len(it["reasons"])) for it in result["status"]["sessions"]] for result in results]


def test_a_schedule_of_another_package_runs_as_it_is():
    ours = same_as_stock(wrapped_schedule, [])
    assert all(result["calls"] == list(STEPS) for result in ours)
    assert levels(ours) == [[("stock-order", 1)]] * 2, "its transfers are delegated"


def test_an_optimizer_that_steps_in_hooks_on_one_rank_trains_as_in_stock():
    assert levels(same_as_stock(stepping, 1)) == [[("stock-order", 1)]] * 2


def test_transfers_of_another_package_are_left_to_it():
    stock, ours = run_ranks(other_transfers, 2, None, []), run_ranks(other_transfers, 2, {}, [])
    for a, b in zip(stock, ours, strict=True):
        assert all(a[name] == b[name] for name in ("losses", "norms", "parameters"))
    assert levels(ours) == [[]] * 2, "no session"
    assert sum(ours[0]["calls"]) == sum(STEPS)


class MultiModulePipelineCommunicator:
    """Has the name of Megatron's own, for pipelines of several modules."""


def test_several_modules_in_one_pipeline_run_as_they_are():
    from adaptra_plugin.patches.megatron_foreign import reasons_for_stock

    assert reasons_for_stock(MultiModulePipelineCommunicator()) == ["several modules share one pipeline"]
    assert reasons_for_stock() == []


def later(rank):
    from megatron.core.pipeline_parallel import p2p_communication

    def during(trainer, step):
        if step == 1:
            p2p_communication._p2p_ops = lambda **arguments: None

    with pytest.raises(UnsupportedError, match="replaced after training with Adaptra had begun"):
        run(rank, JOB, {}, STEPS, during=during)


def test_what_is_replaced_in_mid_training_is_refused():
    run_ranks(later, 2)


def test_the_parameters_of_a_schedule_that_have_changed_are_named():
    from adaptra_plugin.runtime.stepping import Unstepped

    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, dtype=torch.bfloat16))
    unstepped = Unstepped(module.named_parameters())
    unstepped.check()
    module[1].bias.data[2] += 1.0
    with pytest.raises(UnsupportedError, match=r"1 of 4 parameters \(the first: 1\.bias\) have changed"):
        unstepped.check()
