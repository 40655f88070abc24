"""Which blocks to convert: against every possible choice."""

import itertools

import numpy as np
import pytest

from rehyat_jax.errors import ConfigError
from train.stages.block_choice import choose_blocks, choose_candidates


def test_the_best_blocks_are_those_of_the_smallest_errors():
    assert choose_blocks([0.3, 0.1, 0.2, 0.1], 3) == (1, 2, 3)
    assert choose_blocks([0.1, 0.1, 0.1], 2) == (0, 1)
    for errors, count in [([0.1], 2), ([0.1], 0), ([float("nan")], 1)]:
        with pytest.raises(ConfigError):
            choose_blocks(errors, count)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_of_candidates_is_that_of_trying_them_all(seed):
    rng = np.random.default_rng(seed)
    blocks, candidates = rng.integers(1, 6), rng.integers(1, 5)
    errors, times = rng.uniform(size=(blocks, candidates)), rng.integers(0, 3000, (blocks, candidates)) / 1000
    choices = list(itertools.product(range(candidates), repeat=int(blocks)))

    def total(table, choice):
        return sum(table[block, candidate] for block, candidate in enumerate(choice))

    budget = float(np.quantile([total(times, choice) for choice in choices], rng.uniform()))
    possible = [choice for choice in choices if total(times, choice) <= budget + 1e-9]
    answer = choose_candidates(errors, times, budget=budget)
    assert answer in possible
    np.testing.assert_allclose(total(errors, answer), min(total(errors, c) for c in possible), rtol=1e-12)


def test_impossible_choices_are_refused():
    with pytest.raises(ConfigError, match="fastest takes 3 ms"):
        choose_candidates(np.zeros((2, 2)), np.array([[1.0, 2.0], [2.0, 4.0]]), budget=2.5)
    with pytest.raises(ConfigError, match="milliseconds"):
        choose_candidates(np.zeros((1, 1)), np.full((1, 1), np.nan), budget=1.0)
