"""The figures of each clip inside jit, against the report of many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rehyat_jax.sprites.report import report, swapped
from rehyat_jax.sprites.reward import figures
from rehyat_jax.sprites.world import render, sample_occlusions, sample_scenes


def test_they_are_the_reports() -> None:
    """Of clips in which every object is another from the middle on, a window of 16 frames: means over clips of two
    objects are the report's."""
    scenes = jax.jit(lambda key: sample_scenes(key, 2, pairs=1.0))(jax.random.key(0))
    video = jax.jit(lambda scenes: swapped(scenes, num_frames=32))(scenes)
    found, said = jax.jit(figures)(video, scenes), report(np.asarray(video), scenes)
    np.testing.assert_allclose(np.mean(found.recall), said.recall_anywhere, atol=1e-6)
    assert 0.3 < said.recall_anywhere < 0.6
    np.testing.assert_allclose(np.mean(found.extra), said.extra, atol=1e-6)
    np.testing.assert_allclose(np.mean(found.ground), said.grounds, atol=1e-6)
    # In the window in which it is there at all, each moves as its caption says.
    np.testing.assert_array_equal(found.speed, [1.0, 1.0])


@pytest.mark.full
def test_behind_a_pillar_the_end_tells() -> None:
    scenes = sample_occlusions(jax.random.key(0), 3, waits=(0, 0))
    found = jax.jit(figures)(render(scenes, num_frames=81), scenes)
    assert (np.asarray(found.recall) == 1).all()
    others = scenes._replace(objects=(scenes.objects + 31) % 64)
    assert not np.asarray(jax.jit(figures)(render(others, num_frames=81), scenes).recall).any()
    assert jnp.isfinite(jnp.stack(found)).all()
