"""The two ways to walk a video through its denoising steps are one function; noise and positions go on for ever."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import tiers
from shared.tiers import examples

from benchmarks import stream_memory
from rehyat_jax.errors import RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.sampling import FlowSchedule, Guidance, UniPC, guided_velocity, rollout, sampling_step, sampling_steps
from rehyat_jax.sampling.noise import ChunkNoise, frame_noise, seeds, video_keys
from rehyat_jax.sampling.rollout import Sampler, check_context_noise, init_state, precompute_text_kv
from rehyat_jax.sampling.text import Padded

TINY = WanConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=37,
    in_channels=4,
    out_channels=4,
    text_dim=19,
    freq_dim=34,
)
SCHEDULE = FlowSchedule(grid="diffusers", shift=3.0)
STEPS = sampling_steps(SCHEDULE, UniPC(), num_steps=20)
GUIDED = Guidance(scale=4.0, forward="two")


def random_model(hybrid: HybridConfig | None, config: WanConfig = TINY) -> WanTransformer:
    """No parameter where training starts, so that velocities are of order one and what lies in the states counts."""
    model = nnx.eval_shape(lambda: WanTransformer(config, hybrid=hybrid, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def drawn(p: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.2 * rng.standard_normal(p.shape, np.float32))

    nnx.update(model, jax.tree.map(drawn, nnx.state(model)))
    return model


def random_text(evaluations: int, batch: int, config: WanConfig = TINY) -> Padded:
    return Padded(jax.random.normal(jax.random.key(5), (evaluations, batch, 5, config.text_dim)), 5)


def per_step(model, shape, *, steps=STEPS, guidance=GUIDED, batch=1) -> jax.Array:
    """Latents of seed 3, all frames at each step."""
    text = random_text(guidance.evaluations, batch).values
    graph, weights = nnx.split(model)

    @jax.jit
    def advance(weights, state, row):
        velocity = guided_velocity(nnx.merge(graph, weights), text, guidance=guidance)
        return sampling_step(velocity, state, step=row, solver=UniPC())

    noise = frame_noise(video_keys(3, count=batch), shape)
    return rollout.per_step(functools.partial(advance, weights), noise, steps=steps, solver=UniPC())


def per_chunk(
    model, shape, *, steps=STEPS, guidance=GUIDED, batch=1, context_noise="steps", prefix=None
) -> tuple[jax.Array, rollout.States]:
    """The same, all steps at each chunk, and the last states; a prefix is committed, and not among the latents."""
    sampler = Sampler(solver=UniPC(), guidance=guidance, context_noise=context_noise)
    graph, weights = nnx.split(model)
    keys, chunk, size = video_keys(3, count=batch), model.chunk_frames(), {"height": shape[1], "width": shape[2]}
    states = init_state(model, sampler, num_steps=len(steps.timestep), batch=batch, **size)
    text = random_text(guidance.evaluations, batch)
    text_kv = jax.jit(lambda w: precompute_text_kv(nnx.merge(graph, w), text))(weights)

    @functools.partial(jax.jit, static_argnames="frames")
    def made(weights, states, first, frames):
        model, noise = nnx.merge(graph, weights), ChunkNoise(keys, first)
        how = {"shape": (frames, *shape[1:]), "first_frame": first, "steps": steps, "sampler": sampler}
        return rollout.denoise_chunk(model, states, noise, text_kv, **how)

    @jax.jit
    def committed(weights, states, latents, first):
        model, noise = nnx.merge(graph, weights), ChunkNoise(keys, first)
        how = {"first_frame": first, "steps": steps, "context_noise": context_noise}
        return rollout.commit_chunk(model, states, latents, noise, text_kv, **how)

    given, latents = 0 if prefix is None else prefix.shape[1], []
    for first in range(0, shape[0], chunk):
        if first < given:
            states = committed(weights, states, prefix[:, first : first + chunk], jnp.int32(first))
        else:
            part, states = made(weights, states, jnp.int32(first), min(chunk, shape[0] - first))
            latents.append(part)
    return jnp.concatenate(latents, axis=1), states


def difference(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.abs(a - b).max())


@pytest.mark.parametrize(
    ("hybrid", "batch"),
    tiers.breadth(
        [
            # Seven frames: chunks of 3, 3 and 1; then 2, 2, 2 and 1 under an overlap longer than a chunk.
            (HybridConfig(chunk_frames=3, overlap_frames=1), 2),
            (HybridConfig(chunk_frames=2, overlap_frames=3, decay=True, stabilizer="lse"), 1),
            (HybridConfig(chunk_frames=2, overlap_frames=1, kind="window", sink_frames=1), 1),
            (HybridConfig(chunk_frames=3, overlap_frames=0, kind="linear"), 1),
        ],
    ),
)
def test_the_two_sweeps_are_one_function(hybrid, batch):
    """20 steps with guidance, float32: the issue asks for 1e-4."""
    model, shape = random_model(hybrid), (7, 4, 6, 4)
    whole = per_step(model, shape, batch=batch)
    assert 0.3 < float(whole.std()) < 3
    assert difference(whole, per_chunk(model, shape, batch=batch)[0]) <= 1e-4


@pytest.mark.parametrize(("level", "decay", "frames_in_all"), [(0.0, True, 6), tiers.full(0.25, False, 7)])
def test_a_finished_chunk_is_committed_at_its_own_level(level, decay, frames_in_all):
    """Against calls on the whole video so far, each frame at its own time: what is finished at ``level``, the newest
    chunk at the step's; the solver by hand. Float32, five steps with guidance; chunks of 3, 3 and, of seven, 1."""
    model, size = random_model(HybridConfig(chunk_frames=3, overlap_frames=1, decay=decay)), (4, 6, 4)
    steps = sampling_steps(SCHEDULE, UniPC(), num_steps=5)
    keys, text = video_keys(3, count=1), random_text(2, 1).values
    made, after = per_chunk(model, (frames_in_all, *size), steps=steps, context_noise=level)
    assert {x.shape[:3] for x in jax.tree.leaves(after)} == {(1, 2, TINY.num_layers)}

    call = jax.jit(lambda x, t, row: model(x, t, row))
    seen = jnp.zeros((1, 0, *size))
    for first in range(0, frames_in_all, 3):
        frames = min(3, frames_in_all - first)
        state = UniPC().init(frame_noise(keys, (frames, *size), first_frame=first))
        for i in range(5):
            row = steps.at(i)
            whole = jnp.concatenate([seen, state.latents], axis=1)
            times = jnp.where(jnp.arange(first + frames) < first, 1000 * level, row.timestep)[None]
            velocities = [call(whole, times, each)[:, first:] for each in text]
            state = UniPC().step(state, GUIDED.combine(velocities), coefficients=row.coefficients)
        assert difference(state.latents, made[:, first : first + frames]) <= 1e-4
        context = ChunkNoise(keys, first).context((frames, *size))
        seen = jnp.concatenate([seen, (1 - level) * state.latents + level * context], axis=1)
    assert difference(made, per_step(model, (frames_in_all, *size), steps=steps)) > 0.01


@pytest.mark.parametrize("context_noise", tiers.breadth(["steps", 0.0, 0.1]))
def test_a_prefix_is_committed_as_if_it_had_been_made(context_noise):
    """Two given chunks, then one that is made: against calls on the whole video, the given frames at the level and time
    that the newest chunk has, or at those of what is finished; the solver by hand."""
    model, size = random_model(HybridConfig(chunk_frames=3, overlap_frames=1)), (4, 6, 4)
    steps = sampling_steps(SCHEDULE, UniPC(), num_steps=5)
    keys, text = video_keys(3, count=1), random_text(2, 1).values
    prefix = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, *size)), jnp.float32)
    noises, context = frame_noise(keys, (6, *size)), ChunkNoise(keys).context((6, *size))
    made, _ = per_chunk(model, (9, *size), steps=steps, context_noise=context_noise, prefix=prefix)

    call = jax.jit(lambda x, t, row: model(x, t, row))
    state = UniPC().init(frame_noise(keys, (3, *size), first_frame=6))
    for i in range(5):
        row = steps.at(i)
        level = row.timestep / 1000 if context_noise == "steps" else context_noise
        past = (1 - level) * prefix + level * (noises if context_noise == "steps" else context)
        whole = jnp.concatenate([past, state.latents], axis=1)
        times = jnp.where(jnp.arange(9) < 6, 1000 * level, row.timestep)[None]
        velocities = [call(whole, times, each)[:, 6:] for each in text]
        state = UniPC().step(state, GUIDED.combine(velocities), coefficients=row.coefficients)
    assert difference(state.latents, made) <= 1e-4


@pytest.mark.parametrize("remember", ["step", "0.5", -0.1, 1.0, float("nan"), True, None])
def test_what_cannot_be_remembered(remember):
    with pytest.raises(RehyatError, match="remember must be"):
        check_context_noise(remember)


@pytest.mark.full
def test_a_chunk_as_long_as_the_video_is_the_teacher():
    """To float32 rounding, whatever the feature maps are; as long as it, and longer."""
    shape = (4, 4, 6, 4)
    as_long, longer = (random_model(HybridConfig(chunk_frames=frames, overlap_frames=1)) for frames in (4, 9))
    teacher = per_step(as_long.with_hybrid(None), shape)
    assert difference(teacher, per_chunk(as_long, shape)[0]) <= 1e-4
    assert difference(teacher, per_step(longer, shape)) <= 1e-4


@pytest.mark.full
def test_positions_go_on_past_the_1024_of_wans_tables():
    """1,029 latent frames of one token each; the equation at such positions is tests/models/test_positions.py's."""
    config = dataclasses.replace(TINY, patch_size=(1, 1, 1))
    model = random_model(HybridConfig(chunk_frames=7, overlap_frames=2), config)
    steps = sampling_steps(SCHEDULE, UniPC(), num_steps=2)
    options = {"steps": steps, "guidance": Guidance(scale=1.0, forward="two")}
    shape = (1029, 1, 1, 4)
    assert difference(per_step(model, shape, **options), per_chunk(model, shape, **options)[0]) <= 1e-4


@pytest.mark.full
def test_softmax_sees_differences_of_positions_alone_however_late():
    """A window's chunk after ten million frames is the one that began the video: one program, traced position."""
    model = random_model(HybridConfig(chunk_frames=3, overlap_frames=1, kind="window"))
    keys, sampler = video_keys(0, count=1), Sampler(solver=UniPC(), guidance=Guidance(scale=1.0))
    steps = sampling_steps(SCHEDULE, UniPC(), num_steps=3)

    @jax.jit
    def two_chunks(first_frame):
        states = init_state(model, sampler, num_steps=3, batch=1, height=4, width=6)
        made, text_kv = [], precompute_text_kv(model, random_text(1, 1))
        for place in (0, 3):
            how = {"shape": (3, 4, 6, 4), "first_frame": first_frame + place, "steps": steps, "sampler": sampler}
            latents, states = rollout.denoise_chunk(model, states, ChunkNoise(keys, place), text_kv, **how)
            made.append(latents)
        return jnp.concatenate(made, axis=1)

    first, late = two_chunks(jnp.int32(0)), two_chunks(jnp.int32(9_999_999))
    assert difference(first, late) <= 1e-4


def products(jaxpr, left: tuple[int, ...]) -> int:
    """How many matrix products of a program have a left side of this shape, each round of a loop counted."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general" and equation.invars[0].aval.shape == left
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                count += products(inner.jaxpr, left) * equation.params.get("length", 1)
    return count


def test_text_keys_and_values_are_computed_once_for_all_chunks_and_steps():
    """Each prompt's features go into one product, the embedder's first; at the model's width into its second, and into
    keys and values of each block. A chunk's program has none of them."""
    model, text, sampler = (
        random_model(HybridConfig(chunk_frames=1)),
        random_text(2, 1),
        Sampler(solver=UniPC(), guidance=GUIDED),
    )
    of_features, of_width = (1, 5, TINY.text_dim), (1, 5, TINY.dim)
    program = jax.make_jaxpr(lambda text: precompute_text_kv(model, text))(text).jaxpr
    assert products(program, of_features) == 2
    assert products(program, of_width) == 2 * (1 + 2 * TINY.num_layers)

    def chunk(states, text_kv):
        how = {"shape": (1, 4, 6, 4), "first_frame": 0, "steps": STEPS, "sampler": sampler}
        return rollout.denoise_chunk(model, states, ChunkNoise(video_keys(0, count=1)), text_kv, **how)

    states = init_state(model, sampler, num_steps=20, batch=1, height=4, width=6)
    program = jax.make_jaxpr(chunk)(states, jax.eval_shape(lambda text: precompute_text_kv(model, text), text)).jaxpr
    assert products(program, of_features) == products(program, of_width) == 0


@pytest.mark.full
@pytest.mark.parametrize("remember", [0.0, "steps"])
def test_memory_does_not_grow_with_the_length(remember):
    """By XLA's account, 9 latent frames and 999 need the same beside the weights and the latents they result in."""
    options = stream_memory.Options(model="tiny", width=48, height=32, lengths=(9, 999), remember=remember)
    lowered = list(stream_memory.lowered(options).values())[-2:]
    short, long = (program.compile().memory_analysis() for program in lowered)
    assert short.argument_size_in_bytes == long.argument_size_in_bytes
    assert abs(long.temp_size_in_bytes / short.temp_size_in_bytes - 1) <= 0.01
    latents = 990 * 4 * 6 * 16 * 4
    assert abs(long.output_size_in_bytes - short.output_size_in_bytes - latents) <= 64
    # The states lie where they lay: all of them are in place.
    assert long.alias_size_in_bytes == short.alias_size_in_bytes > 0


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(0, 2**32 - 2), st.integers(0, 2**24), st.integers(0, 2))
def test_noise_belongs_to_a_frame_of_a_seed(seed, first, cut):
    """Drawn from the seed's key and the frame's number alone, so that no length, chunk or batch changes it."""
    noise = frame_noise(video_keys(seed, count=2), (3, 2, 5, 4), first_frame=first)
    later = frame_noise(video_keys(seed + 1, count=1), (3, 2, 5, 4), first_frame=first + cut)
    np.testing.assert_array_equal(noise[1:, cut:], later[:, : 3 - cut])
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), first)
    np.testing.assert_array_equal(noise[0, 0], jax.random.normal(key, (2, 5, 4), jnp.float32))


def test_noise_is_standard_normal_and_never_the_same():
    noise = np.asarray(frame_noise(video_keys(0, count=2), (50, 10, 10, 16))).reshape(100, -1)
    # 160,000 numbers: the mean is known to 0.0025, the deviation to 0.0018; four times that.
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.008
    assert np.abs(np.corrcoef(noise) - np.eye(100)).max() < 0.15  # 1,600 numbers a frame: six deviations


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(0, 2**32 - 2))
def test_a_stream_knows_its_seeds(seed):
    assert seeds(video_keys(seed, count=2)) == (seed, seed + 1)


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_impossible_seeds_are_sentences(seed):
    with pytest.raises(RehyatError, match="seed"):
        video_keys(seed, count=1)


def test_a_chunk_counts_latent_frames():
    config = dataclasses.replace(TINY, patch_size=(2, 2, 2))
    assert random_model(HybridConfig(chunk_frames=3), config).chunk_frames() == 6
    with pytest.raises(RehyatError, match="block 0 of 2"):
        random_model(HybridConfig(blocks=(1,))).chunk_frames()
    with pytest.raises(RehyatError, match="blocks 0-1 of 2"):
        random_model(None).chunk_frames()
