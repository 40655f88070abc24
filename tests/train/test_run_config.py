"""What every run's configuration checks."""

import dataclasses

import pytest

from configs.sprites_vae import config
from rehyat_jax.errors import RehyatError


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_that_jax_would_take_for_others_are_refused(seed):
    """``jax.random.key(2**32)`` is that of 0, and of -1 that of 2**32 - 1."""
    with pytest.raises(RehyatError, match=f"^seed must be a whole number from 0 to 4294967295, not {seed}$"):
        dataclasses.replace(config, seed=seed)
    assert dataclasses.replace(config, seed=2**32 - 1).seed == 2**32 - 1
