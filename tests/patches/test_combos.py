"""Combinations of settings that were drawn at random, the cheap ones (`benchmarks/combos.py` runs as many as wanted)."""

from __future__ import annotations

import pytest

from tests.forked import import_deepspeed
from tests.patches.combos import Combo, compare

import_deepspeed()
pytestmark = pytest.mark.multiprocess

SEEDS = (28, 14, 43, 46, 60, 5)


@pytest.mark.parametrize("seed", [*SEEDS[:2], *(pytest.param(seed, marks=pytest.mark.matrix) for seed in SEEDS[2:])])
def test_combination(seed):
    compare(Combo.draw(seed))
