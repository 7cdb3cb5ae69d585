"""A session that fails to start leaves nothing behind."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from adaptra_plugin import _activation
from adaptra_plugin.config import parse_config
from adaptra_plugin.runtime import session as module
from adaptra_plugin.runtime.census import Census
from adaptra_plugin.runtime.coordinator import Coordinator
from adaptra_plugin.runtime.rendezvous import Rendezvous
from adaptra_plugin.runtime.session import Session
from adaptra_plugin.runtime.split import SplitLinears
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.transport import Endpoint
from adaptra_plugin.transport.endpoint import _live


class Broken(Exception):
    pass


def broken(*args, **kwargs):
    raise Broken


def start(folder, layer):
    config = parse_config(
        {"transport": {"proxy": "thread", "bind": "127.0.0.1"}, "report": {"directory": str(folder), "wandb": "off"}}
    )
    return Session(config, Topology.of(0, [[0]]), HashStore(), partial(SplitLinears, layer), torch.device("cpu"), 2)


def state():
    threads = {thread.name for thread in threading.enumerate() if thread is not threading.main_thread()}
    return threads, len(list(Path("/proc/self/fd").iterdir())), len(_live), list(_activation._sessions)


STEPS = [
    (Rendezvous, "secret"),
    (module, "Endpoint"),
    (Rendezvous, "exchange"),
    (module, "Telemetry"),
    (module, "Coordinator"),
    (Endpoint, "connect"),
    (module, "Links"),
    (SplitLinears, "__init__"),
    (Census, "__init__"),
    (Coordinator, "start"),
    (Session, "status"),
    (_activation, "add_session"),
]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_whatever_step_fails_everything_is_given_back(owner, name, monkeypatch, tmp_path):
    start(tmp_path / "warm", torch.nn.Linear(4, 4)).close()  # what is loaded once stays
    before = state()
    layer = torch.nn.Linear(4, 4)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(Broken):
        start(tmp_path / "tried", layer)
    monkeypatch.undo()
    assert state() == before
    assert "forward" not in vars(layer) and not layer.weight._post_accumulate_grad_hooks
    session = start(tmp_path / "again", layer)
    assert session.status()["split_layers"] == 1
    session.close()


def test_two_sessions_of_a_process_report_apart(tmp_path):
    first, second = (start(tmp_path, torch.nn.Linear(4, 4)) for _ in range(2))
    first.close()
    third = start(tmp_path, torch.nn.Linear(4, 4))
    names = {}
    for session in (second, third):
        session.close()
    for session in (first, second, third):
        (file,) = session.status()["files"]
        records = [json.loads(line) for line in Path(file).read_text().splitlines()]
        own = [record for record in records if record["run"] == session.status()["run"]]
        assert [record["type"] for record in own] == ["session"]
        names[session.run] = Path(file).name
    assert list(names.values()) == ["rank00000.jsonl", f"rank00000-{second.run}.jsonl", "rank00000.jsonl"]
