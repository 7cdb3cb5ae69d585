"""A relative `ADAPTRA_CONFIG` begins where the process began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os
import adaptra_plugin._autoload  # what `import torch` does
from adaptra_plugin import _activation
os.chdir("elsewhere")  # as hydra does
print(_activation.default_block()["refine_s"])
os.environ["ADAPTRA_CONFIG"] = "other.json"  # the script's own: from here
print(_activation.default_block()["refine_s"])
"""


def test_a_change_of_directory_does_not_lose_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "adaptra.json").write_text(json.dumps({"refine_s": 1}))
    (tmp_path / "elsewhere" / "other.json").write_text(json.dumps({"refine_s": 2}))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "ADAPTRA_CONFIG": "adaptra.json", "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == ["1", "2"], done.stderr
