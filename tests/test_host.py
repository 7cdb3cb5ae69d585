"""Hosts: one module and one line each, and everything else follows."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"deepspeed|megatron|transformer_engine", re.IGNORECASE)

FRAMEWORK = """
def train():
    return "stock"
"""
ADAPTER = """
import sys
from adaptra_plugin.host import Host, register

class Toy(Host):
    name, title, distribution, versions = "toy", "Toy", "toy-framework", ">=1,<2"
    entry, gate, packages, collectives = "toy.engine", "toy_adapter", ("toy",), "toy/comm/"

stock = None

def install():
    global stock
    engine = sys.modules["toy.engine"]
    stock, engine.train = engine.train, lambda: "by plan"

def close():
    global stock
    if stock is not None:
        sys.modules["toy.engine"].train, stock = stock, None

def is_open():
    return stock is not None

register(Toy())
"""
PROGRAM = """
import json
import adaptra_plugin
import toy_adapter  # stands for the line in `patches/hosts.py`
from adaptra_plugin import _autoload, host
from adaptra_plugin.doctor import Machine, Needs, software

def row():
    return next(row for row in adaptra_plugin.status()["hosts"] if row["name"] == "toy")

_autoload.register()  # as `import torch` does
found = [row()["open"]]
import toy.engine
found += [toy.engine.train(), row()]
found += [row.found for row in software.packages(Machine(), Needs()) if row.check == "toy-framework"]
found += ["toy" in host.known_packages(), host.holds_collectives("/x/toy/comm/all.py")]
adaptra_plugin.deactivate()
found += [toy.engine.train(), row()["open"]]
print(json.dumps(found))
"""


def test_a_host_is_a_module_and_a_line(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    (tmp_path / "toy" / "engine.py").write_text(FRAMEWORK)
    (tmp_path / "toy_adapter.py").write_text(ADAPTER)
    (tmp_path / "toy_framework-1.2.dist-info").mkdir()
    (tmp_path / "toy_framework-1.2.dist-info" / "METADATA").write_text("Name: toy-framework\nVersion: 1.2\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    row = {"name": "toy", "version": "1.2", "supported": ">=1,<2", "open": True}
    assert json.loads(done.stdout) == [
        *(False, "by plan", row, "1.2, supported: >=1,<2"),
        *(True, True, "stock", False),
    ]


def spoken(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of names and strings, without docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        for field in ("id", "attr", "name", "asname", "arg", "module"):
            if isinstance(text := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), text


def test_hosts_are_named_in_patches_and_launch_only():
    files = sorted((ROOT / "adaptra_plugin").rglob("*.py"))
    files = [path for path in files if path.relative_to(ROOT / "adaptra_plugin").parts[0] not in ("patches", "launch")]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        for line, text in spoken(ast.parse(path.read_text()))
        if NAMED.search(text)
    ]
    assert found == []
