"""Estimates of memory against XLA's account of programs and what processes used; refusals before loading."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from shared.tiers import full

from benchmarks import memory_table
from rehyat_jax import cli
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.folder import find_model
from rehyat_jax.models.memory import (
    Making,
    VideoShape,
    decoder_bytes,
    encoder_bytes,
    preview_bytes,
    student_config,
    transformer_bytes,
    video_need,
)
from rehyat_jax.models.taehv.config import TinyDecoderConfig
from rehyat_jax.models.taehv.decoder import TinyDecoder
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime import memory
from rehyat_jax.runtime.memory import Need, Room, check_memory

SMALL = WanConfig(num_layers=3, num_attention_heads=4, attention_head_dim=32, ffn_dim=512, text_dim=64, freq_dim=64)
WAN = WanConfig.t2v_1_3b()
SMALL_VAE = VAEConfig(base_dim=32, dim_mult=(1, 2, 2, 2))


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("model", "shape", "batch", "hybrid"),
    [
        full(SMALL, (3, 24, 24), 2, None),
        (SMALL, (9, 32, 32), 1, None),
        (SMALL, (9, 24, 24), 2, HybridConfig(chunk_frames=3, overlap_frames=1)),
        full(WAN, (5, 30, 52), 2, None),
        full(WAN, (21, 60, 104), 2, None),
    ],
)
def test_a_forward_pass_is_estimated_to_a_factor_of_two(model, shape, batch, hybrid):
    module = nnx.eval_shape(lambda: WanTransformer(model, hybrid=hybrid, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(module)

    def forward(weights, latents, t, text):
        return nnx.merge(graph, weights)(latents, t, text)

    inputs = [(batch, *shape, 16), (batch,), (batch, 512, model.text_dim)]
    arrays = [jax.ShapeDtypeStruct(x, jnp.float32) for x in inputs]
    compiled = jax.jit(forward).lower(weights, *arrays).compile().memory_analysis()
    held, tokens = _bytes(weights), shape[0] * shape[1] * shape[2] // 4
    true = compiled.temp_size_in_bytes + held
    estimate = transformer_bytes(model, tokens=tokens, batch=batch, dtype=jnp.float32, weights=held) + held
    assert 0.5 < estimate / true < 2, (estimate, true)


@pytest.mark.parametrize(
    ("vae", "height", "width"),
    [
        (SMALL_VAE, 96, 64),
        full(VAEConfig(), 256, 448),
        full(VAEConfig(), 480, 832),
        full(VAEConfig.wan22(), 256, 448),
        full(VAEConfig.wan22(), 704, 1280),
    ],
)
def test_decoding_is_estimated_to_a_factor_of_two(vae, height, width):
    graph, weights = nnx.split(nnx.eval_shape(lambda: WanVAE(vae, rngs=nnx.Rngs(0))))
    space = vae.spatial_factor
    latent = jax.ShapeDtypeStruct((1, 1, height // space, width // space, vae.z_dim), jnp.float32)

    def first(weights, latent):
        return nnx.merge(graph, weights).decode_first(latent)

    def following(weights, latent, state):
        return nnx.merge(graph, weights).decode_next(latent, state)

    _, state = jax.eval_shape(first, weights, latent)
    compiled = jax.jit(following, donate_argnums=2).lower(weights, latent, state).compile().memory_analysis()
    true, estimate = compiled.temp_size_in_bytes + _bytes(state), decoder_bytes(vae, height=height, width=width)
    assert 0.5 < estimate / true < 2, (estimate, true)


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (TinyDecoderConfig(widths=(16, 12, 8, 8)), 96, 64),
        full(TinyDecoderConfig(), 480, 832),
        full(TinyDecoderConfig.wan22(), 704, 1280),
    ],
)
def test_a_preview_is_estimated_to_a_factor_of_two(config, height, width):
    graph, weights = nnx.split(nnx.eval_shape(lambda: TinyDecoder(config, rngs=nnx.Rngs(0))))
    space = config.spatial_factor
    latent = jax.ShapeDtypeStruct((1, 1, height // space, width // space, config.z_dim), jnp.float32)
    _, state = jax.eval_shape(lambda w, x: nnx.merge(graph, w).decode_first(x), weights, latent)
    program = jax.jit(lambda w, x, state: nnx.merge(graph, w).decode_next(x, state), donate_argnums=2)
    compiled = program.lower(weights, latent, state).compile().memory_analysis()
    true, estimate = compiled.temp_size_in_bytes + _bytes(state), preview_bytes(config, height=height, width=width)
    assert 0.5 < estimate / true < 2, (estimate, true)


@pytest.mark.parametrize(
    ("vae", "frames", "height", "width", "step"),
    [
        (SMALL_VAE, 9, 96, 64, 2),
        full(VAEConfig(), 17, 256, 448, 4),
        full(VAEConfig(), 81, 256, 448, 4),
        full(VAEConfig.wan22(), 17, 256, 448, 4),
    ],
)
def test_encoding_is_estimated_to_a_factor_of_two(vae, frames, height, width, step):
    graph, weights = nnx.split(nnx.eval_shape(lambda: WanVAE(vae, rngs=nnx.Rngs(0))))

    def encode(weights, clip):
        video = clip[None].astype(jnp.float32) / 127.5 - 1.0
        return nnx.merge(graph, weights).encode(video, frames_per_step=step)

    clip = jax.ShapeDtypeStruct((frames, height, width, 3), jnp.uint8)
    true = jax.jit(encode).lower(weights, clip).compile().memory_analysis().temp_size_in_bytes
    estimate = encoder_bytes(vae, frames=frames, height=height, width=width, latent_frames_per_step=step)
    assert 0.5 < estimate / true < 2, (estimate, true)


#: A command, and what it took from when it asked for room: the estimate, and the growth to the process's peak.
_PEAK = """
import resource, sys
from pathlib import Path
from rehyat_jax import cli
from rehyat_jax.runtime import memory

check, seen = memory.check_memory, []

def asked(need, **how):
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    seen[:] = need.on_device + need.host, held
    check(need, **how)

memory.check_memory = asked
assert cli.main(sys.argv[1:]) == 0
# Not rusage's peak: a child has its parent's, from before it began a program of its own.
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(seen[0], peak - seen[1])
"""


@pytest.mark.full
@pytest.mark.usefixtures("compiled_for_speed")
@pytest.mark.parametrize(
    ("sweep", "side", "frames"), [("per-step", 256, 33), ("per-chunk", 256, 33), ("per-chunk", 64, 21)]
)
def test_the_peak_of_a_process_is_estimated_to_a_factor_of_two_and_a_half(tmp_path, sweep, side, frames):
    """Of the bundled model, what its process takes from when it asks for room; seen: 0.9 to 2.0."""
    options = ["generate", "a lemon", "--sweep", sweep, "--size", f"{side}x{side}", "--frames", str(frames)]
    command = [sys.executable, "-c", _PEAK, *options, "--steps", "2", "--out", str(tmp_path / "a.mp4")]
    # Compiling is part of what a first run holds.
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    )
    assert done.returncode == 0, done.stderr
    estimate, true = map(int, done.stdout.split()[-2:])
    assert 0.4 < estimate / true < 2.5, (estimate, true)


def _room(monkeypatch, *, host: int | None, device: int | None = None, shared: bool = True) -> None:
    monkeypatch.setattr(memory.Room, "here", classmethod(lambda cls: Room(host=host, device=device, shared=shared)))


def test_a_server_without_room_for_one_stream_is_refused_before_loading(monkeypatch, capsys):
    _room(monkeypatch, host=60_000_000)
    assert cli.main(["serve", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "streams of 64x64 need about " in said
    assert "0.1 GB are free: --force goes on all the same" in said


def test_a_video_without_room_is_refused_before_loading_with_what_would_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _room(monkeypatch, host=3_000_000_000)
    argv = ["generate", "a lemon", "--size", "2048x1024", "--sweep", "per-step", "--frames", "5"]
    assert cli.main(argv) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith("rehyat: 5 frames of 2048x1024 need about ")
    assert "of it for " in said
    assert "3.0 GB are free: --size " in said
    assert "would fit, and --force goes on all the same" in said
    assert not list(tmp_path.iterdir())


def test_force_says_it_and_goes_on_and_what_is_not_known_refuses_nothing(monkeypatch, capsys):
    need = Need(device={"the transformer": 8_000_000_000, "decoding": 1_000_000_000}, host=500_000_000)
    _room(monkeypatch, host=4_000_000_000)
    check_memory(need, what="a video", force=True)
    assert "9.5 GB of memory (8.0 of it for the transformer), and 4.0 GB are free; going on" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"a video need about 9.5 GB of memory .*: --force goes on all the same"):
        check_memory(need, what="a video")
    _room(monkeypatch, host=None)
    check_memory(need, what="a video")
    _room(monkeypatch, host=1_000_000_000, device=16_000_000_000, shared=False)
    check_memory(need, what="a video")
    _room(monkeypatch, host=1_000_000_000, device=8_000_000_000, shared=False)
    with pytest.raises(ConfigError, match=r"about 9.0 GB of device memory"):
        check_memory(need, what="a video")


def test_this_machines_room_is_known_and_a_containers_limit_counts(tmp_path, monkeypatch):
    room = Room.here()
    assert room.shared
    assert room.host is not None
    assert 1 << 27 < room.host < 1 << 44
    for name, text in (("max", "3000000000\n"), ("current", "1000000000\n")):
        (tmp_path / name).write_text(text)
    limits = ((str(tmp_path / "max"), str(tmp_path / "current")), (str(tmp_path / "none"), str(tmp_path / "none")))
    monkeypatch.setattr(memory, "_LIMITS", limits)
    assert Room.here().host == min(2_000_000_000, room.host) or Room.here().host < 2_000_000_000
    (tmp_path / "max").write_text("max\n")
    assert (Room.here().host or 0) > 1 << 27


def test_a_larger_video_needs_more_and_a_stream_no_more_for_more_frames():
    folder = find_model("mini-sprites")
    shape = VideoShape(frames=81, height=256, width=256, steps=4, guided=True)
    hybrid = student_config(folder)

    def bytes_of(streams: bool, **changes: int) -> int:
        making = Making(hybrid=hybrid, streams=streams)
        need = video_need(folder, dataclasses.replace(shape, **changes), making, dtype="float32")
        return need.on_device + need.host

    assert bytes_of(False, height=512) > bytes_of(False)
    assert bytes_of(False, frames=321) > bytes_of(False)
    assert bytes_of(True, frames=3201) == bytes_of(True)
    assert bytes_of(True, height=512) > bytes_of(True)


@pytest.mark.full
def test_the_documents_table_is_the_commands():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "lora.md").read_text(encoding="utf-8")
    assert memory_table.table() in page


def test_blocks_from_the_host_and_tiles_take_less(tmp_path):
    folder = find_model("mini-sprites")
    shape = VideoShape(frames=81, height=512, width=512, steps=4, guided=True)
    making = Making(hybrid=student_config(folder), streams=True, remember=0.0)
    plain, small, tiled = (
        video_need(folder, shape, dataclasses.replace(making, **more), dtype="float32")
        for more in ({}, {"offload": True}, {"vae_tile": 128})
    )
    assert small.on_device < plain.on_device
    assert small.host > plain.host
    assert tiled.on_device < plain.on_device
