"""TAEHV's decoders against a plain torch loop of the published architecture, and streams that are decoded by one."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from shared.checkpoint import save_tiny_checkpoint
from shared.taehv import TIMES, taehv_tensors
from shared.tiers import full
from shared.videos import PROMPT

from rehyat_jax import HybridConfig, TextToVideo, cli
from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.checkpoints import convert, describe
from rehyat_jax.models.checkpoints.loading import load_preview_decoder
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.variables import abstract_module
from rehyat_jax.sampling.codec import Codec, to_float


@torch.no_grad()
def by_torch(tensors, latents, *, patch, times=TIMES):
    """Frames [F, 3, H, W] in 0..1 of latents [T, z, h, w], frame by frame."""

    def conv(x, name, padding=1):
        return F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), padding=padding)

    def remembered(frames, name):
        made = []
        for x, past in zip(frames, [torch.zeros_like(frames[0]), *frames], strict=False):
            y = conv(torch.cat([x, past], 1), f"{name}.conv.0").relu()
            made.append((conv(conv(y, f"{name}.conv.2").relu(), f"{name}.conv.4") + x).relu())
        return made

    frames = [conv(torch.tanh(latent[None] / 3) * 3, "decoder.1").relu() for latent in latents]
    for level, count in enumerate(times):
        first = 3 + 6 * level
        for block in range(first, first + 3):
            frames = remembered(frames, f"decoder.{block}")
        frames = [F.interpolate(x, scale_factor=2, mode="nearest") for x in frames]
        frames = [y for x in frames for y in conv(x, f"decoder.{first + 4}.conv", padding=0).chunk(count, dim=1)]
        frames = [conv(x, f"decoder.{first + 5}") for x in frames]
    frames = [F.pixel_shuffle(conv(x.relu(), "decoder.22"), patch).clamp(0, 1) for x in frames]
    return torch.cat(frames[3:])


@pytest.mark.parametrize(
    ("z_dim", "patch", "ending"),
    [pytest.param(16, 1, "pth", id="taew2_1"), full(48, 2, "safetensors", id="taew2_2")],
)
def test_frames_are_those_of_the_published_network(z_dim, patch, ending, tmp_path):
    """Three latent frames, one after the other with the memory handed on: float32, fourteen convolutions of order one:
    1e-5."""
    tensors, file = taehv_tensors(z_dim=z_dim, patch=patch), tmp_path / f"taew.{ending}"
    torch.save(tensors, file) if ending == "pth" else save_file(tensors, file)
    latents = np.random.default_rng(0).standard_normal((1, 3, 4, 6, z_dim), np.float32)
    expected = by_torch(tensors, torch.from_numpy(latents[0]).permute(0, 3, 1, 2), patch=patch).permute(0, 2, 3, 1)
    decoder = load_preview_decoder(file)
    assert (decoder.config.spatial_factor, decoder.config.temporal_factor) == (8 * patch, 4)
    # Streamed, as sampling decodes.
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    vae = abstract_module(WanVAE, VAEConfig.wan() if patch == 1 else VAEConfig.wan22(), **kinds)
    codec = Codec(vae, decoder=decoder)
    streamed = [np.asarray(x) for x, _ in codec.decode(jnp.asarray(latents), pixels=to_float)]
    assert [x.shape[1] for x in streamed] == [1, 4, 4]
    streamed = np.concatenate(streamed, axis=1)[0]
    np.testing.assert_allclose(streamed, expected, atol=1e-5, rtol=0)
    assert 0.05 < streamed.mean() < 0.95
    assert streamed.std() > 0.1
    # All at once.
    np.testing.assert_allclose(to_float(decoder.decode_first(jnp.asarray(latents))[0])[0], expected, atol=1e-5, rtol=0)


def test_info_tells_it_and_a_copy_is_read(tmp_path):
    save_file(taehv_tensors(z_dim=16, patch=1), tmp_path / "taew2_1.safetensors")
    said = str(describe(tmp_path / "taew2_1.safetensors"))
    for words in ("TAEHV", "z_dim 16", "patch_size 1", "beside it   2 tensors ('encoder.0.weight'"):
        assert words in said
    convert(tmp_path / "taew2_1.safetensors", tmp_path / "copy")
    one, other = (load_preview_decoder(tmp_path / name) for name in ("taew2_1.safetensors", "copy"))
    assert one.config == other.config
    np.testing.assert_array_equal(one.conv_out.kernel[...], other.conv_out.kernel[...])


def test_what_it_is_not_for_is_said(tmp_path):
    save_file(taehv_tensors(z_dim=48, patch=2), tmp_path / "taew2_2.safetensors")
    save_tiny_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match="for 48 channels of latents, and this model's autoencoder has 16"):
        TextToVideo.from_pretrained(tmp_path / "model", decoder=tmp_path / "taew2_2.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a Wan VAE, not a tiny decoder for previews \(TAEHV\)"):
        TextToVideo.from_pretrained(tmp_path / "model", decoder=tmp_path / "model" / "vae")
    tensors = taehv_tensors(z_dim=16, patch=1, times=(2, 2, 2))
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="for 8 frames of a latent frame, and this model's autoencoder has 4"):
        TextToVideo.from_pretrained(tmp_path / "model", decoder=tmp_path / "other.safetensors")
    del tensors["decoder.22.bias"]
    save_file(tensors, tmp_path / "lacks.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks .*decoder\.22\.bias"):
        load_preview_decoder(tmp_path / "lacks.safetensors")


def test_a_stream_is_decoded_by_it(tmp_path):
    """The transformer's latents by the plain loop; kept and resumed bit for bit, and not with the autoencoder's own."""
    save_tiny_checkpoint(tmp_path / "model")
    tensors = taehv_tensors(z_dim=16, patch=1)
    save_file(tensors, tmp_path / "taew2_1.safetensors")
    how = {"hybrid": HybridConfig(chunk_frames=2), "cache_dir": tmp_path / "cache"}
    pipe = TextToVideo.from_pretrained(tmp_path / "model", decoder=tmp_path / "taew2_1.safetensors", **how)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
    stream, seen = pipe.open_stream(PROMPT, seed=3, **size), []
    decode = stream._session.codec.decode
    stream._session.codec.decode = lambda latents, *args, **kw: seen.append(latents) or decode(latents, *args, **kw)
    blocks = [next(stream)]
    stream.save(tmp_path / "kept")
    blocks.append(next(stream))
    latents = torch.from_numpy(np.concatenate(seen, axis=1)[0]).permute(0, 3, 1, 2)
    expected = by_torch(tensors, latents, patch=1).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(np.concatenate(blocks) - expected).max() <= 0.51  # rounded to eight bits
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path / "kept")), blocks[1])
    assert blocks[1].std() > 10
    asked = ["--model", tmp_path / "model", "--decoder", tmp_path / "taew2_1.safetensors", "--seed", 3, "--frames", 5]
    asked += ["--hybrid", "2+1", "--size", "32x32", "--steps", 2, "--guidance", 1, "--cache-dir", tmp_path / "cache"]
    assert cli.main(["generate", PROMPT, *map(str, asked), "--out", str(tmp_path / "frames")]) == 0
    shown = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "frames").glob("*.png"))]
    np.testing.assert_array_equal(np.stack(shown), blocks[0])
    with pytest.raises(CheckpointError, match="made by another model"):
        TextToVideo.from_pretrained(tmp_path / "model", **how).resume_stream(tmp_path / "kept")
