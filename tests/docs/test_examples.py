"""What the pages tell people to write is accepted."""

from __future__ import annotations

import argparse
import json
import re
import shlex

import pytest

from adaptra_plugin import cli
from adaptra_plugin.config import parse_config
from adaptra_plugin.schedule.profile import Profile
from tests.docs.pages import DOCS, ROOT

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCKS = [
    text for path in PAGES for text in re.findall(r"^```json\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
]
COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for path in PAGES
        for line in re.findall(r"^ {4}(adaptra \w+.*)$", path.read_text(), re.MULTILINE)
    }
)


@pytest.mark.parametrize("text", BLOCKS)
def test_a_block_of_json_is_a_configuration_or_a_profile(text):
    data = json.loads(text)
    if "adaptra" in data:
        parse_config(data["adaptra"])
    else:
        assert Profile.from_json(data).ranks > 1


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_has_these_options(line):
    parser = argparse.ArgumentParser(prog="adaptra")
    commands = parser.add_subparsers(required=True)
    for add in cli.COMMANDS:
        add(commands)
    parser.parse_args(shlex.split(line)[1:])


def test_there_are_examples():
    assert len(BLOCKS) >= 6
    assert {line.split()[1] for line in COMMANDS} == {"plan", "simulate", "doctor", "report"}
