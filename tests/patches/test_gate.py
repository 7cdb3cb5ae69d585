"""The gate: each call of `deepspeed.initialize` chooses its engine, and what DeepSpeed itself accepts or refuses stays so."""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import logging
import os
import threading

import pytest

import adaptra_plugin
from adaptra_plugin.errors import AdaptraError, UnsupportedError
from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import BASE_CONFIG, QUIET, build

import_deepspeed()
import deepspeed  # noqa: E402

ENABLED, ABSENT, DISABLED = {"adaptra": QUIET}, {}, {"adaptra": {"enabled": False}}
OURS, STOCK = "AdaptraPipelineEngine", "PipelineEngine"


def model():
    deepspeed.init_distributed()
    return build("tied", 1)


def engine(initialize=None, **config):
    """Name of the class of the engine that is built."""
    built, *_ = (initialize or deepspeed.initialize)(model=model(), config={**BASE_CONFIG, **config})
    return type(built).__name__


def patches():
    """Those of DeepSpeed: the test's process may have imported Megatron as well."""
    rows = [row for row in adaptra_plugin.status()["patches"] if row["id"].startswith("deepspeed.")]
    return {row["id"]: row["state"] for row in rows}


class Kept:
    """A reference that the registry does not follow: it is no name of a module."""

    def __init__(self):
        self.initialize = deepspeed.initialize


@contextlib.contextmanager
def messages():
    seen, logger = [], logging.getLogger("adaptra")
    handler = logging.Handler()
    handler.emit = lambda record: seen.append((record.levelname, record.getMessage()))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield seen
    logger.removeHandler(handler)
    logger.setLevel(level)


def each_call_chooses(rank):
    adaptra_plugin.deactivate()
    stock, stock_class = Kept(), deepspeed.PipelineEngine
    adaptra_plugin.activate()
    kept = Kept()
    for config, expected in [(ENABLED, OURS), (ABSENT, STOCK), (DISABLED, STOCK), (ENABLED, OURS)]:
        assert engine(**config) == expected
        assert deepspeed.PipelineEngine is stock_class and deepspeed.initialize is kept.initialize
        assert patches() == {"deepspeed.initialize": "applied", "deepspeed.engine": "per call"}
    with pytest.raises(UnsupportedError):
        engine(**ENABLED, zero_optimization={"stage": 2})
    assert deepspeed.PipelineEngine is stock_class
    with pytest.raises(Exception, match="nonsense"):
        engine(**ENABLED, optimizer={"type": "nonsense"})
    assert deepspeed.PipelineEngine is stock_class
    adaptra_plugin.deactivate()
    assert patches() == {}
    assert deepspeed.initialize is stock.initialize
    assert engine(kept.initialize, **ENABLED) == STOCK, "a reference kept across deactivate() is the stock function"


@pytest.mark.multiprocess
def test_each_call_chooses_its_engine():
    run_ranks(each_call_chooses, 1)


def steps_aside(rank):
    adaptra_plugin.deactivate()
    stock = Kept()
    adaptra_plugin.activate()
    kept = Kept()
    with messages() as seen:
        assert engine(**ABSENT) == STOCK
        assert deepspeed.initialize is stock.initialize
        assert patches() == {"deepspeed.initialize": "skipped"}
        assert engine(**ENABLED) == STOCK, "nothing of the plug-in is left that could see the block"
        assert engine(kept.initialize, **ENABLED) == OURS, "who has kept the gate still has one"
        assert engine(kept.initialize, **ABSENT) == STOCK
    assert [level for level, text in seen if "stepped aside" in text and "adaptra_plugin.activate()" in text] == [
        "INFO"
    ]
    adaptra_plugin.activate()
    assert engine(**ENABLED) == OURS
    adaptra_plugin.deactivate()
    assert engine(kept.initialize, **ENABLED) == STOCK


@pytest.mark.multiprocess
def test_without_the_block_in_the_first_engine_it_steps_aside_and_says_so():
    run_ranks(steps_aside, 1)


def disabled_engine(rank):
    from adaptra_plugin.patches.deepspeed import engine_patch
    from adaptra_plugin.patches.registry import PATCHES

    adaptra_plugin.deactivate()
    deepspeed.init_distributed()
    two_stages, config = build("tied", 2), {**BASE_CONFIG, **DISABLED}
    with PATCHES.during(engine_patch(two_stages, config)):
        built, *_ = deepspeed.initialize(model=two_stages, config=config)
    return type(built).__name__, built.adaptra


@pytest.mark.multiprocess
def test_an_engine_with_a_disabled_block_has_no_session():
    assert run_ranks(disabled_engine, 2) == [(OURS, None)] * 2


HJSON = """{
  # comments and trailing commas are legal
  train_micro_batch_size_per_gpu: 2
  gradient_accumulation_steps: 8
  "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": true,}},
  "adaptra": {"report": {"directory": null, "wandb": "off"}},
}"""


def accepted(rank, folder):
    path = folder / "config.hjson"
    path.write_text(HJSON)
    args = argparse.Namespace(deepspeed_config=str(path), local_rank=0)
    encoded = base64.urlsafe_b64encode(json.dumps({**BASE_CONFIG, **ENABLED}).encode()).decode()
    calls = {
        "file": {"config": str(path)},
        "base64": {"config": encoded},
        "args": {"args": args},
        "config_params": {"config_params": str(path)},
    }
    assert len(encoded) > 255, "longer than any file name"
    seen = {}
    for name, call in calls.items():
        adaptra_plugin.activate()
        built, *_ = deepspeed.initialize(model=model(), **call)
        seen[name] = type(built).__name__
        adaptra_plugin.deactivate()
    return seen


@pytest.mark.multiprocess
def test_finds_the_block_in_whatever_deepspeed_accepts(tmp_path):
    (seen,) = run_ranks(accepted, 1, tmp_path)
    assert set(seen.values()) == {OURS} and len(seen) == 4


def refused(rank, folder):
    broken, twice, listed = folder / "broken.json", folder / "twice.json", folder / "list.json"
    broken.write_text('{"adaptra": {')
    twice.write_text('{"adaptra": {}, "adaptra": {}}')
    listed.write_text("[1, 2]")
    args = argparse.Namespace(deepspeed_config=str(broken))
    calls = [
        {"config": source}
        for source in (
            str(broken),
            str(twice),
            str(listed),
            "missing.json",
            "%%%",
            base64.b64encode(b"\xff").decode(),
            3,
        )
    ]
    calls += [{}, {"config": {}, "args": args}, {"no_such_argument": 1}]
    adaptra_plugin.deactivate()
    stock = Kept()
    for call in calls:
        texts = []
        for ours in (False, True):
            if ours:
                adaptra_plugin.activate()
                assert deepspeed.initialize is not stock.initialize
            with pytest.raises(Exception) as caught:
                deepspeed.initialize(model=model(), **call)
            texts.append((type(caught.value), str(caught.value)))
            adaptra_plugin.deactivate()
        assert texts[0] == texts[1], call
        assert not issubclass(texts[0][0], AdaptraError), call


@pytest.mark.multiprocess
def test_what_deepspeed_refuses_it_refuses_in_its_own_words(tmp_path):
    run_ranks(refused, 1, tmp_path)


def from_a_pipe(rank):
    reader, writer = os.pipe()
    text = json.dumps({**BASE_CONFIG, **ENABLED})
    threading.Thread(target=lambda: (os.write(writer, text.encode()), os.close(writer))).start()
    adaptra_plugin.activate()
    with messages() as seen:
        built, *_ = deepspeed.initialize(model=model(), config=f"/dev/fd/{reader}")
    assert any(level == "WARNING" and "no regular file" in text for level, text in seen)
    return type(built).__name__


@pytest.mark.multiprocess
def test_a_configuration_that_can_be_read_only_once_is_left_to_deepspeed():
    assert run_ranks(from_a_pipe, 1) == [STOCK]
