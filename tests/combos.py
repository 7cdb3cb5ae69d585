"""What the random combinations of both hosts share."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Described:
    """Settings that are drawn; as text, each with its name."""

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


class StockFails(Exception):
    """A combination that the host itself cannot run."""
