"""README and its neighbours: short, and what they name exists. `tests/docs` examines the pages of `docs/`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.install.environments import commands

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")
MADE = ("site/", ".cache/", "adaptra/")
"""How names begin that are no files of the repository: folders that commands make, names in W&B."""
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").rglob("*.md"))]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name):
    """mkdocs does the same for the pages of `docs/`, among themselves."""
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        assert "://" not in target and (ROOT / path).is_file(), target
        assert not anchor or anchor in headings(ROOT / path), target


def headings(path: Path) -> set[str]:
    """Anchors as forges and mkdocs make them."""
    lines = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


def test_commands_that_the_pages_name_are_targets_of_make():
    command = re.compile(r"(?:^ {4}|`|\| |> )make ([\w-]+)", re.MULTILINE)
    named = {name for path in PAGES for name in command.findall(path.read_text())}
    assert {"demo", "test", "docs", "test-wheel", "test-rdma", "lint", "install"} <= named
    for name in named:
        done = subprocess.run(["make", "--dry-run", name], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_modules_and_scripts_that_the_pages_name_exist():
    modules = {name for path in PAGES for name in re.findall(r"python -m (\w+(?:\.\w+)+)", path.read_text())} - {
        "benchmarks.NAME"
    }
    assert {"benchmarks.planner", "adaptra_plugin.launch.demo", "tests.compat.smoke"} <= modules
    for name in modules:
        path = name.replace("adaptra_plugin.launch", "launch").replace(".", "/")
        assert (ROOT / f"{path}.py").is_file(), name


def test_files_that_the_pages_name_exist():
    inside = [
        ROOT / folder
        for folder in ("", *(f"adaptra_plugin/{name}" for name in ("", "schedule", "transport", "transport/proxy")))
    ]
    named = {name for path in PAGES for name in re.findall(r"`([\w.]+/[\w./*]*)`", path.read_text())}
    named = {name for name in named if not name.startswith(MADE) and "NAME" not in name}
    assert {"schedule/analysis.py", "rails/rdma", "docs/generate.py"} <= named
    found = {
        name
        for name in named
        for folder in inside
        if any(folder.glob(name.rstrip("/"))) or any(folder.glob(f"{name}.py"))
    }
    assert named - found == set()


def test_readme_installs_each_host_from_a_checkout():
    """`tests/install` runs these commands."""
    assert tuple(commands()) == ("deepspeed", "megatron-core")
    assert all(re.search(r'pip install "\.\[\S+\]"$', command) for command in commands().values())
