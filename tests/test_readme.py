"""The README's tables are the code's."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from adaptra_plugin.config import AdaptraConfig, Fault

README = Path(__file__).parent.parent / "README.md"


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
    missing = [row for row in rows() if row not in README.read_text()]
    assert missing == []


def rows_of_fault() -> list[str]:
    return [
        f"| `{name}` | {'needed' if field.is_required() else f'`{field.default}`'} | {' '.join(str(field.description).split())} |"
        for name, field in Fault.model_fields.items()
    ]


def test_the_table_of_faults_lists_every_key_with_its_default():
    missing = [row for row in rows_of_fault() if row not in README.read_text()]
    assert missing == []
