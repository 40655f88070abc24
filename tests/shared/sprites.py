"""What a split of MovingSprites promises, said of its scenes."""

import numpy as np

from rehyat_jax.sprites import world


def is_held_out(scenes: world.Scenes) -> np.ndarray:
    """Whether at least one drawn object moves in a direction that training never shows for it: (7·i + 3·d) mod 10 =
    0."""
    drawn = np.arange(2) < np.asarray(scenes.counts)[:, None]
    return (world.HELD_OUT[np.asarray(scenes.objects), np.asarray(scenes.directions)] & drawn).any(-1)
