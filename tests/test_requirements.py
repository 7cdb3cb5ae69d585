"""Every import is of something that `setup.py` asks for; what is optional may be missing."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("adaptra_plugin", "patches", "launch")
COMES_WITH = {"hjson": "deepspeed", "llvmlite": "numba", "grimp": "import-linter"}
"""Imports of a distribution that another one, which is asked for, requires."""
OF_A_HOST = {
    "deepspeed": ("patches/deepspeed", "launch/model.py", "launch/train_gpt.py"),
    "megatron": ("patches/megatron", "launch/megatron_gpt.py", "launch/stock_megatron.py"),
}
"""By extra, how the names of modules begin that only run where its host is installed: they may import it as they like."""
WITHOUT_ONE = ("_gate.py", "_host.py", "deepspeed_support.py")
"""Modules of a host that are imported before it is."""
IMPORTING = re.compile(r"^[\w.]*(import_module|find_spec)\('")


@cache
def declared() -> dict[str, set[str]]:
    """Names of distributions by extra; under "" what is always installed."""
    program = (
        "import json, distutils.core as core; found = core.run_setup('setup.py', stop_after='init');"
        "print(json.dumps({'': found.install_requires, **found.extras_require}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import setuptools; {program}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    extras = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    names = {extra: {re.match(r"[\w.-]+", line)[0].lower() for line in lines} for extra, lines in extras.items()}
    assert names[""] and names["dev"]
    return names


@cache
def distributions() -> dict[str, list[str]]:
    return {
        module: [name.lower() for name in found]
        for module, found in importlib.metadata.packages_distributions().items()
    }


def extras_of(module: str) -> set[str]:
    """The extras that bring a top-level module; "" among them: it is always there. `dev` is for the tests."""
    module = COMES_WITH.get(module, module)
    of = [*distributions().get(module, []), module]
    return {extra for extra, names in declared().items() if names & set(of)}


def extras_of_a_user(module: str) -> set[str]:
    return extras_of(module) - {"dev"}


def imports(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, top-level module, whether it may fail without taking the importing module along)."""

    def walk(node: ast.AST, guarded: bool) -> Iterator[tuple[int, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield child.lineno, name.name.partition(".")[0], guarded
            elif isinstance(child, ast.ImportFrom):
                if not child.level:
                    yield child.lineno, str(child.module).partition(".")[0], guarded
            else:
                if isinstance(child, ast.Call) and child.args and IMPORTING.search(ast.unparse(child)):
                    yield child.lineno, child.args[0].value.partition(".")[0], guarded
                deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)
                typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, guarded or deferred or typing_only)

    yield from walk(tree, False)


def files() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 100
    return found


def may_import(name: str, extras: set[str]) -> bool:
    return not name.endswith(WITHOUT_ONE) and any(name.startswith(OF_A_HOST.get(extra, ())) for extra in extras)


def test_every_import_is_declared():
    wrong, seen = [], set()
    for path in files():
        name = str(path.relative_to(ROOT))
        for line, module, guarded in imports(ast.parse(path.read_text())):
            if module in sys.stdlib_module_names or module == "adaptra_plugin":
                continue
            seen.add(module)
            extras = extras_of_a_user(module)
            if not extras:
                wrong.append(f"{name}:{line}: setup.py does not ask for {module}")
            elif "" not in extras and not guarded and not may_import(name, extras):
                wrong.append(f"{name}:{line}: {module} comes with {sorted(extras)} only")
    assert wrong == []
    assert {"torch", "psutil", "numba", "ortools", "matplotlib", "wandb", "pyverbs", "deepspeed", "megatron"} <= seen
    unused = {name for extra, names in declared().items() if extra not in ("dev", "docs") for name in names}  # tools
    unused -= {name for module in seen for name in (*distributions().get(module, []), module, COMES_WITH.get(module))}
    assert unused == set(), "setup.py asks for what nothing imports"


def test_every_import_of_tests_and_benchmarks_is_declared():
    wrong = []
    for folder in ("tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, module, _ in imports(ast.parse(path.read_text())):
                ours = module in {
                    "adaptra_plugin",
                    "tests",
                    "benchmarks",
                    "zbpp_light",
                }  # the last: without it a ratio is left out
                if not ours and module not in sys.stdlib_module_names and not extras_of(module):
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: setup.py does not ask for {module}")
    assert wrong == []


WITHOUT = """
import importlib, sys
missing, modules = sys.argv[1].split(), sys.argv[2].split()
for name in missing:
    sys.modules[name] = None
for name in modules:
    importlib.import_module(name)
"""


def without_a_host() -> list[str]:
    """Modules that have to be importable where no host is installed; of `launch`, which runs in one, none has to."""
    names = [str(path.relative_to(ROOT)) for path in files()]
    names = [name for name in names if not may_import(name, set(OF_A_HOST)) and not name.startswith("launch/")]
    names = [name if name.startswith("adaptra_plugin/") else f"adaptra_plugin/{name}" for name in names]
    return [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]


def test_the_base_package_imports_with_what_is_always_installed_and_warns_of_nothing():
    """Not only without the extras, but without whatever else lies in this environment."""
    always = {"", *closure(declared()[""])}
    others = {module for module, found in distributions().items() if not always & set(found)}
    others -= sys.stdlib_module_names | {"adaptra_plugin", "pip", "_distutils_hack"}
    assert {"deepspeed", "wandb", "matplotlib", "numba", "ortools", "hjson"} <= others
    assert not others & {"torch", "numpy", "pydantic", "psutil", "xxhash", "rich", "packaging"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT, " ".join(others), " ".join(without_a_host())],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "ADAPTRA_AUTOLOAD": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def closure(names: set[str]) -> set[str]:
    """Distributions with all that they require, as installed here."""
    found: set[str] = set()
    todo = [*names]
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    return found | {name.replace("-", "_") for name in found}
