"""The published runs: never longer than the published plans, with no more warm-ups; measured iterations predicted."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.published_runs import compare, planned, predictions, rebuilt


def test_every_published_plan_is_compared():
    assert len(planned()) == 14


@pytest.mark.parametrize("run", planned(), ids=lambda run: " ".join(run.name.split()))
def test_our_plan_is_at_most_the_published_one_by_their_figure_and_rebuilt(run):
    row = compare(run)
    assert row.bound_ms <= row.ours_ms <= min(run.planned_ms, row.rebuilt_ms)
    assert row.warmups <= sum(run.planned_warmup)
    assert row.good
    assert rebuilt(run).warmup == run.planned_warmup  # what was rebuilt is what was published


def test_measured_iterations_are_predicted_within_8_percent_in_the_median():
    errors = [abs(predicted / run.delayed_ms - 1) for run, predicted in predictions()]
    assert len(errors) == 42
    assert statistics.median(errors) < 0.08
