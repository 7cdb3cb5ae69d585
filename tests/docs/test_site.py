"""`make docs` builds, and the picture is what its script draws."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.docs.pages import DOCS, ROOT


def test_the_site_builds_without_a_warning(tmp_path):
    """Strict: every link and every anchor leads somewhere, and every page is in the navigation."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path / "site").with_suffix("") for path in (tmp_path / "site").rglob("*.html")}
    assert {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")} <= built
    assert "not included in the" not in done.stderr
    assert "transport.ring_max_mib" in (tmp_path / "site" / "reference" / "configuration.html").read_text()


def test_the_picture_shows_what_the_simulator_says(tmp_path):
    script = DOCS / "images" / "timelines.py"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}  # one small plan is sooner made than the compiler is done
    subprocess.run([sys.executable, script, tmp_path / "drawn.svg"], check=True, timeout=100, env=environment)
    drawn, kept = (texts(path.read_text()) for path in (tmp_path / "drawn.svg", DOCS / "images" / "timelines.svg"))
    assert drawn == kept
    assert any("1832.0 ms" in text for text in kept) and any("944.0 ms" in text for text in kept)


def texts(svg: str) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg)
