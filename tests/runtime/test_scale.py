"""The benchmark of large jobs, with a small one: what it counts, not how long it takes."""

from __future__ import annotations

import pytest

from benchmarks.scale import Job


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_a_slow_link_is_answered_and_messages_are_small(mode):
    job = Job(4, 3, mode)
    try:
        for index in range(12):
            job.iteration(index, None)
            assert job.bytes < 11 * 300
        healthy, sent = len(job.committed), job.sent
        index = 12
        while len(job.committed) == healthy:
            assert index < 16, "two iterations confirm it"
            job.iteration(index, (1, 1, 2))
            index += 1
        assert job.sent - sent < 11 * 3000, "prepare and commit"
        assert len({book.begin(job.committed[-1], 64)[0] for book in job.books}) == 1
    finally:
        job.coordinator.close()
