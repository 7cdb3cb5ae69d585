"""The demo, shortened: four real trainings through the `deepspeed` command line, and what they add up to."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.wandb_files import Run

ROOT = Path(__file__).parents[2]
ONSET, ITERATIONS = 8, 14


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    config = copy.deepcopy(json.loads((ROOT / "configs" / "demo.json").read_text()))
    config["gradient_accumulation_steps"] = 6
    config["adaptra"]["simulate"] = {
        "compute": {"forward_ms": 6, "backward_input_ms": 6, "backward_weight_ms": 4},
        "links": [{"src": 1, "dst": 2, "latency_ms": 150, "from_iteration": ONSET}],
    }
    # ranks that wait for a core of a busy machine look like slow links; 150 ms are far more than that
    config["adaptra"]["detector"] = {"min_delay_ms": 25}
    path = folder / "demo.json"
    path.write_text(json.dumps(config))
    environment = {"TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"), **os.environ}
    command = [sys.executable, "-m", "adaptra_plugin.launch.demo", "--config", str(path), "--out", str(folder / "out")]
    done = subprocess.run(
        [*command, "--iterations", str(ITERATIONS)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=700,
    )
    logs = "".join(log.read_text()[-3000:] for log in folder.glob("out/*/log.txt"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return folder / "out", done.stdout


@pytest.mark.timeout(800)  # the first run on a machine compiles DeepSpeed's shared-memory all-reduce
@pytest.mark.multiprocess
def test_the_main_job(demo: tuple[Path, str]) -> None:
    out, printed = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary["losses_identical"] and summary["parameters_identical"]
    engines = {name: run["engine"] for name, run in summary["runs"].items()}
    assert engines == {
        "stock-healthy": "PipelineEngine",
        "stock-slow": "PipelineEngine",
        "adaptra-healthy": "AdaptraPipelineEngine",
        "adaptra-slow": "AdaptraPipelineEngine",
    }
    links = [event for event in summary["events"] if event["kind"] == "link"]
    assert [event["link"] for event in links] == ["1-2"], "the slow link, and no other"
    assert links[0]["since_iteration"] == ONSET and links[0]["found_iteration"] <= ONSET + 2
    assert [event for event in summary["events_in_the_healthy_run"] if event["kind"] == "link"] == []
    assert summary["paced_compute"] and "paced" in printed.lower()
    assert "link 1-2" in printed and str(out / "summary.json") in printed.replace("\n", "")
    assert summary["parameter_count"] > 800_000
    assert all(run["cpu_share"] > 0 for run in summary["runs"].values()) and "CPU of" in printed


@pytest.mark.multiprocess
def test_its_files(demo: tuple[Path, str]) -> None:
    out, _ = demo
    assert (out / "schedule.png").read_bytes().startswith(b"\x89PNG")
    for rank in range(4):
        lines = (out / "adaptra-slow" / "events" / f"rank{rank:05d}.jsonl").read_text().splitlines()
        iterations = [record for record in map(json.loads, lines) if record["type"] == "iteration"]
        assert [record["iteration"] for record in iterations] == list(range(ITERATIONS))
        assert all(len(record["spans"]) == 3 * 6 for record in iterations)
    run = Run(out / "adaptra-slow")
    assert run.exited and run.series("adaptra/iteration")[-1] >= ITERATIONS - 1
    subjects = [row[1] for row in run.table("adaptra/events")["data"]]
    assert "link 1-2" in subjects
