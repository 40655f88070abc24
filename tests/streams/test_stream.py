"""Streams: the frames of a call, a chunk at a time; kept, continued, forked, told another story; and every bad file."""

import dataclasses
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shared import tiers
from shared.checkpoint import save_tiny_checkpoint
from shared.tiers import examples

from rehyat_jax import HybridConfig, TextToVideo, load_transformer
from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.models.checkpoints import save_transformer
from rehyat_jax.runtime.variables import MixerParam
from rehyat_jax.sampling import Euler, FlowSchedule, UniPC, programs
from rehyat_jax.sampling.codec import Codec, to_uint8
from rehyat_jax.sampling.noise import ChunkNoise, video_keys
from rehyat_jax.sampling.rollout import Sampler, commit_chunk, denoise_chunk, init_states, precompute_text_kv
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.text import Padded
from rehyat_jax.streams.state import MOST_FRAMES, StreamState, load_state

HYBRID = HybridConfig(chunk_frames=2, overlap_frames=1)
SMALL = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "dull"}
FILE = "stream.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A student on disk, its feature maps far from their start, so that what has left the window counts."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    student = load_transformer(folder, hybrid=HYBRID)
    rng = np.random.default_rng(0)
    state = nnx.state(student, MixerParam)
    nnx.update(student, jax.tree.map(lambda p: jnp.asarray(p + 0.3 * rng.standard_normal(p.shape, np.float32)), state))
    shutil.rmtree(folder / "transformer")
    save_transformer(student, folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pipe(checkpoint, cache) -> TextToVideo:
    return TextToVideo.from_pretrained(checkpoint, cache_dir=cache)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A stream kept after two chunks, and the third."""
    stream = pipe.open_stream("a cat", seed=3, **SMALL)
    next(stream), next(stream)
    folder = tmp_path_factory.mktemp("saved")
    stream.save(folder)
    return folder, next(stream)


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
def test_a_stream_goes_on_from_a_beginning(pipe, tmp_path, remember):
    """Its first frames are those of the whole video's latents, decoded at once: the given and what was made after."""
    video = np.random.default_rng(0).integers(0, 256, (13, 32, 48, 3), np.uint8)
    stream = pipe.open_stream("a cat", seed=3, beginning=video, remember=remember, **SMALL)
    assert stream.frames_done == 13
    stream.save(tmp_path)
    block = next(stream)
    assert (block.shape, stream.frames_done) == ((8, 32, 48, 3), 21)
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path)), block)

    vae, settings = pipe.vae, stream.settings
    given = vae.normalize(vae.encode(jnp.asarray(video, jnp.float32)[None] / 127.5 - 1))
    keys, size = video_keys(3, count=1), given.shape[2:]
    text = Padded(jnp.stack([pipe.text("a cat"), pipe.text("dull")]), 512)
    text_kv = precompute_text_kv(pipe.transformer, text)
    sampler = Sampler(solver=settings.solver, guidance=settings.guidance, context_noise=remember)
    states = init_states(pipe.transformer, sampler, num_steps=3, batch=1, height=size[0], width=size[1])
    steps = settings.steps()
    for first in (0, 2):
        how = {"first_frame": first, "steps": steps, "context_noise": remember}
        latents, noise = given[:, first : first + 2], ChunkNoise(keys, first)
        states = commit_chunk(pipe.transformer, states, latents, noise, text_kv, **how)
    how = {"shape": (2, *size), "first_frame": 4, "steps": steps, "sampler": sampler}
    made, _ = denoise_chunk(pipe.transformer, states, ChunkNoise(keys, 4), text_kv, **how)
    whole = vae.decode(vae.denormalize(jnp.concatenate([given, made], axis=1)))
    want = np.asarray(to_uint8(whole))[0, 13:]
    assert np.abs(block.astype(int) - want).max() <= 1


@pytest.mark.parametrize(
    ("shape", "words"), [((12, 32, 48, 3), "8k - 3 frames"), ((9, 32, 48, 3), "8k - 3"), ((5, 32, 32, 3), "32x32")]
)
def test_a_beginning_that_does_not_fit_is_a_sentence(pipe, shape, words):
    with pytest.raises(RehyatError, match=words):
        pipe.open_stream("a cat", beginning=np.zeros(shape, np.uint8), **SMALL)
    for odd in (np.zeros((13, 32, 48, 3), np.float32), np.zeros((1, 13, 32, 48, 3), np.uint8)):
        with pytest.raises(RehyatError, match=r"uint8 \[F, H, W, 3\]"):
            pipe.open_stream("a cat", beginning=odd, **SMALL)


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


@pytest.mark.full
def test_another_process_goes_on_bit_for_bit(checkpoint, saved, tmp_path):
    """Without the compiled programs of this one."""
    folder, expected = saved
    script = (
        "import sys, numpy as np\n"
        "from rehyat_jax import TextToVideo\n"
        "from rehyat_jax.errors import RehyatError\n"
        "pipe = TextToVideo.from_pretrained(sys.argv[1], cache_dir=sys.argv[3])\n"
        "stream = pipe.resume_stream(sys.argv[2])\n"
        "np.save(sys.argv[4], next(stream))\n"
        # Here, where no other check of types is before ours: what is no prompt and no seed is a sentence.
        "for call in (lambda: pipe.stream(['a', 3]), lambda: pipe.stream(b'a'), lambda: stream.change_prompt(None),\n"
        "             lambda: pipe.stream('a', negative_prompt=3), lambda: pipe.stream('a', seed=0.5)):\n"
        "    try:\n"
        "        sys.exit(f'{call()} was made')\n"
        "    except RehyatError as error:\n"
        "        print(error)\n"
    )
    out = tmp_path / "block.npy"
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # as tests/conftest.py has it
    command = [sys.executable, "-c", script, str(checkpoint), str(folder), str(tmp_path / "cache"), str(out)]
    subprocess.run(command, check=True, env=environment, timeout=300)
    np.testing.assert_array_equal(np.load(out), expected)


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


# On disk.


def test_a_full_disk_leaves_the_stream_before(pipe, saved, tmp_path, monkeypatch):
    folder, expected = saved
    shutil.copy(folder / FILE, tmp_path)
    stream = pipe.resume_stream(folder)
    next(stream)
    before = (tmp_path / FILE).read_bytes()
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "")))
            with pytest.raises(RehyatError, match="no space"):
                stream.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        assert (tmp_path / FILE).read_bytes() == before
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path)), expected)
    (tmp_path / "file").touch()
    with pytest.raises(RehyatError, match="not a folder"):
        stream.save(tmp_path / "file")


@pytest.mark.parametrize(
    ("hybrid", "dtype"),
    [
        (HybridConfig(overlap_frames=0), jnp.float32),
        (HybridConfig(chunk_frames=1, overlap_frames=4), jnp.bfloat16),
        (HybridConfig(kind="window", sink_frames=1), jnp.bfloat16),
        (HybridConfig(kind="linear", overlap_frames=0), jnp.float16),
    ],
)
def test_every_kind_of_state_comes_back_bit_for_bit(checkpoint, cache, tmp_path, hybrid, dtype):
    """Whatever bits it holds, in an ordinary safetensors file."""
    pipe = TextToVideo.from_pretrained(checkpoint, hybrid=hybrid, dtype=dtype, cache_dir=cache)
    stream = pipe.open_stream("a cat", **SMALL, solver=Euler())
    rng = np.random.default_rng(0)

    def filled(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        return x + 3 if jnp.issubdtype(x.dtype, jnp.integer) else x

    state = jax.tree.map(filled, stream.state)._replace(first_frame=jnp.int32(6))
    stream.state = state
    stream.save(tmp_path)
    again = pipe.resume_stream(tmp_path)
    assert again.settings == stream.settings
    assert jax.tree.structure(again.state) == jax.tree.structure(state)
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(again.state), strict=True):
        assert mine.dtype == theirs.dtype
        if jnp.issubdtype(mine.dtype, jax.dtypes.prng_key):
            mine, theirs = jax.random.key_data(mine), jax.random.key_data(theirs)
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def test_a_stream_belongs_to_its_model(checkpoint, cache, saved, tmp_path):
    """Other weights, if only one and by little; the same in another number format; or another way to attend."""
    pipes = [
        TextToVideo.from_pretrained(checkpoint, cache_dir=cache, **options)
        for options in ({}, {"hybrid": dataclasses.replace(HYBRID, stabilizer="lse")}, {"dtype": jnp.bfloat16})
    ]
    bias = pipes[0].transformer.blocks.ffn.up.bias
    bias.set_value(bias.get_value().at[1, 7].add(1e-6))
    for pipe in pipes:
        with pytest.raises(CheckpointError, match="made by another model"):
            pipe.resume_stream(saved[0])


def test_settings_that_have_no_form_on_disk(pipe, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Mine(Euler):
        pass

    with pytest.raises(ConfigError, match="Mine cannot be saved"):
        pipe.open_stream("a cat", **SMALL, solver=Mine()).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@hypothesis.settings(max_examples=examples(50), deadline=None)
@given(
    st.sampled_from([Euler(), UniPC(1), UniPC(3)]),
    st.sampled_from(["diffusers", "official"]),
    st.floats(0.1, 20),
    st.floats(0, 20),
    st.integers(1, 100),
    st.sampled_from(["steps", 0.0, 0.25]),
)
def test_settings_come_back_from_json(solver, grid, shift, guidance, steps, remember):
    settings = Settings(
        num_frames=9,
        height=480,
        width=832,
        num_inference_steps=steps,
        guidance_scale=guidance,
        schedule=FlowSchedule(grid=grid, shift=shift),
        solver=solver,
        remember=remember,
    )
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def rewritten(source: Path, target: Path, *, header=None, arrays=None, key: str = "rehyat_stream") -> None:
    """A copy with another header or other arrays; None removes one."""
    with safe_open(source / FILE, framework="numpy") as file:
        content = json.loads(file.metadata()[key])
    tensors = {name: x for name, x in (load_file(source / FILE) | (arrays or {})).items() if x is not None}
    text = header if isinstance(header, str) else json.dumps(merged(content, header or {}))
    save_file(tensors, target / FILE, metadata={key: text})


def merged(content: dict, changes: dict) -> dict:
    """Changes within changes; None removes a name."""
    out = content | changes
    for name, value in changes.items():
        if isinstance(value, dict):
            out[name] = merged(content[name], value)
    return {name: value for name, value in out.items() if value is not None}


HUGE = 10**400


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"version": 1}',
        "9" * 5000,
        {"version": 2},
        {"version": None},
        {"model": "0" * 64},
        {"model": None},
        {"prompt": 3},
        {"prompt": None},
        {"prompt": []},
        {"prompt": [3]},
        {"prompt": ["a cat", "a dog"]},
        {"prompt": ["x"] * 70_000},
        {"negative_prompt": []},
        {"settings": None},
        {"settings": []},
        {"settings": {"more": 1}},
        {"settings": {"height": None}},
        {"settings": {"height": 33}},
        {"settings": {"height": 16}},
        {"settings": {"height": HUGE}},
        {"settings": {"height": "32"}},
        {"settings": {"height": True}},
        {"settings": {"width": -48}},
        {"settings": {"num_frames": HUGE}},
        {"settings": {"num_frames": 0}},
        {"settings": {"num_inference_steps": 4}},
        {"settings": {"num_inference_steps": 0}},
        {"settings": {"num_inference_steps": HUGE}},
        {"settings": {"guidance_scale": HUGE}},
        {"settings": {"guidance_scale": float("nan")}},
        {"settings": {"guidance_scale": 1.0}},
        {"settings": {"schedule": 1}},
        {"settings": {"schedule": {"grid": "mine"}}},
        {"settings": {"schedule": {"shift": 0}}},
        {"settings": {"schedule": {"shift": HUGE}}},
        {"settings": {"schedule": {"shift": float("inf")}}},
        {"settings": {"schedule": {"num_train_timesteps": HUGE}}},
        {"settings": {"schedule": {"num_train_timesteps": 0}}},
        {"settings": {"remember": 0.5}},
        {"settings": {"remember": "all"}},
        {"settings": {"remember": 1}},
        {"settings": {"remember": float("nan")}},
        {"settings": {"solver": {"name": "os.system"}}},
        {"settings": {"solver": {"name": 3}}},
        {"settings": {"solver": {"order": 7}}},
        {"settings": {"solver": {"order": None}}},
        {"settings": {"solver": {"more": 1}}},
        {"settings": {"solver": {"name": "Euler"}}},
    ],
)
def test_hostile_headers_are_sentences(pipe, saved, tmp_path, header):
    rewritten(saved[0], tmp_path, header=header)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        pipe.resume_stream(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("text", lambda x: None, "lacks 'text'"),
        ("text", lambda x: x[:1], "is F32"),
        ("text", lambda x: x.astype(np.float16), "is F16"),
        ("text", lambda x: np.where(x == x.max(), np.nan, x), "NaN or infinity"),
        ("states.s", lambda x: np.full_like(x, np.inf), "NaN or infinity"),
        ("states.seen", lambda x: x - 1000, "negative"),
        ("keys", lambda x: x.astype(np.int32), "is I32"),
        ("first_frame", lambda x: np.full_like(x, -2), "negative"),
        ("first_frame", lambda x: np.full_like(x, 3), "middle of a chunk"),
        ("first_frame", lambda x: np.full_like(x, MOST_FRAMES + 2), "came before"),
        ("first_frame", lambda x: x.astype(np.int64), "is I64"),
        ("more", lambda x: np.zeros(3, np.float32), "no use for 'more'"),
    ],
)
def test_hostile_arrays_are_sentences(pipe, saved, tmp_path, name, change, match):
    rewritten(saved[0], tmp_path, arrays={name: change(load_file(saved[0] / FILE).get(name))})
    with pytest.raises(CheckpointError, match=match):
        pipe.resume_stream(tmp_path)


def test_a_stream_saved_before_remember_was_a_setting(pipe, saved, tmp_path):
    rewritten(saved[0], tmp_path, header={"settings": {"remember": None}})
    assert pipe.resume_stream(tmp_path).settings.remember == "steps"


def test_what_is_no_stream_is_a_sentence(pipe, saved, tmp_path):
    whole = (saved[0] / FILE).read_bytes()
    for content in [
        b"",
        b"{}",
        whole[:7],
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"\0",
        b"\xff" * 8 + whole[8:],
        pickle.dumps({"a": 1}),
        bytes(4096),
    ]:
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(CheckpointError, match=FILE):
            pipe.resume_stream(tmp_path)
    (tmp_path / FILE).unlink()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no saved stream"):
            pipe.resume_stream(folder)
    (tmp_path / FILE).mkdir()
    with pytest.raises(CheckpointError, match="no saved stream"):
        pipe.resume_stream(tmp_path)


@hypothesis.settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_bytes_are_known_or_harmless(pipe, saved, tmp_path, data):
    content = bytearray((saved[0] / FILE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / FILE).write_bytes(content)
    try:
        stream = pipe.resume_stream(tmp_path)
    except CheckpointError:
        return
    assert {leaf.shape for leaf in jax.tree.leaves(stream.state.states)}


SAVES_FOR_EVER = """
import sys, itertools
import jax.numpy as jnp
from rehyat_jax.sampling import Euler, FlowSchedule
from rehyat_jax.sampling.noise import video_keys
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.streams.state import StreamRecord, StreamState, save_stream

settings = Settings(num_frames=5, height=8, width=8, num_inference_steps=1, guidance_scale=1.0,
                    schedule=FlowSchedule(shift=3.0), solver=Euler())
record = StreamRecord(settings=settings, model="", prompt="", negative_prompt="")
for version in itertools.count():
    numbers = jnp.full((4, 1, 1 << 20), version, jnp.float32)
    save_stream(sys.argv[1], StreamState(states=numbers, decoder=numbers[0], first_frame=jnp.int32(version),
                                         keys=video_keys(version, count=1), text=numbers[:1, None, :3, :5]), record)
    print(version, flush=True)
"""


@pytest.mark.full
def test_a_kill_at_any_moment_leaves_a_whole_stream(tmp_path):
    """SIGKILL while a state of 20 MB is written again and again: what is there afterwards is one version of it."""
    shapes = ((4, 1, 1 << 20), (1, 1 << 20), (1, 1, 1, 5))
    states, decoder, text = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    template = StreamState(states, decoder, jax.ShapeDtypeStruct((), jnp.int32), video_keys(0, count=1), text)
    rng = np.random.default_rng(0)
    torn = 0
    for kills in range(50):
        command = [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "0\n"
            time.sleep(rng.uniform(0.05, 0.3))
            process.send_signal(signal.SIGKILL)
            last = int(["0", *process.stdout.read().split()][-1])
        state = load_state(tmp_path, template)
        version = int(state.first_frame)
        assert version >= last
        for leaf in (state.states, state.decoder, state.text):
            assert (np.asarray(leaf) == version).all()
        left = len(list(tmp_path.iterdir())) - 1
        # The next process to save takes away what a killed one left.
        assert left <= 1
        torn += left
        if kills >= 2 and torn:  # at least one was killed while it wrote
            break
    assert torn
