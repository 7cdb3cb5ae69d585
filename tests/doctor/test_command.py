"""The command itself: configurations, output for people and programs, exit codes, and this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from adaptra_plugin.doctor import Row, Status
from adaptra_plugin.doctor.command import run
from adaptra_plugin.doctor.machine import FEATURES, Machine, own_requirements, run_child
from adaptra_plugin.doctor.needs import from_file
from adaptra_plugin.doctor.show import as_json, as_text
from adaptra_plugin.doctor.software import _ranges
from adaptra_plugin.host import HOSTS
from tests.doctor.machines import roce_node

ROWS = [
    Row("kernel", Status.OKAY, "Linux [bold]6.1[/bold]"),
    Row("memlock", Status.FAIL, "soft 64 KiB; " + "x" * 150, "raise it"),
]


def test_json_is_one_list_of_four_texts(tmp_path, capsys):
    assert run(None, None, True, roce_node(tmp_path).machine()) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(set(row) == {"check", "status", "found", "advice"} for row in rows)
    assert {row["status"] for row in rows} == {"OKAY"}
    assert json.loads(as_json(ROWS))[1]["status"] == "FAIL"


def test_people_read_80_columns_without_escapes_when_piped():
    text = as_text(ROWS, Console(file=StringIO(), width=80))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    assert "Linux [bold]6.1[/bold]" in text  # what is found is no markup
    assert text.replace("\n", "").replace(" ", "").count("x") == 150 + text.count("Linux")
    assert "-> raise it" in text
    assert text.splitlines()[-1] == "1 OKAY, 0 WARN, 1 FAIL: not ready"


def test_a_failure_is_exit_code_1(tmp_path, capsys):
    tree = roce_node(tmp_path)
    tree.versions["torch"] = "2.0"
    assert run(None, None, False, tree.machine()) == 1
    assert "not ready" in capsys.readouterr().out


def test_ranks_default_to_the_gpus_of_the_node(tmp_path, capsys):
    tree = roce_node(tmp_path)
    run(None, None, False, tree.machine())
    assert "2 ranks: 2 GiB" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "dev/nvidia1").unlink()  # a container that was given one of two
    run(None, None, False, tree.machine())
    words = " ".join(capsys.readouterr().out.split())
    assert (
        "as messages need them; each grows with the messages to hold 4 of the longest one, at most 1 GiB): 1 GiB;"
        in words
    )
    run(None, 8, False, tree.machine())
    assert "8 ranks: 8 GiB" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ('{"adaptra": {"enabled": true, "transport": {"ring_mib": 32}}}', Status.OKAY, "rings of 32 MiB"),
        ('{"adaptra": {"transport": {"ring": 32}}}', Status.FAIL, "adaptra.transport.ring: unknown key"),
        ('{"adaptra": {}, "zero_optimization": {"stage": 3}}', Status.FAIL, "ZeRO-2 and ZeRO-3"),
        ('{"adaptra": {"enabled": false}}', Status.WARN, "the plug-in is off"),
        ('{"train_batch_size": 8}', Status.WARN, 'no "adaptra" block'),
        ("[1]", Status.FAIL, "holds a list"),
        ("[" * 200_000, Status.FAIL, "cannot be read as JSON"),
        (b'{"a": "\xe9"}', Status.FAIL, "cannot be read as JSON"),
        (None, Status.FAIL, "No such file"),
    ],
)
def test_configurations(tmp_path, content, status, words):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    _, row = from_file(str(path))
    assert (row.status, words in row.found) == (status, True), row.found


def test_comments_are_read_as_deepspeed_reads_them(tmp_path):
    pytest.importorskip("hjson")
    (tmp_path / "ds.json").write_text('{\n  # ours\n  "adaptra": {"transport": {"ring_mib": 7}}\n}')
    config, row = from_file(str(tmp_path / "ds.json"))
    assert (config.transport.ring_mib, row.status) == (7, Status.OKAY)


def test_needs_of_the_configuration_are_checked_and_deepspeed_is_required(tmp_path, capsys):
    tree = roce_node(tmp_path)
    (tmp_path / "ds.json").write_text('{"adaptra": {"transport": {"ring_mib": 65536}}}')
    assert run(str(tmp_path / "ds.json"), None, True, tree.machine()) == 1
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["configuration"]["status"] == "OKAY"
    assert rows["staging memory"]["status"] == "FAIL"
    assert "up to 1024 GiB a rank" in rows["staging memory"]["found"]


def test_ranges_come_from_the_packages_own_metadata_and_are_those_of_the_patches():
    ranges = _ranges(own_requirements())
    assert len(HOSTS) == 2
    for host in HOSTS.values():
        assert ranges[host.distribution] == (host.versions, False)
    assert ranges["torch"][1] is True
    assert _ranges(["xxhash >= 3.0, <5", "broken ;;; (("])["xxhash"] == (">=3.0,<5", True)


def test_a_child_that_dies_or_babbles_is_an_error():
    assert run_child("print('noise'); print('{\"a\": 1}')") == {"a": 1}
    with pytest.raises(RuntimeError, match=r"ended with code 3"):
        run_child("import sys; sys.exit(3)")
    with pytest.raises(RuntimeError, match="answered"):
        run_child("print(1)")


def test_features_of_this_kernel():
    for works in FEATURES.values():
        works()
    assert Machine().kib("/proc/meminfo", "MemAvailable") > 1 << 20


def test_this_machine(tmp_path):
    (tmp_path / "ds.json").write_text('{"adaptra": {"transport": {"ring_mib": 1}}}')
    command = [sys.executable, "-m", "adaptra_plugin.cli", "doctor", "--config", str(tmp_path / "ds.json")]
    ended = {}
    for option in ([], ["--json"]):
        done = subprocess.run([*command, *option], capture_output=True, text=True, timeout=120, check=False)
        assert done.stderr == ""
        ended[bool(option)] = done
    rows = json.loads(ended[True].stdout)
    failed = [row for row in rows if row["status"] == "FAIL"]
    assert ended[True].returncode == ended[False].returncode == int(bool(failed))
    assert not [row for row in rows if "could not be examined" in row["found"]]
    assert {"configuration", "python", "torch", "kernel", "staging memory", "memlock", "rdma", "pyverbs"} <= {
        row["check"] for row in rows
    }
    lines = ended[False].stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].endswith("not ready" if failed else "FAIL: ready")
