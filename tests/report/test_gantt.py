"""Gantt pictures: written in both formats, and what they show."""

from __future__ import annotations

import pytest

from adaptra_plugin.schedule.catalogue.one_f_one_b import one_f_one_b
from adaptra_plugin.schedule.catalogue.zb_h1 import zb_h1
from adaptra_plugin.schedule.simulator import simulate
from tests.schedule.helpers import even

pytest.importorskip("matplotlib")
from adaptra_plugin.report.gantt import draw_gantt, link_marks


def panels():
    profile = even(4, 6, (2, 2, 1), links=[(1, 2, 6.0)])
    return [
        ("before", simulate(zb_h1(4, 6), profile, "blocking")),
        ("after", simulate(one_f_one_b(4, 6), profile)),
    ]


def test_png(tmp_path):
    draw_gantt(panels(), tmp_path / "a.png", slow_links=[(1, 2)])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_svg_shows_titles_microbatches_causes_and_the_slow_link(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_gantt(panels(), tmp_path / "a.svg", slow_links=[(2, 1)])
    text = (tmp_path / "a.svg").read_text()
    for part in ("before: ", "after: ", "rank 3", "slow 1–2", "W backward weight", "B backward (fused)", "link busy"):
        assert part in text


@pytest.mark.parametrize(
    ("pair", "ranks", "marks"),
    [
        ((1, 2), 4, [(1.5, True)]),
        ((0, 1), 2, [(0.5, True)]),
        ((0, 3), 4, [(-0.5, True), (3.5, True)]),
        ((0, 2), 4, [(0.0, False), (2.0, False)]),
        ((2, 4), 4, []),
    ],
)
def test_a_link_is_marked_at_its_own_ranks(pair, ranks, marks):
    assert link_marks(*pair, ranks) == marks


def test_the_link_that_wraps_around_is_drawn_at_the_outer_edges(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_gantt(panels()[:1], tmp_path / "a.svg", slow_links=[(3, 0)])
    assert (tmp_path / "a.svg").read_text().count("slow 0–3") >= 2


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_gantt([], tmp_path / "a.png")
