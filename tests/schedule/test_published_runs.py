"""The published runs: never longer than the published plans, with no more warm-ups; measured iterations predicted."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.published_runs import plans, predictions


@pytest.mark.parametrize("row", plans(), ids=lambda row: " ".join(row[0].name.split()))
def test_our_plan_is_at_most_the_published_one(row):
    run, makespan, warmups, bound = row
    assert bound <= makespan <= run.planned_ms
    assert warmups <= sum(run.planned_warmup)


def test_measured_iterations_are_predicted_within_8_percent_in_the_median():
    errors = [abs(predicted / run.delayed_ms - 1) for run, predicted in predictions()]
    assert len(errors) == 42
    assert statistics.median(errors) < 0.08
