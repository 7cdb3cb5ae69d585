"""Log lines are visible by default, and a user's own logging is left alone."""

from __future__ import annotations

import subprocess
import sys

SHOW = "import logging, sys; {before}from adaptra_plugin.report.console import show_log; show_log(3); show_log(3); "
LINE = "logging.getLogger('adaptra.transport').info('hello')"


def lines(before: str = "") -> list[str]:
    code = SHOW.format(before=before) + LINE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stderr.splitlines()


def test_lines_are_shown_once_with_the_rank():
    (line,) = lines()
    assert line.endswith("[adaptra rank 3] [INFO] hello")


def test_the_users_logging_is_left_alone():
    assert lines("logging.basicConfig(level=logging.WARNING); ") == []
    assert lines("logging.basicConfig(level=logging.INFO, format='%(message)s'); ") == ["hello"]
