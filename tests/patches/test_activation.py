"""The gate opens by itself, stays out of the way without the block, and everything can be taken back."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from importlib import metadata

import pytest

import adaptra_plugin
from adaptra_plugin.errors import ConfigError, UnsupportedError
from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import BASE_CONFIG, QUIET, build, train

import_deepspeed()
import deepspeed  # noqa: E402
from deepspeed.runtime.pipe import engine as engine_module  # noqa: E402
from deepspeed.runtime.pipe import p2p, schedule  # noqa: E402

CHECK = """
from adaptra_plugin.patches.registry import PATCHES
states = {row["id"]: row["state"] for row in PATCHES.describe()}
print("gate", states.get("deepspeed.initialize"), hasattr(initialize, "__wrapped__"))
"""


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code + CHECK],
        env={**os.environ, "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "imports",
    [
        "import torch; from deepspeed import initialize",
        "import deepspeed; initialize = deepspeed.initialize",  # DeepSpeed imports torch in the middle of its own import
        # accelerate and transformers look first
        "import torch, importlib.util as u; assert u.find_spec('deepspeed').loader.get_filename('deepspeed')\n"
        "from deepspeed import initialize",
    ],
    ids=["torch-first", "deepspeed-first", "looked-up-first"],
)
def test_activates_without_a_change_to_the_script(imports):
    assert run_python(imports) == "gate applied True"


GATE_ONCE = """
import sys, deepspeed, adaptra_plugin
# in a list, because a global name would follow the gate; from `vars`, because reading the attribute would fire the hook
stock = [vars(deepspeed)["initialize"]]
adaptra_plugin.activate()
assert vars(deepspeed)["initialize"].__wrapped__ is stock[0]
adaptra_plugin.deactivate()
initialize = deepspeed.initialize
assert initialize is stock[0] and type(deepspeed) is type(sys)
assert not any(type(finder).__module__.startswith("adaptra_plugin") for finder in sys.meta_path)
"""


def test_the_gate_is_applied_once_and_leaves_nothing_behind():
    assert run_python(GATE_ONCE) == "gate None False"


def test_a_patch_is_applied_once_even_if_reading_its_target_applies_it():
    from adaptra_plugin.patches.registry import Patch, PatchSet

    class Host(types.ModuleType):
        def __getattribute__(self, name):
            if name == "function":
                self.__class__ = types.ModuleType
                patches.apply(patch)
            return types.ModuleType.__getattribute__(self, name)

    patches = PatchSet()
    patch = Patch("x", "adaptra_test_host:function", "deepspeed", ">=0", "because", lambda o: lambda: o)
    host = sys.modules["adaptra_test_host"] = Host("adaptra_test_host")
    vars(host)["function"] = stock = lambda: "stock"
    try:
        patches.apply(patch)
        assert host.function() is stock
        patches.restore()
        assert host.function is stock
    finally:
        del sys.modules["adaptra_test_host"]


def test_the_environment_turns_it_off():
    assert run_python("import torch; from deepspeed import initialize", ADAPTRA_AUTOLOAD="0") == "gate None False"


def names():
    """Every name of DeepSpeed's pipeline modules, its package and its engine class."""
    spaces = [deepspeed, p2p, schedule, engine_module, engine_module.PipelineEngine]
    found = {(space.__name__, name): value for space in spaces for name, value in vars(space).items()}
    found.update({("map", key): value for key, value in engine_module.PipelineEngine._INSTRUCTION_MAP.items()})
    return found


def changed(before):
    # reads every name again and compares by identity; DeepSpeed itself sets `dist`, and its process grid in p2p
    ignore = {"dist", "_grid", "_groups", "__warningregistry__"}
    now = names()
    assert now.keys() >= before.keys() - {key for key in before if key[1] in ignore}
    return {key for key, value in before.items() if key[1] not in ignore and now.get(key) is not value}


def identity(rank, block):
    adaptra_plugin.deactivate()
    before = names()
    adaptra_plugin.activate()
    assert changed(before) == {("deepspeed", "initialize")}
    deepspeed.init_distributed()
    model = build("tied", 2)
    config = {**BASE_CONFIG, **({} if block is None else {"adaptra": block})}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    during = changed(before)
    kind = type(engine).__name__
    adaptra_plugin.deactivate()
    assert changed(before) == set()
    return during, kind


@pytest.mark.multiprocess
@pytest.mark.parametrize("block", [None, {"enabled": False}], ids=["absent", "disabled"])
def test_without_the_block_every_name_is_the_stock_one(block):
    for during, kind in run_ranks(identity, 2, block):
        assert during == set() and kind == "PipelineEngine"


@pytest.mark.multiprocess
def test_deactivate_restores_every_name():
    for during, kind in run_ranks(identity, 2, QUIET):
        assert during == {("deepspeed", "initialize")}, "the engine class is another one only while an engine is built"
        assert kind == "AdaptraPipelineEngine"


def deactivated_in_the_middle(rank):
    steps = [5, 8, 5, 5]
    stock = train({}, None, steps, stages=2)

    def during(engine, step):
        if step == 1:
            adaptra_plugin.deactivate()
            assert engine.adaptra is None
            assert not any("forward" in vars(m) for m in engine.module.modules())

    ours = train({}, {}, steps, stages=2, during=during)
    return stock["losses"] == ours["losses"]


@pytest.mark.multiprocess
def test_an_engine_goes_on_with_the_stock_schedule_after_deactivate():
    assert run_ranks(deactivated_in_the_middle, 2) == [True, True]


def test_activate_checks_its_configuration(tmp_path):
    with pytest.raises(ConfigError, match="unknown key"):
        adaptra_plugin.activate({"shedule": "1f1b"})
    path = tmp_path / "adaptra.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        adaptra_plugin.activate(path)
    with pytest.raises(ConfigError, match="cannot read"):
        adaptra_plugin.activate(tmp_path / "missing.json")


def initialize(model, **config):
    adaptra_plugin.activate()
    try:
        deepspeed.initialize(model=model, config={**BASE_CONFIG, "adaptra": QUIET, **config})
    finally:
        adaptra_plugin.deactivate()


REFUSED = {
    "zero-2": ({"zero_optimization": {"stage": 2}}, "ZeRO-2"),
    "zero-3": ({"zero_optimization": {"stage": 3}}, "ZeRO-3"),
}


def refusals(rank):
    deepspeed.init_distributed()
    model = build("tied", 1)
    seen = {}
    for name, (config, _) in REFUSED.items():
        with pytest.raises(UnsupportedError) as caught:
            initialize(model, **config)
        seen[name] = str(caught.value)
    with pytest.raises(UnsupportedError, match="no pipeline to schedule"):
        initialize(model.forward_funcs[1])
    with pytest.raises(ConfigError, match="unknown key"):
        initialize(model, adaptra={"shedule": 1})
    return seen


@pytest.mark.multiprocess
def test_unsupported_combinations_are_refused_with_reason_and_remedy():
    (seen,) = run_ranks(refusals, 1)
    for name, (_, words) in REFUSED.items():
        assert words in seen[name]
        assert '"enabled": false' in seen[name], "the message says how to run without Adaptra"


def test_an_unsupported_version_is_refused(monkeypatch):
    from adaptra_plugin.patches import registry

    monkeypatch.setattr(metadata, "version", lambda name: "0.99.0")
    patch = registry.Patch("x", "deepspeed:PipelineEngine", "deepspeed", ">=0.16,<0.20", "because", lambda o: o)
    patches = registry.PatchSet()
    with pytest.raises(UnsupportedError, match=r"deepspeed 0\.99\.0 is installed, >=0\.16,<0\.20 is supported"):
        patches.apply(patch)
    assert patches.describe()[0]["state"] == "skipped"


@pytest.mark.parametrize("version", ["0.16.5+unknown", "0.16.5+91d1c55b"])
def test_the_version_of_deeperspeed_is_supported(monkeypatch, version):
    """GPT-NeoX's DeepSpeed is the distribution `deepspeed`, too, installed from its repository."""
    from adaptra_plugin.patches import registry
    from adaptra_plugin.patches.hosts import HOSTS

    host = HOSTS["deepspeed"]
    monkeypatch.setattr(metadata, "version", lambda name: version)
    patches = registry.PatchSet()
    patches.apply(registry.Patch("x", "deepspeed:initialize", host.distribution, host.versions, "because", lambda o: o))
    assert patches.describe()[0]["state"] == "applied"
    patches.restore()


def test_a_missing_target_names_the_version_it_expected():
    from adaptra_plugin.patches.registry import Patch, PatchSet

    with pytest.raises(UnsupportedError, match=r"deepspeed:NoSuchName does not exist .* expected a version >=0\.16"):
        PatchSet().apply(Patch("x", "deepspeed:NoSuchName", "deepspeed", ">=0.16,<99", "because", lambda o: o))


def test_names_imported_by_a_caller_follow_and_are_restored():
    from adaptra_plugin.patches.registry import Patch, PatchSet

    host, caller = types.ModuleType("adaptra_test_host"), types.ModuleType("adaptra_test_caller")
    host.function = caller.alias = stock = lambda: "stock"
    sys.modules.update({host.__name__: host, caller.__name__: caller})
    try:
        patches = PatchSet()
        patches.apply(
            Patch(
                "x", "adaptra_test_host:function", "deepspeed", ">=0", "because", lambda o: lambda: "ours", sweep=True
            )
        )
        assert host.function() == caller.alias() == "ours"
        patches.restore()
        assert host.function is stock and caller.alias is stock
    finally:
        del sys.modules[host.__name__], sys.modules[caller.__name__]
