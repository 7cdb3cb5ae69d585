"""Makes log lines visible where the user's script has not set up logging."""

from __future__ import annotations

import logging
import sys


def show_log(rank: int) -> None:
    """Gives the logger `adaptra` a handler on stderr, unless somebody has configured logging already."""
    logger = logging.getLogger("adaptra")
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[%(asctime)s] [adaptra rank {rank}] [%(levelname)s] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
