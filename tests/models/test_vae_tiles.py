"""Decoding by tiles against diffusers' ``enable_tiling``, and streams of such."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from shared.checkpoint import save_tiny_checkpoint
from shared.videos import PROMPT

from rehyat_jax import HybridConfig, TextToVideo
from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.models.checkpoints import load_vae
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.sampling.codec import Codec, to_float
from rehyat_jax.sampling.tiles import TiledCodec

SMALL = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}


@pytest.mark.parametrize(
    ("config", "tile", "size"),
    [
        (SMALL, 64, (9, 6)),
        pytest.param(SMALL, 64, (9, 14), marks=pytest.mark.full),
        pytest.param(
            VAEConfig.wan22().to_dict() | {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1},
            128,
            (9, 14),
            marks=pytest.mark.full,
        ),
    ],
    ids=["Wan2.1", "Wan2.1, both ways", "Wan2.2"],
)
@torch.no_grad()
def test_frames_are_diffusers(config, tile, size, tmp_path):
    """Two latent frames of 2 x 1 or 2 x 3 tiles, the last ones smaller: float32, a dozen convolutions of order one."""
    torch.manual_seed(0)
    theirs = AutoencoderKLWan.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    theirs.enable_tiling(tile, tile, 3 * tile // 4, 3 * tile // 4)
    vae = load_vae(tmp_path)
    latents = np.random.default_rng(0).standard_normal((1, 2, *size, vae.config.z_dim), np.float32)
    raw = np.array(vae.denormalize(jnp.asarray(latents)))
    expected = theirs.decode(torch.from_numpy(raw).permute(0, 4, 1, 2, 3)).sample.permute(0, 2, 3, 4, 1).numpy()
    decoded = list(TiledCodec(vae, tile=tile).decode(jnp.asarray(latents), pixels=to_float))
    found = np.concatenate([np.asarray(frames) for frames, _ in decoded], axis=1)
    np.testing.assert_allclose(found, expected / 2 + 0.5, atol=1e-4, rtol=0)
    if vae.config.patch == 1:  # with folded pixels diffusers takes tiles of as many folded ones
        video = np.random.default_rng(1).integers(0, 256, (1, 5, 8 * size[0], 8 * size[1], 3), np.uint8)
        pixels = torch.from_numpy(video).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        raw = theirs.encode(pixels).latent_dist.mode().permute(0, 2, 3, 4, 1).numpy()
        encoded = TiledCodec(vae, tile=tile).encode(video, frames_per_step=1)
        np.testing.assert_allclose(encoded, vae.normalize(jnp.asarray(raw)), atol=1e-4, rtol=0)
    whole = [np.asarray(frames) for frames, _ in Codec(vae).decode(jnp.asarray(latents), pixels=to_float)]
    assert np.abs(found - np.concatenate(whole, axis=1)).max() > 1e-3  # near borders something is missing


@pytest.mark.full
def test_a_stream_by_tiles_is_a_call_by_tiles(tmp_path):
    save_tiny_checkpoint(tmp_path / "model")
    how = {"hybrid": HybridConfig(chunk_frames=2), "cache_dir": tmp_path / "cache"}
    pipe = TextToVideo.from_pretrained(tmp_path / "model", vae_tile=32, **how)
    size = {"height": 48, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
    stream = pipe.open_stream(PROMPT, seed=3, **size)
    blocks = [next(stream)]
    stream.save(tmp_path / "kept")
    blocks.append(next(stream))
    assert np.abs(np.concatenate(blocks).astype(int) - pipe(PROMPT, num_frames=13, seed=3, **size)).max() <= 1
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path / "kept")), blocks[1])
    assert not stream.shares(pipe.resume_stream(tmp_path / "kept"))
    whole = TextToVideo.from_pretrained(tmp_path / "model", **how)
    with pytest.raises(CheckpointError, match="decoder"):
        whole.resume_stream(tmp_path / "kept")
    with pytest.raises(RehyatError, match="vae_tile must be a multiple of 32 pixels, not 100"):
        TextToVideo.from_pretrained(tmp_path / "model", vae_tile=100, **how)
