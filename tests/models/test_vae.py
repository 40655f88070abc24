"""The autoencoders against diffusers' ``AutoencoderKLWan``, and their state against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx
from shared import tiers

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.conv import Conv2d, repeat_pixels
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.models.wan.vae_rows import vae_rows

# Sizes at which compiling takes far longer than computing.


def config(base_dim, z_dim, dim_mult, num_res_blocks, temperal_downsample, **more):
    """With statistics that differ by channel."""
    return VAEConfig(
        **more,
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=dim_mult,
        num_res_blocks=num_res_blocks,
        temperal_downsample=temperal_downsample,
        latents_mean=tuple(0.1 * c - 0.2 for c in range(z_dim)),
        latents_std=tuple(0.5 + 0.25 * c for c in range(z_dim)),
    )


# Odd widths, every pattern of halvings in time, sides that are not squares. (frames, height, width) of the video.
RESIDUAL = {"is_residual": True, "patch_size": 2}
CASES = {
    "wan's shape": (config(6, 4, (1, 2, 4, 4), 1, (False, True, True)), (9, 24, 40)),
    "residual": (config(4, 3, (1, 2, 2), 1, (False, True), decoder_base_dim=6, **RESIDUAL), (5, 16, 24)),
    "wan2.2's shape": (
        config(6, 5, (1, 2, 4, 4), 2, (False, True, True), decoder_base_dim=8, **RESIDUAL),
        (13, 32, 48),
    ),
    "residual, two halvings": (config(4, 3, (1, 2, 1), 2, (True, True), is_residual=True), (9, 8, 12)),
    "two levels, early halvings": (config(10, 3, (1, 2, 3), 2, (True, True)), (13, 12, 20)),
    "late first": (config(8, 5, (2, 1, 3, 2), 1, (True, False, True)), (5, 40, 24)),
    "halving once": (config(14, 2, (1, 3), 1, (True,)), (9, 6, 10)),
}
SMALL, _ = CASES["two levels, early halvings"]
TINY = config(4, 2, (1, 1), 1, (True,))


def reference(cfg, *, seed):
    """diffusers' model with every tensor random, such that activations stay of order one."""
    torch.manual_seed(seed)
    model = AutoencoderKLWan.from_config({k: v for k, v in cfg.to_dict().items() if not k.startswith("_")}).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("gamma"):
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            elif name.endswith("bias"):
                tensor.copy_(0.2 * torch.randn_like(tensor))
            else:
                tensor.copy_(torch.randn_like(tensor) / tensor[0].numel() ** 0.5)
    return model


#: How each of the file's layouts becomes ours, by axes of the torch tensor.
AXES = {"conv3d": (2, 3, 4, 1, 0), "conv2d": (2, 3, 1, 0), "gamma3d": (0,), "gamma2d": (0,), "same": (0,)}


def to_ours(tensor, layout):
    array = tensor.detach().numpy()
    return array.reshape(-1) if layout.startswith("gamma") else array.transpose(AXES[layout])


def ours_from(model, cfg, **kw):
    vae = nnx.eval_shape(lambda: WanVAE(cfg, rngs=nnx.Rngs(0), **kw))
    tensors = model.state_dict()
    params = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(vae))}
    rows = vae_rows(cfg)
    assert {row.ours for row in rows} == set(params)
    for row in rows:
        array = jnp.asarray(to_ours(tensors[row.name("diffusers")], row.layout), kw.get("param_dtype", jnp.float32))
        assert array.shape == params[row.ours].shape, row
        params[row.ours].set_value(array)
    return vae


def video_of(shape, *, seed=0, batch=2):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (batch, *shape, 3)), jnp.float32)


def latents_of(cfg, shape, *, seed=0, batch=2):
    frames, height, width = shape
    shape = (
        batch,
        1 + (frames - 1) // cfg.temporal_factor,
        height // cfg.spatial_factor,
        width // cfg.spatial_factor,
        cfg.z_dim,
    )
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def channels_first(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def channels_last(x):
    return np.moveaxis(x.numpy(), 1, -1)


encode = nnx.jit(lambda vae, video: vae.encode(video))
decode = nnx.jit(lambda vae, latents: vae.decode(latents))
decode_first = nnx.jit(lambda vae, latents: vae.decode_first(latents))
decode_next = nnx.jit(lambda vae, latents, state: vae.decode_next(latents, state))


@pytest.fixture(scope="module")
def small():
    return ours_from(reference(SMALL, seed=7), SMALL)


@pytest.mark.parametrize("case", tiers.breadth(CASES))
def test_as_diffusers(case):
    cfg, shape = CASES[case]
    model = reference(cfg, seed=len(case))
    vae = ours_from(model, cfg)
    video, latents = video_of(shape), latents_of(cfg, shape)
    with torch.no_grad():
        posterior = model.encode(channels_first(video)).latent_dist
        expected_mean, expected_logvar = channels_last(posterior.mode()), channels_last(posterior.logvar)
        expected_video = channels_last(model.decode(channels_first(latents)).sample)
    moments = nnx.jit(lambda vae, video: vae.encode_moments(video))(vae, video)
    assert 0.2 < expected_mean.std() < 5
    # Float32 sums of up to 27 x 42 products through some forty layers of order one: 1e-4 is a few hundred roundings.
    np.testing.assert_allclose(moments.mean, expected_mean, atol=1e-4, rtol=0)
    np.testing.assert_allclose(moments.logvar, expected_logvar, atol=1e-4, rtol=0)
    # Clipped as diffusers clips, yet most of the video lies within.
    assert 0.01 < (np.abs(expected_video) == 1).mean() < 0.6
    np.testing.assert_allclose(decode(vae, latents), expected_video, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", tiers.breadth(["halving once", "residual", "wan's shape", "wan2.2's shape"]))
def test_in_pieces_as_whole(case):
    cfg, (_, height, width) = CASES[case]
    vae = ours_from(reference(cfg, seed=1), cfg)
    shape = (1 + 5 * cfg.temporal_factor, height, width)
    latents, video = latents_of(cfg, shape, batch=1), video_of(shape, batch=1)
    whole, mean = decode(vae, latents), encode(vae, video)
    # Same products; sums may associate differently.
    start, state = decode_first(vae, latents[:, :1])
    middle, state = decode_next(vae, latents[:, 1:3], state)
    end, _ = decode_next(vae, latents[:, 3:], state)
    np.testing.assert_allclose(jnp.concatenate([start, middle, end], axis=1), whole, atol=1e-5, rtol=0)
    # Five frames after the first, two at a time: two steps of the scan, and a remainder.
    in_steps = nnx.jit(lambda vae, x: vae.decode(x, frames_per_step=2))(vae, latents)
    np.testing.assert_allclose(in_steps, whole, atol=1e-5, rtol=0)
    in_steps = nnx.jit(lambda vae, x: vae.encode(x, frames_per_step=2))(vae, video)
    np.testing.assert_allclose(in_steps, mean, atol=1e-5, rtol=0)


def test_the_start_may_have_any_length(small):
    latents = latents_of(SMALL, (13, 12, 20), batch=1)
    start, state = decode_first(small, latents[:, :3])
    end, _ = decode_next(small, latents[:, 3:], state)
    np.testing.assert_allclose(jnp.concatenate([start, end], axis=1), decode(small, latents), atol=1e-5, rtol=0)


@pytest.mark.full
def test_a_stream_compiles_once(small):
    latents = latents_of(SMALL, (49, 12, 20), batch=1)
    traces = 0

    def counted(vae, latents, state):
        nonlocal traces
        traces += 1
        return vae.decode_next(latents, state)

    step = nnx.jit(counted)
    frames, state = decode_first(small, latents[:, :1])
    layout = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    video = [frames]
    for t in range(1, latents.shape[1]):
        frames, state = step(small, latents[:, t : t + 1], state)
        video.append(frames)
    assert traces == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == layout
    assert sum(frames.shape[1] for frames in video) == 49
    whole = decode(small, latents[:, :4])
    np.testing.assert_allclose(jnp.concatenate(video[:4], axis=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "close"), tiers.breadth([(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)]))
def test_upsampling_is_the_convolution_of_repeated_pixels(dtype, close):
    """Against the plain form in float64, at odd sizes, of its largest number: 63 additions in float32, and the sums of
    weights and the result once each in the type."""
    layer = Conv2d(7, 5, kernel_size=3, padding=(1, 1), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.arange(5, dtype=dtype) / 8)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 3, 7)), dtype)
    wide = np.pad(np.asarray(x, np.float64).repeat(2, 2).repeat(2, 3), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    seen = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (2, 3))
    kernel, bias = (np.asarray(each.get_value(), np.float64) for each in (layer.kernel, layer.bias))
    wanted = np.einsum("bfhwiuv,uvio->bfhwo", seen, kernel) + bias
    found = np.asarray(layer.of_repeated(x), np.float64)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=close * np.abs(wanted).max())
    np.testing.assert_allclose(
        found, np.asarray(layer(repeat_pixels(x)), np.float64), rtol=0, atol=close * np.abs(wanted).max()
    )


def test_the_future_is_unseen(small):
    video = video_of((13, 12, 20), batch=1)
    changed = video.at[:, 9:].multiply(-1)  # the last of four latent frames stands for frames 9 to 12
    np.testing.assert_array_equal(encode(small, video)[:, :3], encode(small, changed)[:, :3])
    latents = latents_of(SMALL, (13, 12, 20), batch=1)
    changed = latents.at[:, 3:].multiply(-1)
    np.testing.assert_array_equal(decode(small, latents)[:, :9], decode(small, changed)[:, :9])


@pytest.mark.full
def test_gradients_from_scratch():
    def norms_of(gradients):
        return {path: float(np.linalg.norm(g[...])) for path, g in nnx.to_flat_state(gradients)}

    def loss(vae, video):
        moments = vae.encode_moments(video)
        rebuilt = vae.decode(moments.mean, clip=False)
        return jnp.mean((rebuilt - video) ** 2) + 1e-3 * jnp.mean(jnp.exp(moments.logvar) - moments.logvar)

    vae = WanVAE(TINY, rngs=nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(loss))
    # Noise, where every layer learns; and frames of zeros, where a norm divides by nearly nothing.
    noise, zeros = (norms_of(gradient(vae, video)) for video in (video_of((5, 4, 6)), jnp.zeros((2, 5, 4, 6, 3))))
    assert np.isfinite([*noise.values(), *zeros.values()]).all()
    # At the start the attention gives nothing, so what lies before its last layer learns from the second step on.
    still = {path for path, norm in noise.items() if norm == 0}
    assert all("attentions" in path and "proj" not in path for path in still), still


@pytest.mark.full
def test_bfloat16_is_near(small):
    coarse = ours_from(reference(SMALL, seed=7), SMALL, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    video, latents = video_of((13, 12, 20), batch=1), latents_of(SMALL, (13, 12, 20), batch=1)
    mean, decoded = encode(coarse, video), decode(coarse, latents)
    assert mean.dtype == decoded.dtype == jnp.bfloat16
    # A rounding is 2^-9 of a value; some twenty layers of them in quadrature are 1 %. Root mean square, by spread.
    for ours, exact in ((mean, encode(small, video)), (decoded, decode(small, latents))):
        assert jnp.std(ours.astype(jnp.float32) - exact) < 0.03 * jnp.std(exact)


def test_normalise(small):
    latents = latents_of(SMALL, (5, 12, 20))
    normal = small.normalize(latents)
    expected = (np.asarray(latents) - np.float32(SMALL.latents_mean)) / np.float32(SMALL.latents_std)
    np.testing.assert_allclose(normal, expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(small.denormalize(normal), latents, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((12, 12, 20), "a video of 12 frames cannot be encoded: it takes 4k \\+ 1 frames"),
        ((13, 12, 18), "a video of 18x12 cannot be encoded: both sides must be multiples of 4"),
    ],
)
def test_impossible_videos(small, shape, sentence):
    with pytest.raises(RehyatError, match=sentence):
        small.encode(jnp.zeros((1, *shape, 3)))


def test_impossible_latents(small):
    with pytest.raises(RehyatError, match="latents have 4 channels, and this decoder takes 3"):
        small.decode(jnp.zeros((1, 2, 3, 5, 4)))
    with pytest.raises(RehyatError, match="frames_per_step must be at least 1, not 0"):
        small.decode(jnp.zeros((1, 2, 3, 5, 3)), frames_per_step=0)


@pytest.mark.parametrize(
    "cfg",
    [
        pytest.param(VAEConfig.wan(), id="wan"),
        pytest.param(VAEConfig.wan22(), id="wan2.2"),
        tiers.full(VAEConfig.mini_sprites(), id="mini-sprites"),
        *(tiers.full(config, id=name) for name, (config, _) in CASES.items()),
    ],
)
def test_names(cfg):
    """Ours and diffusers' names and shapes are in one-to-one correspondence, with no memory taken."""
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config({k: v for k, v in cfg.to_dict().items() if not k.startswith("_")})
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = nnx.state(nnx.eval_shape(lambda: WanVAE(cfg, rngs=nnx.Rngs(0))))
    ours = {".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)}
    rows = vae_rows(cfg)
    assert sorted(row.name("diffusers") for row in rows) == sorted(theirs)
    assert sorted(row.ours for row in rows) == sorted(ours)
    assert len({row.name("original") for row in rows}) == len(rows)
    for row in rows:
        assert ours[row.ours] == tuple(theirs[row.name("diffusers")][axis] for axis in AXES[row.layout]), row


def test_size_of_wan():
    """Wan2.1_VAE.pth: 194 tensors, 126,892,531 numbers."""
    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: WanVAE(VAEConfig.wan(), rngs=nnx.Rngs(0)))))
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (194, 126_892_531)
