"""Few-step files as they are published: told apart, converted, and run block by block as a plain torch loop does."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from shared.checkpoint import save_tiny_checkpoint
from shared.videos import PROMPT, latents_by_us
from shared.weights import write_few_step_file

from rehyat_jax import TextToVideo
from rehyat_jax.errors import ConfigError
from rehyat_jax.models.checkpoints import convert, describe
from rehyat_jax.models.wan.fewstep import FAMILIES, few_step_family
from rehyat_jax.models.wan.rows import TRANSFORMER
from rehyat_jax.sampling import FlowSchedule
from rehyat_jax.sampling.noise import ChunkNoise, video_keys
from rehyat_jax.weights.rows import renamed

#: Six blocks of three latent frames: of LongLive's window of nine frames before a block, and three sinks, the last one
#: sees no more the second block.
BLOCKS = 6
LATENTS = (3 * BLOCKS, 2, 4, 16)


def causal(model, x, t, text, past, first):
    """A block of frames [1, C, T, h, w] whose self-attention sees ``past``, for each transformer block a list of the
    keys and values before it; the velocity, and the block's own keys and values."""
    tokens = x.shape[3] * x.shape[4] // 4
    cos, sin = (
        table[:, first * tokens :] for table in model.rope(torch.zeros(1, 16, first + x.shape[2], *x.shape[3:]))
    )
    hidden = model.patch_embedding(x).flatten(2).transpose(1, 2)
    time, modulation, text, _ = model.condition_embedder(torch.tensor([t]), text, None)
    modulation, own = modulation.unflatten(1, (6, -1)), []

    def rotated(y):
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[..., 0::2], sin[..., 1::2]
        return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)

    for block, before in zip(model.blocks, past, strict=True):
        shift, scale, gate, shift2, scale2, gate2 = (block.scale_shift_table + modulation).chunk(6, dim=1)
        normed, attn = block.norm1(hidden) * (1 + scale) + shift, block.attn1
        q, k, v = (
            layer(normed).unflatten(2, (attn.heads, -1))
            for layer in (
                lambda y, a=attn: a.norm_q(a.to_q(y)),
                lambda y, a=attn: a.norm_k(a.to_k(y)),
                attn.to_v,
            )
        )
        q, k = rotated(q), rotated(k)
        own.append((k, v))
        keys, values = (torch.cat([*(pair[i] for pair in before), (k, v)[i]], dim=1) for i in (0, 1))
        out = torch.nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, keys, values)))
        hidden = hidden + attn.to_out[0](out.transpose(1, 2).flatten(2)) * gate
        hidden = hidden + block.attn2(block.norm2(hidden), text, None, None)
        hidden = hidden + block.ffn(block.norm3(hidden) * (1 + scale2) + shift2) * gate2
    shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
    out = model.proj_out(model.norm_out(hidden) * (1 + scale) + shift)
    _, _, frames, height, width = x.shape
    out = out.reshape(1, frames, height // 2, width // 2, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return out.flatten(6, 7).flatten(4, 5).flatten(2, 3), own


@torch.no_grad()
def loop(model, text, noise_of):
    """guandeh17/Self-Forcing ``pipeline/causal_inference.py`` with LongLive's window: levels 1000, 750, 500, 250 warped
    by shift 5, a guess of the data, fresh noise to the next level; the finished block is read again at time 0."""
    levels = [5 * s / (1 + 4 * s) for s in (1.0, 0.75, 0.5, 0.25)]
    assert np.allclose([1000 * s for s in levels], [1000, 937.5, 833.3333, 625])
    cache, made = [], []
    for number in range(BLOCKS):
        sinks = cache[:1] if number > 3 else []
        seen = sinks + cache[max(number - 3, 0) : number]
        past = [[block[i] for block in seen] for i in range(len(model.blocks))]
        x = noise_of(number, None)
        for step, level in enumerate(levels):
            guess = x - level * causal(model, x, 1000 * level, text, past, 3 * number)[0]
            following = levels[step + 1] if step < 3 else 0.0
            x = (1 - following) * guess + following * noise_of(number, step)
        cache.append(causal(model, x, 0.0, text, past, 3 * number)[1])
        made.append(x)
    return torch.cat(made, dim=2)


def test_a_published_file_runs_as_its_authors_loop(tmp_path):
    theirs = save_tiny_checkpoint(tmp_path / "base", seed=11)
    file = tmp_path / "published" / "longlive_base.pt"
    theirs.transformer.save_config(file.parent)  # its heads are not of 128
    write_few_step_file(theirs.transformer, file)
    said = str(describe(file))
    assert "few steps   LongLive: " in said
    assert "blocks of 3 in a window of 12 and 3 sinks" in said
    folder = tmp_path / "base"
    (folder / "transformer").rename(tmp_path / "teacher")
    convert(file, folder / "transformer")
    ours = TextToVideo.from_pretrained(folder, cache_dir=tmp_path / "cache")
    settings = ours.settings(num_frames=69, height=16, width=32)
    assert (settings.num_inference_steps, settings.guidance_scale, settings.remember) == (4, 1.0, 0.0)
    assert settings.schedule == FlowSchedule(grid="warped", shift=5.0)
    found = latents_by_us(
        ours, None, seed=3, num_frames=69, height=16, width=32, num_inference_steps=4, guidance_scale=1.0
    )

    def noise_of(number, step):
        noise, shape = ChunkNoise(video_keys(3, count=1), jnp.asarray(3 * number, jnp.int32)), (3, *LATENTS[1:])
        drawn = noise.initial(shape) if step is None else noise.fresh(shape, jnp.asarray(step, jnp.int32))
        return torch.from_numpy(np.array(drawn)).permute(0, 4, 1, 2, 3)

    text = torch.from_numpy(np.array(ours.text(PROMPT)))
    expected = loop(theirs.transformer, text, noise_of).permute(0, 2, 3, 4, 1).numpy()
    assert found.shape == expected.shape == (1, *LATENTS)
    assert 0.3 < expected.std() < 5
    # Six blocks of five passes of a network of order one in float32, each from the one before it.
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_rcm_runs_as_its_authors_loop(tmp_path):
    """NVlabs/rcm ``wan2pt1_t2v_rcm_infer.py``: angles into levels, the first noise times the first level, fresh noise
    over all frames at once. Four passes of a network of order one in float32."""
    theirs = save_tiny_checkpoint(tmp_path / "base", seed=12)
    file = tmp_path / "published" / "rCM_Wan_tiny.pt"
    theirs.transformer.save_config(file.parent)
    named = {renamed(k, TRANSFORMER, "diffusers", "original")[0]: x for k, x in theirs.transformer.state_dict().items()}
    torch.save({f"net.{name}": tensor for name, tensor in named.items()}, file)
    folder = tmp_path / "base"
    (folder / "transformer").rename(tmp_path / "teacher")
    convert(file, folder / "transformer")
    ours = TextToVideo.from_pretrained(folder, cache_dir=tmp_path / "cache")
    settings = ours.settings(num_frames=9, height=16, width=32)
    assert (settings.num_inference_steps, settings.guidance_scale, settings.draws_noise) == (4, 1.0, True)
    how = {"num_frames": 9, "height": 16, "width": 32, "num_inference_steps": 4, "guidance_scale": 1.0}
    found = latents_by_us(ours, None, seed=3, **how)

    angles = torch.tensor([np.arctan(80.0), 1.5, 1.4, 1.0, 0.0], dtype=torch.float64)
    levels = (torch.sin(angles) / (torch.cos(angles) + torch.sin(angles))).tolist()
    noise, shape = ChunkNoise(video_keys(3, count=1)), (3, *LATENTS[1:])
    text = torch.from_numpy(np.array(ours.text(PROMPT)))

    def drawn(array):
        return torch.from_numpy(np.array(array)).permute(0, 4, 1, 2, 3)

    x = drawn(noise.initial(shape)) * levels[0]
    for step, (level, following) in enumerate(itertools.pairwise(levels)):
        v = theirs.transformer(x, torch.tensor([1000 * level]), text, return_dict=False)[0]
        x = (1 - following) * (x - level * v) + following * drawn(noise.fresh(shape, step))
    expected = x.permute(0, 2, 3, 4, 1).numpy()
    assert 0.3 < expected.std() < 5
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("file", "names", "family"),
    [
        ("self_forcing_dmd.pt", [], "Self-Forcing"),
        ("model.pt", ["generator_ema.model._fsdp_wrapped_module.head.head.weight"], "Self-Forcing"),
        ("causal_forcing_chunkwise.pt", ["generator_ema.model.head.head.weight"], "Causal-Forcing"),
        ("rewardforcing.pt", ["generator_ema.model.head.head.weight"], "Reward-Forcing"),
        ("causvid_model.pt", ["generator.model.head.head.weight"], "CausVid"),
        ("longlive_base.pt", ["generator.model.head.head.weight"], "LongLive"),
        ("rCM_Wan2.1_T2V_1.3B_480p.pt", ["net.head.head.weight"], "rCM"),
        ("wan2.1_t2v_14b_lightx2v_4step.safetensors", [], "lightx2v"),
        ("diffusion_pytorch_model.safetensors", ["head.head.weight"], None),
        ("a_marcmodel.safetensors", ["head.head.weight"], None),
    ],
)
def test_files_are_told_apart(tmp_path, file, names, family):
    found = few_step_family(tmp_path / file, names)
    assert (found and found.name) == family


def test_levels_are_the_published_ones():
    levels = {family.name: family.defaults for family in FAMILIES}
    for name, expected in (
        ("CausVid", [1.0, 0.757, 0.522, 0.0]),
        ("lightx2v", [1.0, 0.9375, 0.83333, 0.625, 0.0]),
        # sin/(sin + cos) of atan(80), 1.5, 1.4, 1.
        ("rCM", [80 / 81, 0.933781, 0.852895, 0.608979, 0.0]),
    ):
        defaults = levels[name]
        schedule = FlowSchedule(grid=defaults["grid"], shift=defaults.get("shift", 1.0))
        steps = defaults["num_inference_steps"]
        np.testing.assert_allclose(schedule.sigmas(steps), expected, atol=1e-5)
        np.testing.assert_allclose(schedule.timesteps(steps), 1000 * np.array(expected[:-1]), atol=1e-2)
    with pytest.raises(ConfigError, match="trained at 3 noise levels"):
        FlowSchedule(grid="causvid").sigmas(4)
    np.testing.assert_allclose(FlowSchedule(grid="rcm").sigmas(2), [80 / 81, 0.933781, 0], atol=1e-5)
