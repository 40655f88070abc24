"""What the frames of a clip count in training's aims, and how noise levels are spread over chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.stages.aims import Aim, aim_mean, spread


def test_the_loss_divides_by_the_frames_that_count() -> None:
    velocity = jnp.ones((2, 3, 1, 1, 1))
    weights = jnp.asarray([[0.25, 0.0, 0.5], [0.0, 0.0, 0.0]])
    # Two frames count, with 0.25 and 0.5.
    assert float(aim_mean(velocity, Aim(jnp.zeros_like(velocity), weights)).value) == pytest.approx(0.375)
    assert float(aim_mean(velocity, Aim(jnp.zeros_like(velocity), jnp.zeros((2, 3)))).value) == 0


def test_every_column_of_levels_is_stratified() -> None:
    found = np.asarray(spread(jax.random.key(0), 48, 5))
    for column in found.T:
        assert sorted(np.floor(column * 48)) == list(range(48))
    assert len({tuple(column) for column in found.T}) == 5
