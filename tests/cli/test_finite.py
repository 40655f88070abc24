"""A run is watched for finite numbers: finite weights whose run overflows end it in one sentence, with exit code 1."""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
import safetensors.numpy
from shared.checkpoint import save_tiny_checkpoint
from shared.tiers import full

from rehyat_jax import cli
from rehyat_jax.sampling.session import Session
from rehyat_jax.video.io import read_video

SMALL = ["--size", "16x16", "--steps", "2", "--guidance", "1", "--frames", "5"]
STREAM = ["--hybrid", "2+1", "--size", "16x16", "--steps", "2", "--guidance", "1", "--frames", "32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REHYAT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def rehyat(capsys, tmp_path):
    def run(*argv: object):
        code = cli.main(["generate", "a cat", "--out", str(tmp_path / "out" / "a.mp4"), *map(str, argv)])
        return code, capsys.readouterr().err.strip().split("\n")[-1]

    return run


def overflowing(checkpoint: Path, folder: Path, part: str, tensor: str) -> Path:
    """The checkpoint with one tensor as large as float32 holds: finite, and beyond it once it meets activations."""
    shutil.copytree(checkpoint, folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(file)
    assert tensor in tensors
    tensors[tensor] = tensors[tensor] / abs(tensors[tensor]).max() * tensors[tensor].dtype.type(3e38)
    assert jnp.isfinite(tensors[tensor]).all()
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("part", "tensor", "words"),
    [
        ("transformer", "proj_out.weight", "denoising step 1 of 2 made numbers that are not finite"),
        ("vae", "decoder.conv_out.weight", "decoding latent frame 0 made pixels that are not finite"),
        ("text_encoder", "encoder.final_layer_norm.weight", "embedding of a prompt is not finite"),
    ],
)
@pytest.mark.parametrize("how", [full(SMALL, id="per step"), pytest.param(STREAM, id="per chunk")])
def test_not_finite_is_a_sentence_and_no_file(rehyat, checkpoint, tmp_path, part, tensor, words, how):
    model = overflowing(checkpoint, tmp_path / "model", part, tensor)
    code, last = rehyat("--model", model, *how)
    if how is STREAM:
        words = words.replace("denoising step 1 of 2", "chunk 1, from latent frame 0 on,")
    assert code == 1
    assert last.startswith("rehyat: ")
    assert words in last
    assert os.listdir(tmp_path / "out") == []


def test_not_finite_keeps_what_was_whole(rehyat, checkpoint, tmp_path, monkeypatch):
    """The third chunk overflows: two play, and the same command with --resume makes the rest when it does not."""
    denoise, made = Session.denoise_chunk, []

    def third(self, *arguments):
        latents, states = denoise(self, *arguments)
        made.append(latents.shape)
        return (latents * jnp.inf if len(made) == 3 else latents), states

    with monkeypatch.context() as patch:
        patch.setattr(Session, "denoise_chunk", third)
        code, last = rehyat("--model", checkpoint, *STREAM)
    assert code == 1
    assert "chunk 3, from latent frame 4 on, made numbers that are not finite" in last
    assert "a.mp4 plays as it is, 13 frames; the same command with --resume goes on" in last
    assert len(read_video(tmp_path / "out" / "a.mp4")) == 13
    code, last = rehyat("--model", checkpoint, *STREAM, "--resume")
    assert code == 0, last
    assert len(read_video(tmp_path / "out" / "a.mp4")) == 32
