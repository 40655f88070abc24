"""Streams kept on disk: bit for bit, by another process too, whole after a kill, and for the model that made them."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import tiers
from shared.streams import FILE, HYBRID, SMALL

from rehyat_jax import HybridConfig, TextToVideo
from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.sampling import Euler, FlowSchedule, UniPC
from rehyat_jax.sampling.noise import video_keys
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.streams.state import StreamState, load_state


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


@hypothesis.settings(max_examples=tiers.examples(50), deadline=None)
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
