"""What a type checker sees of the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
from adaptra_plugin.launch.ports import free_port
from adaptra_plugin.patches.registry import PATCHES
from adaptra_plugin.patches import no_such_module
reveal_type(PATCHES)
reveal_type(free_port)
"""


@pytest.mark.slow
def test_nothing_behind_the_linked_packages_is_any(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert 'Revealed type is "adaptra_plugin.patches.registry.PatchSet"' in done.stdout, done.stdout + done.stderr
    assert re.search(r'Revealed type is "def \(.*\) -> int"', done.stdout)
    assert 'has no attribute "no_such_module"' in done.stdout
