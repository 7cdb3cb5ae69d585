"""Megatron's names are replaced on request only, and every one of them is put back."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import weakref
from importlib import metadata

import pytest
import torch

import adaptra_plugin
from adaptra_plugin.errors import ConfigError, UnsupportedError
from adaptra_plugin.launch.megatron_cpu import install
from adaptra_plugin.launch.megatron_gpt import GptJob, GptTrainer
from tests.forked import run_ranks
from tests.megatron.runs import QUIET, STEPS, loaded, microbatches, run

loaded()
from megatron.core.pipeline_parallel import schedules  # noqa: E402
from megatron.core.pipeline_parallel.schedules import (  # noqa: E402
    forward_backward_pipelining_with_interleaving,
    get_forward_backward_func,
)

from tests.megatron.te_stand_in import Linear  # noqa: E402

NAMES = {
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
}


def names():
    """Every name of every module of Megatron, and of this one, which has imported some by name."""
    modules = [m for n, m in sys.modules.items() if n.startswith("megatron.") or n == __name__]
    return {(module.__name__, name): value for module in modules for name, value in list(vars(module).items())}


def changed(before):
    now = names()
    assert now.keys() >= before.keys()
    return {key for key, value in before.items() if now[key] is not value}


@pytest.fixture(autouse=True)
def stock(monkeypatch):
    monkeypatch.delenv("ADAPTRA_CONFIG", raising=False)
    adaptra_plugin.deactivate()
    yield
    adaptra_plugin.deactivate()


def test_deactivate_restores_every_name_also_where_a_caller_has_imported_the_getter_by_name():
    before = names()
    adaptra_plugin.activate(QUIET)
    found = changed(before)
    assert {name for _, name in found} == NAMES
    assert (__name__, "forward_backward_pipelining_with_interleaving") in found, "imported by name"
    assert get_forward_backward_func(pp_size=2, vp_size=None).__wrapped__
    assert get_forward_backward_func(pp_size=2, vp_size=2) is forward_backward_pipelining_with_interleaving
    rows = {row["id"]: row["state"] for row in adaptra_plugin.status()["patches"]}
    assert {rows[f"megatron.{name}"] for name in ("without", "with")} == {"applied"}
    adaptra_plugin.deactivate()
    assert changed(before) == set()
    assert get_forward_backward_func is schedules.get_forward_backward_func
    assert (
        get_forward_backward_func(pp_size=2, vp_size=2)
        is before[__name__, "forward_backward_pipelining_with_interleaving"]
    )


def test_activation_is_repeatable_and_a_disabled_block_changes_nothing():
    before = names()
    adaptra_plugin.activate({"enabled": False})
    assert changed(before) == set()
    adaptra_plugin.activate(QUIET)
    once = names()
    adaptra_plugin.activate(QUIET)
    assert changed(once) == set()


@pytest.mark.timeout(240)  # three processes import everything, on whatever else leaves of the machine
def test_the_environment_activates_and_its_file_is_checked(monkeypatch, tmp_path):
    path = tmp_path / "adaptra.json"
    path.write_text(json.dumps({"adaptra": QUIET}))
    code = (
        "import torch, megatron.core.pipeline_parallel.schedules as s\n"
        "print(hasattr(s.forward_backward_pipelining_with_interleaving, '__wrapped__'))"
    )

    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"max_activation": 3}')
    cases = [{}, {"ADAPTRA_CONFIG": str(path)}, {"ADAPTRA_CONFIG": str(wrong)}]
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in cases
    ]
    found = [process.communicate(timeout=200) for process in started]
    assert [output.split()[-1:] for output, _ in found] == [["False"], ["True"], []]
    assert "max_activation" in found[2][1] and "ConfigError" in found[2][1].splitlines()[-2]
    path = wrong
    monkeypatch.setenv("ADAPTRA_CONFIG", str(path))
    with pytest.raises(ConfigError, match="max_activation"):
        adaptra_plugin.activate()


def test_an_argument_of_the_training_script_activates(tmp_path):
    from adaptra_plugin.patches.megatron_gate import add_arguments

    path = tmp_path / "adaptra.json"
    path.write_text(json.dumps(QUIET))
    parser = add_arguments(argparse.ArgumentParser())
    before = names()
    assert parser.parse_args([]).adaptra_config is None and changed(before) == set()
    assert parser.parse_args(["--adaptra-config", str(path)]).adaptra_config == str(path)
    assert changed(before)


def test_a_missing_name_says_which_version_was_expected(monkeypatch):
    monkeypatch.delattr(schedules, "forward_backward_pipelining_with_interleaving")
    before = names()
    with pytest.raises(
        UnsupportedError, match=r"with_interleaving does not exist in this megatron-core .*>=0\.14,<0\.20"
    ):
        adaptra_plugin.activate(QUIET)
    assert changed(before) == set(), "what was replaced before is put back"


def test_a_disabled_block_ends_what_was_active():
    before = names()
    adaptra_plugin.activate(QUIET)
    assert changed(before)
    adaptra_plugin.activate({**QUIET, "enabled": False})
    assert changed(before) == set()


def test_the_version_is_that_of_the_module_on_the_path(monkeypatch):
    """A checkout of Megatron-LM is no installed distribution, or another one than that."""
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.13.1+checkout")
    with pytest.raises(UnsupportedError, match=r"megatron-core 0\.13\.1\+checkout is installed, >=0\.14,<0\.20"):
        adaptra_plugin.activate(QUIET)
    monkeypatch.setattr(metadata, "version", lambda name: pytest.fail("the distribution does not count"))
    monkeypatch.setattr(megatron.core, "__version__", "0.17.0+checkout")
    adaptra_plugin.activate(QUIET)
    adaptra_plugin.deactivate()


def let_go(rank):
    """Whether model and session end with the trainer. (Megatron's data-parallel wrapper is never freed, in stock either.)"""
    install()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    job = GptJob(data_parallel_wrapper=False)
    trainer = GptTrainer(job)
    adaptra_plugin.activate(QUIET)
    trainer.step(lambda: microbatches(job, 4, 0, ()), 4)
    chunks, sessions = [weakref.ref(chunk) for chunk in trainer.chunks], len(adaptra_plugin.status()["sessions"])
    del trainer
    gc.collect()
    return [chunk() for chunk in chunks], sessions, len(adaptra_plugin.status()["sessions"])


def test_a_model_that_is_not_used_any_more_is_freed_and_its_session_ends():
    assert run_ranks(let_go, 2) == [([None], 1, 0)] * 2


def kept(rank):
    """A caller fetches the function once and keeps it; the plug-in comes and goes meanwhile."""
    from adaptra_plugin.launch import megatron_gpt

    found = []

    def during(trainer, step):
        if step == 0:
            adaptra_plugin.activate(QUIET)
            function = schedules.get_forward_backward_func()
            megatron_gpt.schedules = type("Kept", (), {"get_forward_backward_func": staticmethod(lambda: function)})
        elif step == 1:
            found.append(adaptra_plugin.status()["active"])
            adaptra_plugin.deactivate()
        else:
            found.append(adaptra_plugin.status()["active"])

    result = run(rank, GptJob(), None, STEPS, during=during)
    return result["losses"], result["parameters"], found


def test_a_function_that_somebody_keeps_is_stock_after_deactivate():
    ours = run_ranks(kept, 2)
    stock = run_ranks(run, 2, GptJob(), None, STEPS)
    assert [r[:2] for r in ours] == [(r["losses"], r["parameters"]) for r in stock]
    assert [r[2] for r in ours] == [[True, False, False]] * 2


LEVELS = {
    "num_microbatches_with_partial_activation_checkpoints counts on the warm-ups": (
        "stock-order",
        {"num_microbatches_with_partial_activation_checkpoints": 1},
    ),
    "CUDA graphs replay": ("stock-order", {"cuda_graph_impl": "local"}),
    "CUDA graph of whole iterations": ("stock", {"cuda_graph_impl": "local", "cuda_graph_scope": ["full_iteration"]}),
    "(full_iteration) replays": ("stock", {"cuda_graph_impl": "full_iteration"}),
    "attention in fp8": ("stock-order", {"fp8": "e4m3", "fp8_recipe": "tensorwise", "fp8_dot_product_attention": True}),
    "overlap_dispatch_backward": ("stock-order", {"overlap_dispatch_backward_with_experts_wgrad": True}),
    "overlap_moe_expert_parallel_comm runs": ("stock-order", {"overlap_moe_expert_parallel_comm": True}),
    "defer_embedding_wgrad_compute defers": ("stock-order", {"defer_embedding_wgrad_compute": True}),
    "fp8 with delayed scaling": ("stock-order", {"fp8": "hybrid"}),
    "fp4 rounds": ("stock-order", {"fp4": "e2m1"}),
    "cpu_offloading": ("stock-order", {"cpu_offloading": True}),
    "fine_grained_activation_offloading": ("stock-order", {"fine_grained_activation_offloading": True}),
    "moe_paged_stash": ("stock-order", {"moe_paged_stash": True}),
    "hybrid context": ("stock-order", {"hybrid_context_parallel": True}),
    "gtp_weight_remat_size": ("stock-order", {"gtp_weight_remat_size": 2}),
    "quant_recipe": ("stock-order", {"quant_recipe": object()}),
    "sharded": ("stock-order", {"use_megatron_fsdp": True}),
    "overlap_p2p_comm and batch_p2p_comm exclude": ("refused", {"overlap_p2p_comm": True, "batch_p2p_comm": True}),
}


@pytest.mark.parametrize("message", LEVELS)
def test_settings_have_a_level_with_a_reason_and_a_remedy(message):
    from adaptra_plugin.patches.megatron_rules import reasons_of_config

    level, fields = LEVELS[message]
    (reason,) = reasons_of_config(type("Config", (), fields), 1)
    assert reason.level.value == level and message in reason.why and reason.remedy
    assert reasons_of_config(type("Config", (), dict.fromkeys(fields)), 1) == []


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8", "delayed", "custom", None])
def test_recipes_of_fp8_that_keep_a_history_have_the_stock_order(recipe):
    from adaptra_plugin.patches.megatron_rules import reasons_of_config

    found = reasons_of_config(type("Config", (), {"fp8": "hybrid", "fp8_recipe": recipe}), 1)
    assert [reason.level.value for reason in found] == ["stock-order"] * (recipe in ("delayed", "custom", None))


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout", "moe_input_jitter_eps"])
def test_random_numbers_have_the_stock_order_with_several_chunks_and_variable_lengths_only(name):
    from adaptra_plugin.patches.megatron_rules import reasons_of_config

    config = type("Config", (), {name: 0.1, "variable_seq_lengths": True})
    assert reasons_of_config(config, 1) == []
    (reason,) = reasons_of_config(config, 2)
    assert reason.level.value == "stock-order" and "random numbers" in reason.why
    config.variable_seq_lengths = False
    assert reasons_of_config(config, 2) == []


class FullyShardedDataParallel(torch.nn.Module):
    """Has the name."""


class Wrapped(torch.nn.Module):
    """A chunk in a data-parallel wrapper with the given settings."""

    def __init__(self, layer, **settings):
        super().__init__()
        self.layer = layer
        if settings:
            self.ddp_config = type("Settings", (), settings)


@pytest.mark.parametrize(
    ("chunks", "config", "level", "message"),
    [
        (
            [Wrapped(Linear(4, 4, delay_wgrad_compute=True), overlap_grad_reduce=False)],
            {},
            "refused",
            "nothing adds up those of several microbatches",
        ),
        ([Wrapped(torch.nn.Linear(1, 1))], {"no_sync_func": print}, "stock-order", "in its last backward"),
        (
            [Wrapped(torch.nn.Linear(1, 1), overlap_grad_reduce=True)],
            {},
            "stock-order",
            "the configuration has no no_sync_func",
        ),
        ([FullyShardedDataParallel()], {}, "stock-order", "FullyShardedDataParallel gathers weights anew"),
        (
            [
                Wrapped(
                    torch.nn.Sequential(torch.nn.Dropout(0.1), Linear(4, 4, delay_wgrad_compute=True)),
                    delay_wgrad_compute=True,
                )
            ]
            * 2,
            {},
            "refused",
            "2 model chunks a rank and dropout the first iteration runs by the stock schedule",
        ),
    ],
    ids=["delayed", "unknown wrapper", "overlapped", "sharded", "dropout"],
)
def test_models_that_plans_would_train_otherwise(chunks, config, level, message):
    from adaptra_plugin.patches.megatron_support import reasons_of_model

    defaults = {"no_sync_func": None, "grad_sync_func": None, "gradient_accumulation_fusion": False}
    (reason,) = reasons_of_model(chunks, type("Config", (), {**defaults, **config}))
    assert reason.level.value == level and message in reason.why and reason.remedy


def test_takes_models_that_are_like_them_but_right():
    from adaptra_plugin.patches.megatron_support import reasons_of_model

    config = type("Config", (), {"no_sync_func": print, "grad_sync_func": None, "gradient_accumulation_fusion": False})
    assert reasons_of_model([Wrapped(Linear(4, 4, delay_wgrad_compute=True), delay_wgrad_compute=True)], config) == []
    assert reasons_of_model([Wrapped(torch.nn.Dropout(0.1), delay_wgrad_compute=False)] * 2, config) == []
    config.gradient_accumulation_fusion, config.no_sync_func = True, None
    assert reasons_of_model([Wrapped(Linear(4, 4, delay_wgrad_compute=True))], config) == []
    config.gradient_accumulation_fusion, config.overlap_moe_expert_parallel_comm = False, True
    drawing = torch.nn.Sequential(torch.nn.Dropout(0.1), Linear(4, 4, delay_wgrad_compute=True))
    assert reasons_of_model([Wrapped(drawing)] * 2, config) == [], "Megatron's merged schedule asks for them"


def test_delayed_gradients_that_nothing_would_run_are_refused_without_a_pipeline():
    from adaptra_plugin.patches.megatron_support import reasons_alone

    assert reasons_alone(type("Config", (), {})) == []
    config = {"delay_wgrad_compute": True, "overlap_moe_expert_parallel_comm": True}
    assert reasons_alone(type("Config", (), config)) == []
    (reason,) = reasons_alone(type("Config", (), {"delay_wgrad_compute": True}))
    assert reason.level.value == "refused" and "without a pipeline" in reason.why


def test_with_several_optimizer_instances_a_reduction_is_started_once():
    """Megatron needs CUDA streams for these, so this is about the decision alone."""
    from adaptra_plugin.patches.megatron_support import finalizing_starts

    def chunk(instances, first, overlap=True):
        made = Wrapped(
            torch.nn.Linear(1, 1), num_distributed_optimizer_instances=instances, overlap_grad_reduce=overlap
        )
        made.bucket_groups, made.expert_parallel_bucket_groups = [type("Group", (), {"is_first_batch": first})], []
        return made

    assert finalizing_starts(chunk(2, True))
    assert not any(map(finalizing_starts, (chunk(1, True), chunk(2, False), chunk(2, True, overlap=False))))


def call_reasons(rank):
    from adaptra_plugin.patches.megatron import Call

    iterator = iter(())
    arguments = {"model": [torch.nn.Linear(1, 1)] * 2, "data_iterator": [iterator, iterator], "num_microbatches": 1}
    told = [Call.of({**arguments, "data_iterator": each}).reasons() for each in ([iterator, iterator], iterator)]
    return [*told, Call.of({**arguments, "data_iterator": None, "new_argument": 1}).reasons()]


def test_calls_that_are_left_to_the_stock_schedule():
    ((shared, one, unknown),) = run_ranks(call_reasons, 1)
    assert [reason.why for reason in shared + one + unknown] == [
        "two model chunks share a data iterator, so what they read would depend on the plan",
        "two model chunks share a data iterator, so what they read would depend on the plan",
        "the arguments new_argument are not known",
    ]
    assert {reason.level.value for reason in shared + one + unknown} == {"stock-order"}


def shapes_later(rank):
    def during(trainer, step):
        trainer.forward_backward = functools.partial(trainer.forward_backward, adjust_tensor_shapes_fn=two_shapes)

    with pytest.raises(
        UnsupportedError, match="changed after training with plans had begun: adjust_tensor_shapes_fn asks for 2"
    ):
        run(rank, GptJob(), {}, (4, 4), during=during)


def two_shapes(received, sent):
    return [*received, *received], sent


def test_a_call_that_changes_after_plans_have_begun_is_refused():
    run_ranks(shapes_later, 2)
