"""Streams: the frames of a call, a chunk at a time; forked, told another story, several side by side."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared import tiers
from shared.streams import SMALL

from rehyat_jax import HybridConfig, TextToVideo
from rehyat_jax.errors import RehyatError
from rehyat_jax.sampling import UniPC, programs
from rehyat_jax.sampling.codec import Codec, to_uint8
from rehyat_jax.sampling.noise import ChunkNoise, video_keys
from rehyat_jax.sampling.rollout import Sampler, commit_chunk, denoise_chunk, init_state, precompute_text_kv
from rehyat_jax.sampling.text import Padded
from rehyat_jax.streams.state import MOST_FRAMES


def test_nothing_is_compiled_and_nothing_grows_after_the_first_chunk(pipe, caplog):
    """The transformer once for any length, the decoder once for the first frame and once for all others."""
    jax.clear_caches()
    stream = pipe.open_stream("a cat", **SMALL)

    def compiled(blocks: int) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            for _ in range(blocks):
                next(stream)
        return [record.message.split()[1] for record in caplog.records if record.message.startswith("Compiling ")]

    programs = ["jit(denoise_chunk)", "jit(decode_first)", "jit(decode_next)"]
    assert sorted(name for name in compiled(1) if name in programs) == sorted(programs)
    held = [x.nbytes for x in jax.live_arrays()]
    assert compiled(4) == []
    assert sum(x.nbytes for x in jax.live_arrays()) == sum(held)
    # Past the 1,024 frames of Wan's tables too.
    stream.state = stream.state._replace(first_frame=jnp.int32(1022))
    assert compiled(3) == []
    assert stream.frames_done == 1 + 4 * 1027
    stream.change_prompt("a dog")
    assert [name for name in compiled(1) if name in programs] == []


def test_a_stream_has_the_frames_of_a_call(pipe):
    stream = pipe.open_stream("a cat", seed=3, **SMALL)
    assert stream.frames_done == 0
    blocks = []
    for frames, block in zip((5, 13, 21), stream, strict=False):
        blocks.append(block)
        assert stream.frames_done == sum(map(len, blocks)) == frames
    assert [(block.shape, block.dtype) for block in blocks] == [((count, 32, 48, 3), np.uint8) for count in (5, 8, 8)]
    whole = pipe("a cat", num_frames=21, seed=3, **SMALL)
    assert whole.std() > 10
    # Latents agree to 1e-4 (tests/sampling/test_sweep.py): at most a pixel on the edge between two levels falls to
    # the other.
    apart = np.abs(np.concatenate(blocks).astype(int) - whole)
    assert apart.max() <= 1
    assert apart.mean() < 0.001


@pytest.mark.parametrize("remember", [0.0, tiers.full("steps")])
@pytest.mark.full
def test_a_stream_goes_on_from_a_beginning(pipe, tmp_path, remember):
    """Its first frames are those of the whole video's latents, decoded at once: the given and what was made after."""
    video = np.random.default_rng(0).integers(0, 256, (13, 32, 48, 3), np.uint8)
    stream = pipe.open_stream("a cat", seed=3, beginning=video, remember=remember, **SMALL)
    assert stream.frames_done == 13
    stream.save(tmp_path)
    block = next(stream)
    assert (block.shape, stream.frames_done) == ((8, 32, 48, 3), 21)
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path)), block)

    settings = stream.settings
    sampler = Sampler(solver=settings.solver, guidance=settings.guidance, context_noise=remember)
    graphs, weights = zip(*map(nnx.split, (pipe.transformer, pipe.vae)), strict=True)

    @jax.jit
    def expected(weights, keys, text, video):
        transformer, vae = map(nnx.merge, graphs, weights)
        given = vae.normalize(vae.encode(video / 127.5 - 1))
        size, steps = given.shape[2:], settings.steps()
        text_kv = precompute_text_kv(transformer, Padded(text, 512))
        states = init_state(transformer, sampler, num_steps=3, batch=1, height=size[0], width=size[1])
        for first in (0, 2):
            how = {"first_frame": first, "steps": steps, "context_noise": remember}
            latents, noise = given[:, first : first + 2], ChunkNoise(keys, first)
            states = commit_chunk(transformer, states, latents, noise, text_kv, **how)
        how = {"shape": (2, *size), "first_frame": 4, "steps": steps, "sampler": sampler}
        made, _ = denoise_chunk(transformer, states, ChunkNoise(keys, 4), text_kv, **how)
        return to_uint8(vae.decode(vae.denormalize(jnp.concatenate([given, made], axis=1))))

    text = jnp.stack([pipe.text("a cat"), pipe.text("dull")])
    whole = expected(weights, video_keys(3, count=1), text, jnp.asarray(video, jnp.float32)[None])
    assert np.abs(block.astype(int) - np.asarray(whole)[0, 13:]).max() <= 1


@pytest.mark.parametrize(
    ("shape", "words"), [((12, 32, 48, 3), "8k - 3 frames"), ((9, 32, 48, 3), "8k - 3"), ((5, 32, 32, 3), "32x32")]
)
def test_a_beginning_that_does_not_fit_is_a_sentence(pipe, shape, words):
    with pytest.raises(RehyatError, match=words):
        pipe.open_stream("a cat", beginning=np.zeros(shape, np.uint8), **SMALL)
    for odd in (np.zeros((13, 32, 48, 3), np.float32), np.zeros((1, 13, 32, 48, 3), np.uint8)):
        with pytest.raises(RehyatError, match=r"uint8 \[F, H, W, 3\]"):
            pipe.open_stream("a cat", beginning=odd, **SMALL)


@pytest.mark.full
def test_several_videos_side_by_side_are_each_a_stream_of_its_own(pipe, tmp_path):
    """Row i is prompt i with the noise of seed + i; another batch size may round otherwise: one level of 255. Saved,
    forked and told another story together."""
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 48, 3), np.uint8)
    prompts = ["a cat", "a dog"]
    both = pipe.open_stream(prompts, seed=3, beginning=video, **SMALL)
    assert (both.frames_done, both.seeds) == (5, (3, 4))
    first = next(both)
    assert (first.shape, first.dtype, both.frames_done) == ((2, 8, 32, 48, 3), np.uint8, 13)
    for row, prompt in enumerate(prompts):
        own = next(pipe.open_stream(prompt, seed=3 + row, beginning=video[row], **SMALL))
        assert np.abs(first[row].astype(int) - own).max() <= 1
    both.save(tmp_path)
    same, other = pipe.resume_stream(tmp_path), both.fork(seed=8)
    assert (same.prompt, same.seeds, other.seeds) == (prompts, (3, 4), (8, 9))
    second = next(both)
    np.testing.assert_array_equal(next(same), second)
    assert (next(other) != second).mean() > 0.5
    both.change_prompt(["a cow", "a dog"])
    same.change_prompt(prompts)
    third, unchanged = next(both), next(same)
    assert (third[0] != unchanged[0]).any()
    assert np.abs(third[1].astype(int) - unchanged[1]).max() <= 1
    for wrong in ("a cow", ["a cow"], ["a", "b", "c"]):
        with pytest.raises(RehyatError, match="a list of 2 prompts"):
            both.change_prompt(wrong)
    with pytest.raises(RehyatError, match="1 beginnings for 2 prompts"):
        pipe.open_stream(prompts, beginning=video[:1], **SMALL)


def test_a_list_of_one_is_a_batch_of_one(pipe):
    (block,) = next(pipe.stream(["a cat"], seed=3, **SMALL))
    np.testing.assert_array_equal(block, next(pipe.stream("a cat", seed=3, **SMALL)))
    with pytest.raises(RehyatError, match="one prompt"):
        pipe.open_stream("a cat", **SMALL).change_prompt(["a cat"])


def test_streams_differ_by_seed_alone(pipe, saved):
    a, b, c = (pipe.stream("a cat", seed=seed, **SMALL) for seed in (1, 1, 2))
    first = next(a)
    np.testing.assert_array_equal(first, next(b))
    assert (first != next(c)).mean() > 0.5


def test_a_fork_goes_its_own_way(pipe, saved):
    folder, expected = saved
    stream = pipe.resume_stream(folder)
    same, other = stream.fork(), stream.fork(seed=9)
    assert same.frames_done == other.frames_done == 13
    np.testing.assert_array_equal(next(stream), expected)
    np.testing.assert_array_equal(next(same), expected)
    assert (next(other) != expected).mean() > 0.5
    assert stream.frames_done == same.frames_done == other.frames_done == 21
    # Seed 3's own fork with seed 3 has changed nothing.
    np.testing.assert_array_equal(next(pipe.resume_stream(folder).fork(seed=3)), expected)


def test_the_prompt_changes_between_chunks(pipe, saved, tmp_path):
    folder, expected = saved
    stream = pipe.resume_stream(folder)
    assert (stream.prompt, stream.negative_prompt) == ("a cat", "dull")
    stream.change_prompt("a dog")
    assert (stream.prompt, stream.negative_prompt) == ("a dog", "dull")
    stream.save(tmp_path)
    again = pipe.resume_stream(tmp_path)
    assert again.prompt == "a dog"
    changed = next(stream)
    np.testing.assert_array_equal(next(again), changed)
    assert (changed != expected).any()
    other = pipe.resume_stream(folder)
    other.change_prompt("a cat", "bright")
    assert (next(other) != expected).any()
    back = pipe.resume_stream(folder)
    back.change_prompt("a dog", "bright")
    back.change_prompt("a cat", "dull")
    np.testing.assert_array_equal(next(back), expected)


def test_text_keys_and_values_are_computed_once(pipe, saved, monkeypatch):
    """Not once a chunk, nor by a fork; again where the prompt changed, and by a stream that comes from the disk."""
    read, precompute = [], programs.precompute_text_kv

    def counted(*arguments, **options):
        read.append(arguments)
        return precompute(*arguments, **options)

    monkeypatch.setattr(programs, "precompute_text_kv", counted)
    stream = pipe.resume_stream(saved[0])
    next(stream), next(stream), next(stream.fork()), next(stream)
    assert len(read) == 1
    stream.change_prompt("a dog")
    next(stream), next(stream)
    assert len(read) == 2


def test_without_guidance_there_is_one_evaluation(pipe):
    stream = pipe.open_stream("a cat", height=16, width=16, num_inference_steps=2, guidance_scale=1, solver=UniPC(1))
    assert stream.state.text.shape == (1, 1, 512, 32)
    assert {leaf.shape[:3] for leaf in jax.tree.leaves(stream.state.states)} == {(2, 1, 2)}
    assert len(jax.tree.leaves(stream.state)) > 5  # a pytree


def test_what_cannot_stream_says_which_blocks_prevent_it(checkpoint, cache):
    for hybrid, match in [
        (HybridConfig(blocks=(1,)), "block 0 of 2 attend"),
        (None, "blocks 0-1 of 2 attend"),
        (HybridConfig(causal=False), "blocks 0-1 of 2 are not causal"),
    ]:
        pipe = TextToVideo.from_pretrained(checkpoint, hybrid=hybrid, cache_dir=cache)
        with pytest.raises(RehyatError, match=match):
            pipe.stream("a cat")


def test_impossible_streams_are_sentences(pipe):
    for options, match in [
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 32}, "seed"),
        ({"height": 0}, "height"),
        ({"width": 15}, "too small"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"guidance_scale": float("nan")}, "finite"),
    ]:
        with pytest.raises(RehyatError, match=match):
            pipe.stream(**{"prompt": "a cat", **SMALL, **options})
    stream = pipe.open_stream("a cat", **SMALL)
    with pytest.raises(RehyatError, match="seed"):
        stream.fork(seed=-1)
    stream.state = stream.state._replace(first_frame=jnp.int32(MOST_FRAMES))
    with pytest.raises(RehyatError, match="ends after 16777216 latent frames"):
        next(stream)


def test_an_interrupt_in_a_chunk_costs_that_chunk(pipe, saved, monkeypatch):
    folder, expected = saved
    stream = pipe.resume_stream(folder)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Codec, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    for call in (lambda: next(stream), lambda: stream.save(folder), stream.fork):
        with pytest.raises(RehyatError, match="resume it from where it was saved"):
            call()
    np.testing.assert_array_equal(next(pipe.resume_stream(folder)), expected)
