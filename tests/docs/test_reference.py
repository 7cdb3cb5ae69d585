"""The reference's tables are the code's."""

from __future__ import annotations

import re
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel

from adaptra_plugin import cli, errors
from adaptra_plugin.config import AdaptraConfig, Fault, PacedCompute, SlowLink, TlsConfig
from adaptra_plugin.detect.overview import overview
from adaptra_plugin.detect.samples import IterationReport, LinkDelay, StageTimes
from adaptra_plugin.report.event import StragglerEvent
from tests.docs.pages import DOCS, ROOT, page

CONFIGURATION = page("reference/configuration.md")
RECORDS = page("reference/records.md")


def rows(model: type[BaseModel] = AdaptraConfig, prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += rows(kind, f"{prefix}{name}.")
        else:
            text = " ".join((field.description or "").split())
            found.append(f"| `{prefix}{name}` | `{field.default}` | {text} |")
    return found


def test_the_configuration_table_lists_every_key_with_its_default():
    assert len(rows()) > 40
    missing = [row for row in rows() if row not in CONFIGURATION]
    assert missing == []


def rows_of_entries(model: type[BaseModel]) -> list[str]:
    return [
        f"| `{name}` | {'needed' if field.is_required() else f'`{field.default}`'} | {' '.join(str(field.description).split())} |"
        for name, field in model.model_fields.items()
    ]


@pytest.mark.parametrize("model", [Fault, SlowLink, PacedCompute, TlsConfig])
def test_the_table_of_faults_lists_every_key_with_its_default(model):
    """And so do the tables of the other blocks that stand in lists or may be null."""
    missing = [row for row in rows_of_entries(model) if row not in CONFIGURATION]
    assert missing == []


def test_every_key_says_what_it_means_and_what_is_allowed():
    lines = [line for line in CONFIGURATION.splitlines() if line.startswith("| `") and line.count("|") > 3]
    assert len(lines) > 60
    assert [line for line in lines if not all(cell.strip() for cell in line.split("|")[1:-1])] == []


def test_no_page_has_a_mark_that_is_not_filled():
    for path in DOCS.rglob("*.md"):
        assert "{{" not in page(str(path.relative_to(DOCS))), path


def test_the_command_line_lists_every_option():
    text = page("reference/command-line.md")
    for add in cli.COMMANDS:
        assert f"usage: adaptra {add.__name__.removeprefix('add_')} " in text
    assert {"--exact SECONDS", "--link-model", "--ranks N", "--records"} <= {
        option for option in re.findall(r"--[\w-]+(?: [A-Z]+)?", text)
    }


def test_the_records_page_lists_every_field_of_an_event():
    lines = RECORDS.partition("## Events")[2].splitlines()
    for name, kind in get_type_hints(StragglerEvent).items():
        row = next(line for line in lines if line.startswith(f"| `{name}` | "))
        assert get_origin(kind) is not Literal or all(f"`{value}`" in row for value in get_args(kind))


def test_the_records_page_lists_every_field_of_an_iteration_and_of_the_pipeline():
    report = IterationReport(
        0, 0, 0, "n1", 3, 4, 20.0, 1, (StageTimes(1, 1, 1),), (LinkDelay(1, 0, 2.0, 4),), compute_ms=12.0
    )
    sections = dict(re.findall(r"^## (\w+)$(.*?)(?=^## )", RECORDS, re.MULTILINE | re.DOTALL))
    for section, metrics in (("iteration", report.metrics()), ("pipeline", overview([report]))):
        described = {
            name
            for line in sections[section].splitlines()
            if line.startswith("|")
            for name in re.findall(r"`(\w+)`", line[: line.find("|", 1)])
        }
        assert set(metrics) == described


def test_the_errors_page_lists_every_error():
    text = page("reference/errors.md")
    names = [
        name for name, error in vars(errors).items() if isinstance(error, type) and error.__module__ == errors.__name__
    ]
    assert "PeerLostError" in names
    assert [name for name in names if f"| `{name}` | " not in text] == []


def test_the_support_table_names_tests_that_exist():
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", page("reference/support.md"))
    assert len(named) > 10
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
