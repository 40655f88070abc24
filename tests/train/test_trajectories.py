"""Distillation's inputs: trajectories against `per_step`, prompts held out, clips at every level of noise."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared.training import write_teacher

from rehyat_jax.models.checkpoints import load_transformer, load_vae
from rehyat_jax.sampling import Euler, FlowSchedule, Guidance, UniPC, guided_velocity, sampling_step, sampling_steps
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.rollout import per_step
from rehyat_jax.sprites.captions import parse
from train.data.sources import NoisyClips, Source
from train.data.trajectories import Given, HostBatch, Sampling

# Trajectories --------------------------------------------------------------------------------------------------------


def _sampling(steps: int, *shifts: float, scale: float = 3.0) -> Sampling:
    return Sampling(
        schedules=tuple(FlowSchedule(shift=shift) for shift in shifts or (3.0,)),
        solver=UniPC(),
        grid_steps=steps,
        guidance=Guidance(scale=scale),
    )


@pytest.mark.parametrize(("batch", "steps"), [(4, 3), (3, 5), (1, 4), (5, 5), (2, 1)])
def test_turns_go_step_by_step_and_mix_the_levels(batch, steps):
    sampling = _sampling(steps, 3.0, 5.0)
    step, schedule, used = np.zeros(batch, int), np.arange(batch) % 2, set(range(batch))
    for index in range(3 * steps):
        host_batch = sampling.host_batch(index, batch, lambda numbers: jnp.zeros((len(numbers), 1, 1)))
        assert len(host_batch.fresh) == -(-batch // steps)
        fresh = [int(row) for row in host_batch.fresh if row < batch]
        for row, number in zip(host_batch.fresh, host_batch.numbers, strict=True):
            if row < batch:
                assert int(number) not in used
                used.add(int(number))
        step[fresh], schedule[fresh] = 0, 1 - schedule[fresh]
        np.testing.assert_array_equal(host_batch.places, schedule * steps + step)
        if index >= steps:  # all have begun anew once: levels are as different as can be
            counts = np.bincount(step, minlength=steps)
            assert counts.max() - counts.min() <= 1
        step += 1
        assert step.max() <= steps


def test_trajectories_are_those_of_sampling():
    """A row that begins at some round and ends S rounds later has what `per_step` makes of its noise: to rounding."""
    steps, batch, shape = 4, 2, (1, 2, 2, 3)
    sampling, key = _sampling(steps, 3.0, 6.0), jax.random.key(5)
    texts = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2, 3)), jnp.float32)
    negative = jnp.ones((1, 2, 3))

    def model(latents, t, text):
        return jnp.tanh(latents * text.mean((1, 2))[:, None, None, None, None] + t[:, None, None, None, None] / 1000)

    @jax.jit
    def step(rollouts, host_batch):
        rollouts = sampling.restart(rollouts, host_batch, key)
        points = sampling.points(rollouts, sampling.table.at(host_batch.places), negative)
        return sampling.advance(rollouts, sampling.table.at(host_batch.places), model(*points[:3]))

    rollouts = sampling.begin(key, jnp.arange(batch), texts[:batch], shape=shape)
    ended, running, began = {}, {0: 0, 1: 1}, {0: 0, 1: 0}
    for index in range(10):
        host_batch = sampling.host_batch(index, batch, lambda numbers: texts[jnp.asarray(numbers)])
        for row, number in zip(host_batch.fresh.tolist(), host_batch.numbers.tolist(), strict=True):
            if row < batch:
                running[row], began[row] = number, index
        rollouts = step(rollouts, host_batch)
        for row, number in running.items():
            if index + 1 - began[row] == steps:
                ended[number] = (row, rollouts.solver.latents[row])
    assert len(ended) == 4
    for number, (row, latents) in ended.items():
        noise = jax.random.normal(jax.random.fold_in(key, number), shape)[None]
        both = jnp.stack([texts[number][None], negative])
        velocity = guided_velocity(model, both, guidance=sampling.guidance)
        schedule = sampling.schedules[(row + number // batch) % 2]
        own = sampling_steps(schedule, UniPC(), num_steps=steps)
        advance = jax.jit(lambda state, row, v=velocity: sampling_step(v, state, step=row, solver=UniPC()))
        expected = per_step(advance, noise, steps=own, solver=UniPC())
        np.testing.assert_allclose(latents, expected[0], atol=1e-5)


def test_without_guidance_there_is_one_branch():
    sampling = _sampling(2, scale=1.0)
    rollouts = sampling.begin(jax.random.key(0), jnp.arange(3), jnp.zeros((3, 2, 3)), shape=(1, 2, 2, 3))
    points = sampling.points(rollouts, sampling.table.at(jnp.zeros(3, jnp.int32)), jnp.zeros((1, 2, 3)))
    assert points.latents.shape == (3, 1, 2, 2, 3)


def test_an_experts_trajectories_are_its_part_of_sampling():
    """By Euler's method, whose steps know no others: the high one's, and from a clip in its place the low one's."""
    steps, boundary, shape, key = 6, 0.8, (1, 2, 2, 3), jax.random.key(3)
    schedule = FlowSchedule(shift=3.0)
    whole = sampling_steps(schedule, Euler(), num_steps=steps)
    parts = {"high": (boundary, 1.0), "low": (0.0, boundary)}
    each = {
        name: Sampling(schedules=(schedule,), solver=Euler(), grid_steps=steps, guidance=Guidance(scale=1.0), levels=x)
        for name, x in parts.items()
    }
    high, low = each["high"].num_steps, each["low"].num_steps
    assert (high, low) == (3, 3)
    assert whole.timestep[high - 1] >= 1000 * boundary > whole.timestep[high]
    for name, places in (("high", slice(0, high)), ("low", slice(high, None))):
        np.testing.assert_array_equal(each[name].table.timestep, whole.timestep[places])
        np.testing.assert_allclose(each[name].table.coefficients, whole.coefficients[places], rtol=1e-6)
    clip = jax.random.normal(jax.random.key(8), (2, *shape))
    numbers, text = jnp.arange(2), jnp.zeros((2, 2, 3))
    noise = each["high"].begin(key, numbers, text, shape=shape).solver.latents
    begun = each["low"].begin(key, numbers, text, shape=shape, given=Given(clip=clip)).solver.latents
    level = whole.timestep[high] / 1000
    np.testing.assert_allclose(begun, (1 - level) * clip + level * noise, atol=1e-6)


def test_both_of_guidances_evaluations_are_shown_the_image():
    sampling, shape = _sampling(2), (2, 2, 2, 3)
    rng = np.random.default_rng(0)
    channels, image = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 2, 2, 2, 5), (3, 4, 6)))
    given = Given(Condition(channels=channels, image=image))
    rollouts = sampling.begin(jax.random.key(0), jnp.arange(3), jnp.ones((3, 2, 3)), shape=shape, given=given)
    points = sampling.points(rollouts, sampling.table.at(jnp.zeros(3, jnp.int32)), jnp.zeros((1, 2, 3)))
    for half in (slice(0, 3), slice(3, 6)):
        np.testing.assert_array_equal(points.latents[half, ..., :3], rollouts.solver.latents)
        np.testing.assert_array_equal(points.latents[half, ..., 3:], channels)
        np.testing.assert_array_equal(points.image[half], image)
    np.testing.assert_array_equal(points.text[:, 0, 0], [1, 1, 1, 0, 0, 0])
    # A row that begins again gets its own.
    numbers = jnp.asarray([7])
    batch = HostBatch(
        jnp.zeros(3, jnp.int32),
        jnp.asarray([1]),
        numbers,
        jnp.zeros((1, 2, 3)),
        Given(Condition(channels=channels[2:] + 1, image=image[2:] + 1)),
    )
    again = sampling.restart(rollouts, batch, jax.random.key(0)).condition
    np.testing.assert_array_equal(again.channels, jnp.stack([channels[0], channels[2] + 1, channels[2]]))
    np.testing.assert_array_equal(again.image, jnp.stack([image[0], image[2] + 1, image[2]]))


# Sources -------------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_training_and_others_are_held_out(tmp_path):
    plain = Source(frames=9, batch=2)
    texts = plain.texts(seed=0, reserved=4)
    drawn = [texts(number) for number in (0, 1, 1023, 1024, 5000)]
    assert drawn == [plain.texts(seed=0, reserved=4)(number) for number in (0, 1, 1023, 1024, 5000)]
    assert len({*drawn, plain.texts(seed=1, reserved=4)(0)}) == 6
    assert all(parse(text).movements for text in drawn)
    assert not set(plain.held_out(64)) & {texts(number) for number in range(2048)}
    assert not parse(Source(prompts="occlusion", width=96, frames=9, batch=2).texts(seed=0, reserved=0)(0)).movements

    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n two \nthree\nfour\n")
    source = Source(prompts=str(path), frames=9, batch=2)
    assert source.held_out(1) == ["one"]
    of_file = source.texts(seed=0, reserved=1)
    # Every epoch has each once, in an order of its own.
    assert all({of_file(3 * epoch + i) for i in range(3)} == {"two", "three", "four"} for epoch in range(4))
    assert len({tuple(of_file(3 * epoch + i) for i in range(3)) for epoch in range(8)}) > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def test_clips_come_at_every_level_of_noise(folder):
    vae = load_vae(folder)
    source = Source(frames=3, batch=8, videos=True)
    clips = NoisyClips(
        source,
        sampling=_sampling(4, 3.0, 1.0),
        vae=vae,
        key=jax.random.key(0),
        embed=lambda texts: jnp.asarray([[[len(text)]] for text in texts], jnp.float32),
    )
    host_batch = clips.host_batch(3)
    _, points = jax.jit(clips.points)(None, host_batch, clips.frozen, None)
    assert points.latents.shape == (8, *source.latent_shape(vae.config, load_transformer(folder).config))
    sigma = np.asarray(points.timesteps) / 1000
    shift = np.tile([3.0, 1.0], 4)
    even = sigma / (shift - (shift - 1) * sigma)
    assert np.all((even * 8 >= np.arange(8)) & (even * 8 < np.arange(8) + 1))
    # Nearly a clip at low noise, nearly noise (of variance 1) at high.
    scenes, key, _ = host_batch
    clean = jax.jit(lambda scenes: vae.normalize(vae.encode(clips._bucket.render(scenes))))(scenes)
    assert float(jnp.abs(points.latents[0] - clean[0]).mean()) < 0.4
    noise = jax.random.normal(jax.random.split(key)[1], clean.shape)
    np.testing.assert_allclose(
        points.latents,
        (1 - sigma)[:, None, None, None, None] * clean + sigma[:, None, None, None, None] * noise,
        atol=1e-4,
    )
    assert points.text.shape == (8, 1, 1)
