"""A wheel, installed beside each host as README.md says, trains two ranks; nothing else is installed for it."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from adaptra_plugin.launch.ports import free_port
from tests.install.environments import ROOT, Environment, build_wheel, commands, compiler, installed

pytestmark = pytest.mark.timeout(1200)
HOSTS = ("deepspeed", "megatron-core")
ITERATIONS = 4
OPTIONAL = {"numba": "fast", "ortools": "exact"}
"""What README's commands do not install, and the extra that would."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[dict[str, Environment]]:
    folder = tmp_path_factory.mktemp("environments")
    found = {host: command.replace('".[', f'"{wheel}[') for host, command in commands().items()}
    assert tuple(found) == HOSTS
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda host: installed(folder / host, found[host]), HOSTS)
        yield dict(zip(HOSTS, made, strict=True))
    shutil.rmtree(folder)  # gigabytes


def test_the_source_distribution_and_the_wheel_hold_all_modules(wheel: Path):
    (archive,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        source = {name.partition("/")[2] for name in opened.getnames()}
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (
        ("adaptra_plugin", "adaptra_plugin"),
        ("patches", "adaptra_plugin/patches"),
        ("launch", "adaptra_plugin/launch"),
    ):
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
        assert len(files) > 5
        assert {f"{folder}/{file}" for file in files} <= source
        assert {f"{inside}/{file}" for file in files} <= packed
    assert not {name for name in packed if name.startswith(("tests", "benchmarks"))}


@pytest.mark.parametrize("host", HOSTS)
def test_everything_fits_and_imports_without_a_warning(environments, tmp_path, host):
    environment = environments[host]
    assert "No broken requirements" in environment.run("pip check", tmp_path)
    where = environment.run(
        "python -W error -c 'import adaptra_plugin, adaptra_plugin.cli as c; print(c.__file__)'", tmp_path
    )
    assert where.strip() == str(environment.packages / "adaptra_plugin" / "cli.py")


@pytest.mark.parametrize("host", HOSTS)
def test_doctor_says_what_is_there_and_what_is_not(environments, tmp_path, host):
    (other,) = set(HOSTS) - {host}
    rows = {row["check"]: row for row in environments[host].json("adaptra doctor --json", tmp_path)}
    version = environments[host].run(
        f"python -c 'from importlib import metadata as m; print(m.version(\"{host}\"))'", tmp_path
    )
    assert rows[host]["status"] == "OKAY" and rows[host]["found"].startswith(version.strip())
    assert rows[other]["status"] == "OKAY" and rows[other]["found"] == "not installed, not needed"
    assert rows["psutil"]["status"] == rows["wandb"]["status"] == rows["matplotlib"]["status"] == "OKAY"
    assert "not installed" not in rows["psutil"]["found"] + rows["wandb"]["found"] + rows["matplotlib"]["found"]
    for name, extra in OPTIONAL.items():
        assert "not installed: " in rows[name]["found"] and f"adaptra-plugin[{extra}]" in rows[name]["found"]
    assert not [row for row in rows.values() if row["status"] == "FAIL"]


def test_what_is_optional_may_be_missing(environments, tmp_path):
    environment = environments["megatron-core"]
    keys = ("forward_ms", "backward_input_ms", "backward_weight_ms", "max_activations")
    stages = [dict(zip(keys, times, strict=True)) for times in ((5, 6, 3, 2), (6, 7, 4, 3), (4, 6, 5, 2))]
    profile = {"microbatches": 6, "stages": stages, "links": [{"src": 1, "dst": 2, "latency_ms": 11}]}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    environment.run("adaptra plan profile.json --out plan.json --plot plan.png", tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["ranks"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    said = environment.run("! adaptra plan profile.json --exact 5", tmp_path)
    assert "pip install 'adaptra-plugin[exact]'" in said and "Traceback" not in said


def records(folder: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "adaptra-logs" / f"rank{rank:05d}.jsonl").read_text().splitlines()]


def check(folder: Path, said: str) -> None:
    """Both ranks trained all iterations with the plug-in."""
    assert "connected: rank 1" in said and "effective configuration of run " in said
    assert f"adaptra-progress {ITERATIONS} " in said
    for rank in range(2):
        found = records(folder, rank)
        (session,) = [record for record in found if record["type"] == "session"]
        assert session["stages"] == 2 and session["split_layers"] > 0 and session["failure"] is None
        iterations = [record for record in found if record["type"] == "iteration"]
        assert [record["iteration"] for record in iterations] == list(range(ITERATIONS))


def test_deepspeed_trains_two_ranks(environments, tmp_path):
    environment = environments["deepspeed"]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "adaptra": {"enabled": True, "max_activations": 4},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    script = environment.packages / "adaptra_plugin" / "launch" / "train_gpt.py"
    versions = 'python -c \'from importlib import metadata as m; print(m.version("torch"), m.version("deepspeed"))\''
    same = environment.run(versions, tmp_path).split() == [metadata.version("torch"), metadata.version("deepspeed")]
    kept = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".cache" / "torch_extensions")) / "deepspeed_shm_comm"
    more = {"CXX": str(compiler(tmp_path / "compiler", kept))} if same else {}
    command = f"deepspeed --num_gpus 2 --master_port {free_port()} {script} --deepspeed_config ds.json"
    said = environment.run(
        f"{command} --stages 2 --iterations {ITERATIONS} --result result",
        tmp_path,
        # a folder of its own: for another path of DeepSpeed what `make install` has linked would be replaced, for all who use it
        TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
        **more,
    )
    check(tmp_path, said)
    for rank in range(2):
        assert json.loads((tmp_path / "result" / f"rank{rank}.json").read_text())["engine"] == "AdaptraPipelineEngine"


def test_megatron_trains_two_ranks(environments, tmp_path):
    (tmp_path / "adaptra.json").write_text((ROOT / "configs" / "megatron.json").read_text())
    said = environments["megatron-core"].run(
        f"torchrun --nproc-per-node 2 --master-port {free_port()} -m adaptra_plugin.launch.train_megatron --pipeline 2 --microbatches 4 "
        f"--iterations {ITERATIONS} --adaptra-config adaptra.json",
        tmp_path,
    )
    check(tmp_path, said)
