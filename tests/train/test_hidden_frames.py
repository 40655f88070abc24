"""Frames in which an object is hidden may be given and not learned."""

import dataclasses

import jax
import numpy as np
import pytest

from rehyat_jax.errors import ConfigError
from rehyat_jax.sprites import world
from train.data.clips import Bucket

BUCKET = Bucket(kind="occlusion", frames=101, batch=4, longest_wait=20, hidden="given")


def test_hidden_frames_are_those_in_which_a_picture_does_not_change_without_the_object():
    """Against pixels: the scene with another object differs wherever some of the object shows, and nowhere else."""
    scenes = BUCKET.sample(jax.random.key(3), 6)
    other = scenes._replace(objects=(scenes.objects + 7) % len(world.NAMES))
    render = jax.jit(world.render, static_argnames="num_frames")
    clips = [np.asarray(render(x, num_frames=101)) for x in (scenes, other)]
    differs = np.any(clips[0] != clips[1], axis=(2, 3, 4))
    np.testing.assert_array_equal(np.asarray(world.hidden(scenes, num_frames=101)), ~differs)
    assert 0 < differs.mean() < 1


def test_a_latent_frame_counts_where_any_of_its_frames_shows_the_object():
    scenes = BUCKET.sample(jax.random.key(4), 5)
    learned = np.asarray(BUCKET.learned(scenes, temporal_factor=4))
    shown = ~np.asarray(world.hidden(scenes, num_frames=101))
    assert learned.shape == (5, 26)
    for clip in range(5):
        expected = [shown[clip, 0], *(shown[clip, 4 * t + 1 : 4 * t + 5].any() for t in range(25))]
        np.testing.assert_array_equal(learned[clip], expected)
    assert dataclasses.replace(BUCKET, hidden="learned").learned(scenes, temporal_factor=4) is None


def test_plain_clips_have_nothing_hidden():
    with pytest.raises(ConfigError, match="leave hidden out"):
        Bucket(kind="plain", frames=5, batch=1, hidden="given")
