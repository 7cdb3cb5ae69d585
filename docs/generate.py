"""An mkdocs hook: fills the reference pages from the code, so that no table is kept by hand.

A line such as `{{ keys TransportConfig }}` in a page becomes the table of that block of the configuration.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from adaptra_plugin import cli, config, errors
from adaptra_plugin.report import event

MARK = re.compile(r"^\{\{ (\w+)(?: (\w+))? \}\}$", re.MULTILINE)
COLUMNS = "100"
PREFIXES = {
    "TransportConfig": "transport.",
    "DetectorConfig": "detector.",
    "ReportConfig": "report.",
    "SimulateConfig": "simulate.",
}
"""Blocks whose keys are named with the block in front; the others are entries of lists."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page. Raises KeyError for a mark that nothing fills."""
    return MARK.sub(lambda mark: FILLS[mark[1]](*filter(None, [mark[2]])), markdown)


def keys(block: str) -> str:
    """The table of one block: key, default, docstring, allowed values."""
    model: type[BaseModel] = getattr(config, block)
    schema = model.model_json_schema()
    prefix = PREFIXES.get(block, "")
    rows = ["| key | default | meaning | allowed |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue  # a block with a table of its own
        default = "needed" if field.is_required() else f"`{field.default}`"
        allowed = _allowed(schema["properties"][name])
        rows.append(f"| `{prefix}{name}` | {default} | {_line(field.description)} | {allowed} |")
    return "\n".join(rows)


def _allowed(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_allowed(one) for one in schema["anyOf"])
    if "$ref" in schema:
        return f"a block `{schema['$ref'].rpartition('/')[2]}`"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of: {_allowed(schema['items'])}"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[bound]:.12g}" for bound, word in bounds.items() if bound in schema]
    return ", ".join([words[schema["type"]], *limits])


def options(command: str) -> str:
    """What `adaptra COMMAND --help` prints."""
    os.environ["COLUMNS"] = COLUMNS  # argparse wraps lines to the terminal
    commands = argparse.ArgumentParser(prog="adaptra").add_subparsers()
    for add in cli.COMMANDS:
        add(commands)
    return f"```text\n{commands.choices[command].format_help()}```"


def fields(name: str) -> str:
    """The table of an event's fields: name, type, docstring. Raises KeyError for a field without a docstring."""
    event_class = getattr(event, name)
    (tree,) = ast.parse(inspect.getsource(event_class)).body
    described = {
        ast.unparse(field.target): _line(str(text.value.value))
        for field, text in pairwise(getattr(tree, "body", []))
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for field, kind in get_type_hints(event_class).items():
        if get_origin(kind) is Literal:
            values = ", ".join(f"`{value}`" for value in get_args(kind))
            rows.append(f"| `{field}` | {values} | {described.get(field, 'one of these')} |")
        else:
            words = event_class.__annotations__[field].replace("|", "or")
            rows.append(f"| `{field}` | {words} | {described[field]} |")
    return "\n".join(rows)


def raised() -> str:
    """The table of the errors: class, what it derives from, docstring."""
    rows = ["| error | is also a | when |", "|---|---|---|"]
    for name, error in vars(errors).items():
        if isinstance(error, type) and error.__module__ == errors.__name__:
            bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
            rows.append(f"| `{name}` | {bases} | {_line(error.__doc__)} |")
    return "\n".join(rows)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


FILLS: dict[str, Callable[..., str]] = {"keys": keys, "options": options, "fields": fields, "raised": raised}
