"""Streams of the models beside Wan2.1's text-to-video: from an image, and of two experts by noise level."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.families import CLIP, tiny_a14b, tiny_i2v
from shared.videos import PROMPT, image_of

from rehyat_jax import HybridConfig, TextToVideo
from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.sampling.codec import to_uint8
from rehyat_jax.sampling.noise import frame_noise, video_keys

HYBRID = HybridConfig(chunk_frames=2, overlap_frames=1)
SIZE = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 4.0}


def opened(folder, cache, hybrid=HYBRID):
    return TextToVideo.from_pretrained(folder, hybrid=hybrid, cache_dir=cache)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """At shift 3 the three steps are at 999, 857 and 600: one of the first expert's, two of the second's."""
    folder = tmp_path_factory.mktemp("a14b")
    tiny_a14b(folder)
    return opened(folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def from_image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v")
    tiny_i2v(folder, **CLIP)
    return opened(folder, tmp_path_factory.mktemp("cache"))


def check_is_a_call(pipe, tmp_path, **more):
    """Causal blocks, each step's own state: a stream's frames are a call's, which tests compare with diffusers for the
    softmax teacher; at most a pixel on the edge between two levels falls to the other. Kept, it goes on bit for bit,
    the image and all."""
    stream = pipe.open_stream(PROMPT, seed=3, **SIZE, **more)
    blocks = [next(stream), next(stream)]
    stream.save(tmp_path / "kept")
    blocks.append(next(stream))
    whole = pipe(PROMPT, num_frames=21, seed=3, **SIZE, **more)
    assert whole.std() > 10
    assert np.abs(np.concatenate(blocks).astype(int) - whole).max() <= 1
    kept = pipe.resume_stream(tmp_path / "kept")
    np.testing.assert_array_equal(next(kept), blocks[2])
    assert jax.tree.map(jnp.shape, kept.state) == jax.tree.map(jnp.shape, stream.state)
    return stream


def test_a_stream_from_an_image_is_a_call(from_image, tmp_path):
    image = image_of(32, 48)
    stream = check_is_a_call(from_image, tmp_path, image=image)
    other = from_image.open_stream(PROMPT, seed=3, image=image_of(32, 48, seed=2), **SIZE)
    next(other), next(other)
    assert (next(other) != next(from_image.resume_stream(tmp_path / "kept"))).mean() > 0.2
    # What the stream is shown once the encoder has forgotten the image: an empty mask, and the same latents always.
    later = stream.state.condition.chunk(10_000, 3)
    assert not later.channels[..., :4].any()
    np.testing.assert_array_equal(later.channels[:, 0], later.channels[:, 2])


def test_two_experts_stream_as_they_make_a_call(experts, tmp_path):
    """Each expert has states of its own steps, the guidance of its own, and the solver's history goes across."""
    assert experts.why_not_stream() is None
    stream = check_is_a_call(experts, tmp_path, guidance_scale_2=1.0)
    (high, low) = (jax.tree.leaves(states)[0].shape[:2] for states in stream.state.states)
    assert (high, low) == ((1, 2), (2, 1))  # steps, evaluations of guidance


@pytest.mark.full
def test_two_experts_from_an_image(tmp_path):
    tiny_i2v(tmp_path / "in", experts=True)
    check_is_a_call(opened(tmp_path / "in", tmp_path / "cache"), tmp_path, image=image_of(32, 48))


@pytest.mark.full
def test_finished_chunks_are_shown_to_both_experts(experts):
    """Against a plain loop over the modules: each step by its expert, then the finished chunk to both at time 0."""
    shape, steps = (2, 4, 6, 16), experts.settings(**SIZE, num_frames=5, remember=0.0).steps()
    solver, keys = experts.solver, video_keys(3, count=1)
    graphs, weights = zip(*map(nnx.split, experts.transformer.modules()), strict=True)
    assert graphs[0] == graphs[1]
    model = functools.partial(nnx.merge, graphs[0])
    read = jax.jit(lambda weights, text: model(weights).precompute_text_kv(text, 512))
    texts = [[read(own, experts.text(text)) for text in (PROMPT, "")] for own in weights]
    empty = jax.jit(lambda own: model(own).init_state(1, 4, 6))(weights[0])
    past = [[empty] * 2 for _ in weights]

    @jax.jit
    def stream_of(weights, latents, time, text, state, first):
        return model(weights).stream(latents, jnp.full(1, time), text, state, first_frame=first)

    made = []
    for first in (0, 2, 4):
        state = solver.init(frame_noise(keys, shape, first_frame=first))
        for row in (steps.at(number) for number in range(3)):
            which = 0 if row.timestep >= 875 else 1
            ahead, away = (
                stream_of(weights[which], state.latents, row.timestep, text, own, first)[0]
                for text, own in zip(texts[which], past[which], strict=True)
            )
            state = solver.step(state, away + 4.0 * (ahead - away), coefficients=row.coefficients)
        made.append(state.latents)
        past = [
            [stream_of(own, state.latents, 0.0, *each, first)[1] for each in zip(text, states, strict=True)]
            for own, text, states in zip(weights, texts, past, strict=True)
        ]
    expected = jnp.concatenate(made, axis=1)
    stream, made = experts.open_stream(PROMPT, seed=3, remember=0.0, **SIZE), []
    assert all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(stream.state.states) if leaf.ndim > 1)
    vae = experts.vae
    frames = jax.jit(lambda x: to_uint8(vae.decode(vae.denormalize(x))))(expected)[0]
    made = np.concatenate([next(stream) for _ in range(3)])
    assert np.abs(made.astype(int) - np.asarray(frames)).max() <= 1


@pytest.mark.full
def test_a_stream_goes_on_from_a_beginning_with_its_first_frame_as_the_image(from_image, tmp_path):
    """As the stream that made the frames would: the beginning's chunks are shown under the image's channels."""
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 48, 3), np.uint8)
    both = from_image.open_stream([PROMPT, PROMPT], seed=3, beginning=video, **SIZE)
    first = next(both)
    for row, block in enumerate(first):
        own = from_image.open_stream(PROMPT, seed=3 + row, beginning=video[row], **SIZE)
        image = from_image.open_stream(PROMPT, seed=3 + row, image=video[row, 0], **SIZE)
        np.testing.assert_array_equal(own.state.condition.channels, image.state.condition.channels)
        assert np.abs(next(own).astype(int) - block).max() <= 1
    both.save(tmp_path)
    np.testing.assert_array_equal(next(from_image.resume_stream(tmp_path)), next(both))


@pytest.mark.full
@pytest.mark.parametrize("config", [{}, {"is_residual": True, "patch_size": 2, "num_res_blocks": 2}])
def test_the_encoder_forgets_the_image(config):
    """The gradient of a latent frame by the first pixels is zero from `encoder_memory` on, and no sooner."""
    sizes = {"base_dim": 2, "z_dim": 16, "dim_mult": (1, 1), "temperal_downsample": (True,)}
    config = VAEConfig(**{"num_res_blocks": 1} | sizes | config)
    memory, clip = config.encoder_memory, np.zeros((1, 1 + 2 * config.encoder_memory, 8, 8, 3), np.float32)

    @jax.jit
    def slope(image, number):
        vae, rng = WanVAE(config, rngs=nnx.Rngs(0)), nnx.Rngs(1)
        # Some kernels begin with zeros in time.
        graph, state = nnx.split(vae)
        vae = nnx.merge(graph, jax.tree.map(lambda p: p + 0.2 * rng.normal(p.shape), state))
        latents = vae.encode(jnp.asarray(clip).at[:, 0].set(image), frames_per_step=None)
        return jnp.take(latents, number, axis=1).sum()

    image = jnp.asarray(image_of(8, 8), jnp.float32)[None] / 127.5 - 1
    after, before = (float(jnp.abs(jax.grad(slope)(image, number)).max()) for number in (memory, memory - 1))
    assert after == 0 < before
    assert VAEConfig.wan().encoder_memory == 29


def test_what_it_takes_is_said(from_image, tmp_path):
    assert from_image.why_not_stream() is None
    with pytest.raises(RehyatError, match="give image"):
        from_image.open_stream(PROMPT, **SIZE)
    stream = from_image.open_stream(PROMPT, image=image_of(32, 48), **SIZE)
    stream.save(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        opened(from_image.text.folder, tmp_path / "cache", HybridConfig(chunk_frames=1)).resume_stream(tmp_path)
