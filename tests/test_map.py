"""tests/README.md names every test file in its folder's table, and no module that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = re.compile(r"^### (\S+)\n((?:\|.*\n)+)", re.MULTILINE)


def test_every_test_file_and_every_module_is_there():
    named: set[Path] = set()
    for folder, table in SECTION.findall((ROOT / "tests" / "README.md").read_text()):
        for row in table.splitlines()[2:]:
            _, modules, tests, _ = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|"))
            assert modules and tests, row
            named |= {ROOT / folder / name for name in tests}
            for name in modules:
                assert (ROOT / "adaptra_plugin" / name).exists() or (ROOT / name).exists(), f"{name} in: {row}"
    assert named == set((ROOT / "tests").rglob("test_*.py"))
