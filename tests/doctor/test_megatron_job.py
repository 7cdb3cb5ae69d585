"""`adaptra check --megatron`: arguments of Megatron's training script, or fields of its configuration."""

from __future__ import annotations

import json

import pytest

from adaptra_plugin.cli import main
from adaptra_plugin.patches import megatron_arguments, megatron_rules

DENSE = ["--pipeline-model-parallel-size", "4"]
NO_DROPOUT = ["--hidden-dropout", "0.0", "--attention-dropout=0"]
COUNTED = [
    *("--num-layers", "30", "--num-layers-per-virtual-pipeline-stage", "4"),
    *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
]
CHUNKS = ["--num-layers", "32", "--num-layers-per-virtual-pipeline-stage", "2"]


@pytest.fixture
def check(capsys):
    def run(*words):
        code = main(["check", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("words", "level", "chunks", "why"),
    [
        (DENSE, "full", 1, None),
        ([*DENSE, *CHUNKS, *NO_DROPOUT], "full", 4, None),
        ([*DENSE, *CHUNKS], "full", 4, None),
        ([*DENSE, *CHUNKS, "--variable-seq-lengths"], "stock-order", 4, "how much a forward draws"),
        ([*DENSE, *COUNTED, *NO_DROPOUT], "full", 2, None),
        ([*DENSE, "--num-virtual-stages-per-pipeline-rank", "2", *NO_DROPOUT], "full", 2, None),
        ([*DENSE, "--pipeline-model-parallel-layout", "Et*3|(tt|)*6t,L", *NO_DROPOUT], "full", 2, None),
        ([*DENSE, "--num-experts", "64", "--expert-model-parallel-size", "8"], "full", 1, None),
        ([*DENSE, "--fp8-format", "hybrid"], "stock-order", 1, "delayed scaling"),
        ([*DENSE, "--fp8-format", "hybrid", "--fp8-recipe", "blockwise"], "full", 1, None),
        ([*DENSE, "--fp4-format", "e2m1"], "stock-order", 1, "fp4 rounds at random"),
        ([*DENSE, "--cuda-graph-impl", "local"], "stock-order", 1, "CUDA graphs replay"),
        (
            [*DENSE, "--cuda-graph-impl", "local", "--cuda-graph-scope", "full_iteration"],
            "stock",
            1,
            "whole iterations",
        ),
        ([*DENSE, "--overlap-moe-expert-parallel-comm"], "stock-order", 1, "merged into each other"),
        ([*DENSE, "--cpu-offloading-num-layers", "2"], "stock-order", 1, "cpu_offloading"),
        ([*DENSE, "--cuda-graph-impl", "full_iteration"], "stock", 1, "whole iterations"),
        ([*DENSE, "--kitchen-recipe-number", "3"], "stock-order", 1, "Kitchen"),
        ([*DENSE, "--te-precision-config-file", "x.yaml"], "stock-order", 1, "quant_recipe"),
        ([*DENSE, "--use-megatron-fsdp"], "stock-order", 1, "fully sharded"),
        ([*DENSE, "--overlap-p2p-comm", "--batch-p2p-comm"], "refused", 1, "exclude each other"),
        (["--num-layers", "8"], "stock", 1, "one stage"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
)
def test_levels(check, words, level, chunks, why):
    code, text, _ = check("--json", "--megatron", *words)
    document = json.loads(text)
    assert (document["level"], document["chunks"]) == (level, chunks)
    assert code == (level == "refused")
    if why is None:
        assert document["reasons"] == []
    else:
        assert any(why in reason["why"] and reason["remedy"] for reason in document["reasons"])
    code, text, _ = check("--megatron", *words)
    assert text.startswith(f"{level}: ")
    assert check("--megatron", *words, "--json")[1] == json.dumps(document, indent=2) + "\n"


def test_several_files_have_a_row_each(check, tmp_path):
    tmp_path = tmp_path / ("a" * 100) / ("b" * 100)
    tmp_path.mkdir(parents=True)
    (tmp_path / "dense.yaml").write_text("pipeline_model_parallel_size: 2\n")
    (tmp_path / "graphs.json").write_text(json.dumps({"pipeline_model_parallel_size": 2, "cuda_graph_impl": "local"}))
    names = [str(tmp_path / "dense.yaml"), str(tmp_path / "graphs.json")]
    code, text, _ = check("--megatron", *names)
    assert code == 0 and [text.index(name) for name in names] == sorted(text.index(name) for name in names)
    code, text, _ = check("--megatron", *names, "--fp4-format", "e2m1", "--json")
    first, second = json.loads(text)
    assert [first["job"], second["job"]] == names
    assert [len(first["reasons"]), len(second["reasons"])] == [1, 2], "arguments count for all files"


def test_the_block_is_read_too(check, tmp_path):
    block = tmp_path / "adaptra.json"
    block.write_text(json.dumps({"enabled": False}))
    assert check("--megatron", *DENSE, "--adaptra-config", str(block))[1].startswith("stock: ")
    block.write_text(json.dumps({"max_activations": [1, 2]}))
    code, text, told = check("--megatron", *DENSE, "--adaptra-config", str(block))
    assert code == 2 and text == "" and "2 entries for 4 stages" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a file or arguments"),
        (["--pipeline-model-parallel-size", "many"], "'many': expected a whole number"),
        ([*DENSE, "--num-layers", "33", "--num-layers-per-virtual-pipeline-stage", "2"], "a multiple of 8"),
        ([*DENSE, "--num-layers-per-virtual-pipeline-stage", "2"], "num_layers is needed with it"),
        ([*DENSE, "--pipeline-model-parallel-layout", "Et|tL|t"], "has 3 parts: expected a multiple of 4"),
        ([*DENSE, "--stages", "9"], "--stages is an option of adaptra check: give it before --megatron"),
        (["-x"], "'-x' is no argument of Megatron's"),
        (["none.yaml"], "No such file"),
    ],
)
def test_what_cannot_be_is_said(check, words, message):
    code, text, told = check("--megatron", *words)
    assert code == 2 and text == "" and message in told


def test_sizes_that_contradict_each_other(check):
    assert "the job's own settings say 4" in check("--stages", "2", "--megatron", *DENSE)[2]


def test_reasons_are_those_of_the_start():
    settings = megatron_arguments.read([*DENSE, "--fp8-format", "hybrid", "--cuda-graph-impl", "local"])
    from types import SimpleNamespace

    from adaptra_plugin.patches.hosts import HOSTS

    config = SimpleNamespace(fp8="hybrid", cuda_graph_impl="local")
    assert HOSTS["megatron"].judge(settings) == megatron_rules.reasons_of_config(config, 1)
