"""The contracts of imports (`lint-imports`) hold, and see the linked packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]


def test_the_contracts_hold_and_look_behind_the_links():
    run = "from importlinter.cli import lint_imports_command as run; run()"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    graph = grimp.build_graph("adaptra_plugin", cache_dir=None)
    assert "adaptra_plugin.bindings" in graph.find_modules_directly_imported_by("adaptra_plugin.patches.registry")
    assert "adaptra_plugin.launch.demo" in graph.modules
