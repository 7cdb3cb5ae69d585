"""Which delays are a link's own, when its ends stand still now and then."""

from __future__ import annotations

import pytest

from adaptra_plugin.transport.pauses import Pauses


def judged(samples, *pauses):
    found = Pauses()
    for began, ended in pauses:
        found.add(began, ended)
    return found.undisturbed(samples)


def test_without_pauses_everything_counts():
    assert judged([(5.0, 1.0), (3.0, 2.0)]) == [5.0, 3.0]


def test_a_message_that_crossed_a_pause_does_not_count():
    samples = [(1.0, 9.0), (1500.0, 11.5), (700.0, 11.5), (1.2, 11.6), (1.1, 20.0)]
    assert judged(samples, (10.0, 11.5)) == [1.0, 1.2, 1.1]


def test_what_piled_up_holds_up_others_and_for_as_long_again_at_most():
    piled = [(1500.0 - 100 * n, 11.5 + 0.01 * n) for n in range(10)]  # the last of them came at 11.59
    after = [(30.0, 11.61), (35.0, 11.62), (2.0, 11.63)]
    assert judged([*piled, *after], (10.0, 11.5)) == [2.0]
    slow = [(36.0, 11.5 + 0.02 * n) for n in range(200)]  # a slow link with always something on its way
    kept = judged(slow, (10.0, 11.5))
    assert 120 <= len(kept) < 140


def test_a_pause_that_is_short_beside_the_delay_does_not_matter():
    assert judged([(2000.0, 12.0)], (11.0, 11.05)) == [2000.0]
    assert judged([(36.0, 12.0)], (11.98, 12.0)) == []


def test_several_pauses_of_both_ends_count_together():
    delay = [(1000.0, 11.0)]
    assert judged(delay, (10.1, 10.16)) == [1000.0]
    assert judged(delay, (10.1, 10.16), (10.5, 10.56)) == []


def test_what_has_come_meanwhile_is_looked_at_first():
    found = Pauses(lambda: found.add(10.0, 11.5))
    assert found.undisturbed([(1500.0, 11.5)]) == []


@pytest.mark.parametrize("samples", [[], [(0.0, 10.5)], [(0.0, -1e9)]])
def test_nothing_to_judge(samples):
    assert judged(samples, (10.0, 11.0)) == [delay for delay, _ in samples]
