"""Names that users write; apart from the code behind them, so that reading them costs no imports."""

from __future__ import annotations

STOCK = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v")
"""Schedules built by a rule."""
ADAPTIVE = ("slack-adaptive", "slack-adaptive-interleaved")
"""Schedules planned for a profile."""
NAMES = (*STOCK, *ADAPTIVE)
"""What ``plan`` takes as the name of a schedule."""
LINK_MODELS = ("delegated", "blocking")
DUPLEX_MODES = ("full", "half")
