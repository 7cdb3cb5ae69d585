"""Megatron's names are replaced on request only, and every one of them is put back."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

import adaptra_plugin
from adaptra_plugin.errors import ConfigError, UnsupportedError
from adaptra_plugin.launch.megatron_gpt import GptJob
from tests.forked import run_ranks
from tests.megatron.runs import QUIET, STEPS, loaded, run

loaded()
from megatron.core.pipeline_parallel import schedules  # noqa: E402
from megatron.core.pipeline_parallel.schedules import (  # noqa: E402
    forward_backward_pipelining_with_interleaving,
    get_forward_backward_func,
)

NAMES = {
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
    "LinearWithGradAccumulationAndAsyncCommunication",
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
    assert {rows[f"megatron.{name}"] for name in ("without", "with", "linear")} == {"applied"}
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
    found = [process.communicate(timeout=100) for process in started]
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


REFUSALS = {
    "num_microbatches_with_partial_activation_checkpoints counts on the warm-ups": {
        "num_microbatches_with_partial_activation_checkpoints": 1
    },
    "CUDA graphs replay": {"cuda_graph_impl": "local"},
    "defer_embedding_wgrad_compute defers": {"defer_embedding_wgrad_compute": True},
    "fp8 keeps scaling factors": {"fp8": "hybrid"},
    "mixture of experts has not been verified": {"num_moe_experts": 2},
    "multi-token prediction": {"mtp_num_layers": 1},
    "cpu_offloading fetches": {"cpu_offloading": True},
    "overlap_p2p_comm and batch_p2p_comm exclude": {"overlap_p2p_comm": True, "batch_p2p_comm": True},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refuses_settings_with_a_reason_and_a_remedy(message):
    from adaptra_plugin.patches.megatron_support import check_config

    config = type("Config", (), REFUSALS[message])
    with pytest.raises(UnsupportedError, match=rf"{message}.*: "):
        check_config(config, 1)
    check_config(type("Config", (), dict.fromkeys(REFUSALS[message])), 1)


def test_refuses_dropout_with_several_chunks_only():
    from adaptra_plugin.patches.megatron_support import check_config

    config = type("Config", (), {"hidden_dropout": 0.1, "attention_dropout": 0.0})
    check_config(config, 1)
    with pytest.raises(UnsupportedError, match="2 model chunks a rank, the masks of hidden_dropout would depend"):
        check_config(config, 2)


def refused(rank, job, more):
    with pytest.raises(UnsupportedError) as caught:
        run(rank, job, {}, (4,), **more)
    return str(caught.value)


def shared(rank):
    iterator = iter(())
    from adaptra_plugin.patches.megatron import Call

    arguments = {"model": [torch.nn.Linear(1, 1)] * 2, "data_iterator": [iterator, iterator], "num_microbatches": 1}
    for iterators in ([iterator, iterator], iterator):
        with pytest.raises(UnsupportedError, match="two model chunks share a data iterator"):
            Call.of({**arguments, "data_iterator": iterators})
    with pytest.raises(UnsupportedError, match="the arguments new_argument are not known"):
        Call.of({**arguments, "data_iterator": None, "new_argument": 1})


def two_shapes(received, sent):
    return [*received, *received], sent


def test_refuses_calls_that_it_cannot_answer():
    run_ranks(shared, 1)
    texts = run_ranks(refused, 2, GptJob(), {"arguments": {"adjust_tensor_shapes_fn": two_shapes}})
    assert all("asks for 2 tensors between two stages" in text for text in texts)
