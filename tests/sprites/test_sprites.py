"""MovingSprites: the truth is true, the rules of the splits hold, and the verifier and its report see what is there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.sprites import is_held_out
from shared.tiers import breadth, chosen, examples, tier

from rehyat_jax.errors import RehyatError
from rehyat_jax.sprites import tracks, world
from rehyat_jax.sprites.captions import Description, Movement, caption, captions, describe, parse, vocabulary
from rehyat_jax.sprites.occlusion import report_occlusions
from rehyat_jax.sprites.report import frozen, report, seam_ratio, swapped, table
from rehyat_jax.sprites.verifier import detect, nearest_ground

FRAMES = 33


sample_scenes = jax.jit(world.sample_scenes, static_argnums=1, static_argnames=("split", "pairs"))
sample_occlusions = jax.jit(world.sample_occlusions, static_argnums=1, static_argnames="waits")
render = jax.jit(world.render, static_argnames="num_frames")


def sample(split: str, batch: int, seed: int = 0) -> world.Scenes:
    return sample_scenes(jax.random.key(seed), batch, split=split)


@pytest.fixture(scope="module")
def scenes() -> world.Scenes:
    return sample("heldout", len(chosen(range(16), test=2)))


@pytest.fixture(scope="module")
def clips(scenes) -> np.ndarray:
    return np.asarray(render(scenes, num_frames=FRAMES))


@pytest.fixture(scope="module")
def true_report(clips, scenes):
    return report(clips, scenes)


# --- the world ---


def test_render_pastes_whole_pixels_as_numpy_does():
    scenes = sample("train", 8)
    scenes = scenes._replace(starts=scenes.starts // world.UNITS * world.UNITS)
    video = np.asarray(render(scenes, num_frames=1))[:, 0]
    for b in range(8):
        expected = np.tile(world.GROUND_COLOURS[scenes.grounds[b]], (64, 64, 1)).astype(np.float64)
        for n in range(int(scenes.counts[b])):
            y, x = np.asarray(scenes.starts[b, n]) // world.UNITS
            sprite = world.ATLAS[scenes.objects[b, n]]
            box = expected[y : y + 24, x : x + 24]
            box[:] = sprite[..., :3] + (1 - sprite[..., 3:]) * box
        # Float32 sums of at most two non-zero terms each: a few units in the last place.
        np.testing.assert_allclose((video[b] + 1) / 2, expected, atol=1e-6)


def test_half_a_pixel_is_the_mean_of_two_places():
    scenes = jax.tree.map(lambda x: x[:1], sample("train", 8))._replace(counts=jnp.array([1]))
    at = lambda x: render(scenes._replace(starts=jnp.array([[[5120, x]] * 2])), num_frames=1)  # noqa: E731
    np.testing.assert_allclose(at(5120 + 512), (at(5120) + at(6144)) / 2, atol=1e-6)


def test_bounce_is_exact_after_2000_frames():
    scenes = sample("train", 8)
    got = np.asarray(world.positions(scenes, num_frames=1, first_frame=2000))[:, 0]
    position = np.asarray(scenes.starts).astype(int)
    velocity = world.VELOCITIES[np.asarray(scenes.directions), np.asarray(scenes.speeds)].astype(int)
    for _ in range(2000):  # Step by step, in whole numbers.
        position = position + velocity
        outside = (position < 0) | (position > 40 * world.UNITS)
        position = np.where(position < 0, -position, np.where(position > 40 * world.UNITS, 81920 - position, position))
        velocity = np.where(outside, -velocity, velocity)
    np.testing.assert_array_equal(got, position / world.UNITS)


def test_no_frame_number_is_too_large():
    # 2·40·1024 frames are whole periods of every velocity; 1536 · 2·10⁹ would overflow int32 many times.
    scenes = sample("train", 8)
    late = world.positions(scenes, num_frames=4, first_frame=81920 * 24000 + 7)
    np.testing.assert_array_equal(late, world.positions(scenes, num_frames=4, first_frame=7))


def test_speed_of_diagonals():
    speed = np.linalg.norm(world.VELOCITIES / world.UNITS, axis=-1)
    np.testing.assert_allclose(speed, np.broadcast_to([0.5, 1.5], (8, 2)), rtol=2e-3)
    np.testing.assert_array_equal(np.sign(world.VELOCITIES[1, 0]), [1, 1])  # down and right


@pytest.mark.parametrize("kind", breadth(["moving", "occlusion"]))
def test_render_from_a_later_frame_is_the_rest_of_the_clip(kind):
    key = jax.random.key(1)
    scenes = sample_scenes(key, 3) if kind == "moving" else sample_occlusions(key, 3)
    whole = render(scenes, num_frames=24)
    assert whole.shape == (3, 24, 64, 64 if kind == "moving" else 96, 3)
    assert whole.dtype == jnp.float32
    part = render(scenes, num_frames=4, first_frame=20)
    np.testing.assert_allclose(part, whole[:, 20:], atol=1e-6)
    each = render(scenes, num_frames=4, first_frame=jnp.array([0, 10, 20]))
    np.testing.assert_allclose(each[1], whole[1, 10:14], atol=1e-6)


@pytest.mark.wider
def test_splits():
    # i ranges over 64 numbers; (7i + 3d) mod 10 = 0 exactly when d = i mod 10, which 52 of them allow for a d below 8.
    assert world.HELD_OUT.sum() == 52
    train, heldout, unseen = (sample(split, 20_000) for split in ("train", "heldout", "unseen"))
    assert not is_held_out(train).any()
    assert not world.is_reserved(train).any()
    assert is_held_out(heldout).all()
    assert world.is_reserved(unseen).all()
    assert not is_held_out(unseen).any()
    first = lambda scenes: jax.tree.map(lambda x: x[: len(chosen(range(20_000), test=2_000))], scenes)  # noqa: E731
    assert not set(captions(first(train))) & set(captions(first(unseen)))
    # Training shows every pair that it may.
    shown = np.zeros((64, 8), bool)
    shown[np.asarray(train.objects[:, 0]), np.asarray(train.directions[:, 0])] = True
    np.testing.assert_array_equal(shown, ~world.HELD_OUT)
    # Both places of a pair get the held-out object.
    two = np.asarray(heldout.counts) == 2
    place = world.HELD_OUT[np.asarray(heldout.objects), np.asarray(heldout.directions)][two].mean(0)
    assert (place > 0.4).all()


@pytest.mark.parametrize("pairs", breadth([0.8, 0.5, 1.0]))
def test_a_share_of_scenes_has_two_objects(pairs):
    scenes = sample_scenes(jax.random.key(1), 20_000, pairs=pairs)
    assert np.mean(np.asarray(scenes.counts) == 2) == pytest.approx(pairs, abs=0.015)  # four standard deviations
    assert not is_held_out(scenes).any()
    assert not world.is_reserved(scenes).any()


def test_samples_are_well_formed():
    scenes = sample("train", 20_000)
    objects, two = np.asarray(scenes.objects), np.asarray(scenes.counts) == 2
    assert (objects[two, 0] != objects[two, 1]).all()
    assert 0.45 < two.mean() < 0.55
    assert not np.asarray(scenes.starts)[~two, 1].any()
    starts = np.asarray(scenes.starts) / world.UNITS
    assert starts.min() >= 0
    assert starts.max() <= 40
    np.testing.assert_allclose(starts[:, 0].mean(0), 20, atol=0.5)
    # Kept for testing: 1 in 16 captions with one object, 1 in 32 with two (5 standard deviations of 10,000 draws).
    free = sample("heldout", 20_000)
    reserved, one = np.asarray(world.is_reserved(free)), np.asarray(free.counts) == 1
    assert abs(reserved[one].mean() - 1 / 16) < 0.013
    assert abs(reserved[~one].mean() - 1 / 32) < 0.009


@pytest.mark.wider
def test_occlusion_timeline():
    scenes = sample_occlusions(jax.random.key(0), 400, waits=(0, 48))
    assert set(np.asarray(scenes.waits)) == set(range(49))
    x = np.asarray(world.positions(scenes, num_frames=129))[:, :, 0, 1]
    left_first = np.asarray(scenes.sides) == 0
    x = np.where(left_first[:, None], x, 72 - x)
    assert (x[:, :10] <= 3).all()
    hidden = ((x >= 30) & (x <= 42)).sum(1) - np.asarray(scenes.waits)
    assert set(hidden) <= {12, 13}
    assert (x[:, 124:] >= 66).all()  # whole again for the last 5 frames, even after a wait of 48
    # Seen again: from the first pixel on that differs from the ground beyond the pillar, a sprite's clear margin aside.
    count = len(chosen(range(40), test=2))
    few = jax.tree.map(lambda x: x[:count], scenes)
    marked = world.seen_again(few, num_frames=129)
    video = np.asarray(render(few, num_frames=129))
    beyond = np.where(np.asarray(few.sides)[:, None] == 0, np.arange(96) >= 66, np.arange(96) < 30)
    shows = (np.abs(video - video[:, -1:, :1, :1]).max((2, 4)) > 1e-3) & beyond[:, None]
    shows = shows.any(2)
    assert marked[shows].all()
    assert shows.any(1).all()
    late = np.argmax(shows, axis=1) - np.argmax(marked, axis=1)
    assert late.min() >= 0
    assert late.max() <= 8
    assert [world.occlusion_frames(w) for w in (0, 16, 48, 96, 256)] == [81, 97, 129, 177, 337]
    moving = np.where(left_first, 0, 4)
    assert not world.HELD_OUT[np.asarray(scenes.objects), moving].any()


# --- captions ---

movements = st.builds(
    Movement, st.sampled_from(world.NAMES), st.sampled_from(world.DIRECTIONS), st.sampled_from(list(world.SPEEDS))
)
descriptions = st.builds(Description, st.lists(movements, max_size=2).map(tuple), st.sampled_from(list(world.GROUNDS)))


@settings(max_examples=examples(300), deadline=None)
@given(descriptions)
def test_parse_undoes_caption(description):
    text = caption(description)
    assert parse(text) == description
    assert set(text.split()) <= set(vocabulary())


def test_captions_read_well():
    two = (Movement("lemon", "down", "slowly"), Movement("mushroom", "up and left", "quickly"))
    expected = "a lemon moving down slowly and a mushroom moving up and left quickly on a blue background"
    assert caption(Description(two, "blue")) == expected
    assert caption(Description((Movement("apple", "up", "slowly"),), "red")).startswith(
        "an apple moving up slowly on a red"
    )
    assert caption(Description((), "red")) == "an object passes behind a pillar on a red background"
    scenes = sample("train", 8)
    assert [parse(text) for text in captions(scenes)] == describe(scenes)
    occlusions = sample_occlusions(jax.random.key(0), 4)
    assert [parse(text) for text in captions(occlusions)] == describe(occlusions)


@pytest.mark.parametrize("text", ["", "a cat", "a apple moving up slowly on a red background", "x" * 100_000])
def test_parse_refuses_what_is_no_caption(text):
    with pytest.raises(RehyatError, match="not a caption"):
        parse(text)


# --- the verifier ---


@pytest.mark.wider
def test_every_sprite_is_told_apart_on_every_ground():
    """All 512 pairs, or every sprite on some ground, between pixels, under noise of 0.1 (colours in 0..1)."""
    pairs = jnp.asarray(chosen(sorted(range(512), key=lambda pair: (pair % 8 - pair // 8) % 8), test=64))
    zero, key = jnp.zeros_like(pairs), jax.random.key(2)
    both = lambda a: jnp.stack([a, zero], axis=1)  # noqa: E731
    starts = jax.random.randint(key, (len(pairs), 2, 2), 0, 40 * world.UNITS + 1)
    scenes = world.Scenes(zero + 1, both(pairs // 8), both(zero), both(zero), starts, pairs % 8)
    video = render(scenes, num_frames=1)
    for noise in chosen((0.1, 0.0)):
        found = detect(jnp.clip(video + 2 * noise * jax.random.normal(key, video.shape), -1, 1))
        assert (found.objects[:, 0, 0] == scenes.objects[:, 0]).mean() >= 0.995
        assert (found.objects[:, 0, 1:] == -1).all()
        assert (nearest_ground(found.grounds[:, 0]) == scenes.grounds).all()
        error = np.linalg.norm(found.positions[:, 0, 0] - scenes.starts[:, 0] / world.UNITS, axis=-1)
        assert error.mean() < 0.2  # the prototype's whole-pixel grid had 0.37


def test_bytes_and_floats_are_seen_alike(clips):
    some = clips[:2, :32].reshape(64, 1, *clips.shape[2:])
    of_floats, of_bytes = detect(jnp.asarray(some)), detect(jnp.asarray(np.round((some + 1) * 127.5).astype(np.uint8)))
    np.testing.assert_array_equal(of_floats.objects, of_bytes.objects)
    there = np.asarray(of_bytes.objects) >= 0
    np.testing.assert_allclose(of_floats.positions[there], of_bytes.positions[there], atol=0.02)
    assert of_bytes.objects.shape == (64, 1, 3)


def test_blank_frames_hold_nothing():
    noise = 0.2 * jax.random.normal(jax.random.key(0), (64, 1, 64, 64, 3))
    blank = jnp.asarray(np.tile(world.GROUND_COLOURS, (8, 1)))[:, None, None, None, :] * 2 - 1 + noise
    assert (detect(blank).objects == -1).all()


# --- the report ---


@pytest.mark.wider
def test_true_clips_pass(true_report):
    assert true_report.recall >= 0.99
    assert true_report.directions == 1
    assert abs(true_report.speed - 1) < 0.02
    assert true_report.grounds == 1
    assert true_report.captions >= 0.9
    assert true_report.trajectory_error < 0.3
    assert true_report.missing <= 0.01
    assert true_report.third == 0
    assert 0.9 < true_report.seam < 1.1
    assert len(true_report.recall_by_chunk) == 3  # frames 0-8, 9-20, 21-32


@pytest.mark.wider
def test_controls_fail_where_they_should(true_report, clips, scenes):
    still = report(frozen(clips), scenes)
    assert still.recall >= 0.95
    assert still.directions <= 0.1
    assert still.speed < 0.1
    assert still.captions == 0
    exchanged = report(jax.jit(lambda x: swapped(x, num_frames=FRAMES))(scenes), scenes)
    assert exchanged.recall_by_chunk[0] >= 0.99
    assert exchanged.recall_by_chunk[-1] <= 0.05
    assert exchanged.captions == 0
    assert exchanged.half_life == 24
    assert abs(exchanged.speed - 1) < 0.02
    printed = table({"true": true_report, "frozen": still, "swapped": exchanged})
    assert printed.row_count == len(dataclasses.fields(true_report))


@pytest.mark.wider
def test_the_wrong_caption_is_noticed(clips, scenes):
    other = scenes._replace(
        directions=(scenes.directions + 2) % 8, speeds=1 - scenes.speeds, grounds=(scenes.grounds + 1) % 8
    )
    judged = report(clips, other)
    assert judged.recall >= 0.99
    assert judged.directions == 0
    assert judged.grounds == 0
    assert judged.speed_within_10 == 0


def test_fit_finds_start_and_velocity_through_bounces_and_outliers():
    rng = np.random.default_rng(0)
    starts, velocities = rng.uniform(0, 40, (64, 2)), rng.uniform(-1.6, 1.6, (64, 2))
    span = np.array([40.0, 40.0])
    seen_at = tracks.path(starts[:, None], velocities[:, None], np.arange(16), span)
    seen_at[:, 5] = 20  # one frame seen elsewhere
    fit = tracks.fit_free(
        *map(jnp.asarray, (seen_at.astype(np.float32), np.ones((64, 16), bool), span.astype(np.float32)))
    )
    again = tracks.path(np.asarray(fit.starts)[:, None], np.asarray(fit.velocities)[:, None], np.arange(16), span)
    assert np.median(np.abs(np.asarray(fit.velocities) - velocities)) < 0.01
    # A bounce in the first or last frame leaves the velocity's sign open; the path itself stays right.
    assert np.abs(np.delete(again - seen_at, 5, axis=1)).mean() < 0.1


def test_seam_ratio_counts_latent_boundaries():
    change = np.ones(24)
    change[[8, 20]] = 3.0  # across the boundaries of chunks of 12: frames 8 to 9 and 20 to 21
    video = np.broadcast_to(np.concatenate([[0], np.cumsum(change)])[None, :, None, None, None], (2, 25, 4, 4, 3))
    assert seam_ratio(video, chunk=12) == pytest.approx(3.0)


@pytest.mark.wider
@pytest.mark.parametrize("wait", breadth([0, 16]))
def test_occlusion_report(wait):
    scenes = sample_occlusions(jax.random.key(3), len(chosen(range(3))), waits=(wait, wait))
    frames = world.occlusion_frames(wait)
    true = render(scenes, num_frames=frames)
    seen = report_occlusions(true, scenes)
    assert (seen.entered, seen.emerged, seen.recall, seen.recall_of_scene, seen.grounds) == (1, 1, 1, 1, 1)
    assert abs(seen.hidden - (48 + wait)) <= 1
    other = render(scenes._replace(objects=(scenes.objects + 31) % 64), num_frames=frames)
    late = (jnp.arange(frames) > frames // 2)[None, :, None, None, None]
    forgotten = report_occlusions(jnp.where(late, other, true), scenes)
    assert (forgotten.entered, forgotten.emerged, forgotten.recall) == (1, 1, 0)
    if tier == "test":  # one scene; that none comes out is told of more in the rest
        return
    staying = scenes._replace(waits=scenes.waits + 1000)
    gone = report_occlusions(render(staying, num_frames=frames), scenes)
    assert (gone.entered, gone.emerged, gone.recall) == (1, 0, 0)
