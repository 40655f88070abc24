"""The Wan2.1 text-to-video diffusion transformer.

Sources: Wan-Video/Wan2.1 ``wan/modules/model.py``; diffusers ``models/transformers/transformer_wan.py``.

Dtypes follow diffusers: layer norms, modulation and gated residuals in float32, the stream between them in the compute
dtype, the time embedder and modulation tables stored in float32 always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.config import WanConfig
from rehyat_jax.errors import RehyatError
from rehyat_jax.models.positions import CosSin, rotary_embedding, rotate, timestep_embedding

_xavier = nnx.initializers.xavier_uniform()
_normal = nnx.initializers.normal(0.02)


def layer_norm(x: Float[Array, "*B C"], eps: float) -> Float[Array, "*B C"]:
    """Layer norm over channels without affine part; float32 in and out."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, dim: int, eps: float, *, param_dtype: DTypeLike) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)[None, None]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with affine part, float32 inside and in storage."""

    def __init__(self, dim: int, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        normed = layer_norm(x.astype(jnp.float32), self.eps)
        return (normed * self.scale[...][None, None] + self.bias[...][None, None]).astype(x.dtype)


class Attention(nnx.Module):
    """Projections, q/k norm over the full width, rotary positions when given, softmax attention, output projection."""

    def __init__(self, config: WanConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = config.num_attention_heads

        def linear() -> nnx.Linear:
            return nnx.Linear(
                config.dim, config.dim, kernel_init=_xavier, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), linear()
        self.norm_q = RMSNorm(config.dim, config.eps, param_dtype=param_dtype)
        self.norm_k = RMSNorm(config.dim, config.eps, param_dtype=param_dtype)

    def __call__(
        self, x: Float[Array, "B N C"], context: Float[Array, "B M C"], rotary: CosSin | None = None
    ) -> Float[Array, "B N C"]:
        def heads(y: Float[Array, "B L C"]) -> Float[Array, "B L H D"]:
            return y.reshape(*y.shape[:2], self.heads, -1)

        query = heads(self.norm_q(self.to_q(x)))
        key = heads(self.norm_k(self.to_k(context)))
        value = heads(self.to_v(context))
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return self.to_out(softmax_attention(query, key, value).reshape(x.shape))


class FeedForward(nnx.Module):
    """Two linear layers with tanh-approximated GELU between."""

    def __init__(self, config: WanConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        kinds = {"kernel_init": _xavier, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.up = nnx.Linear(config.dim, config.ffn_dim, **kinds)
        self.down = nnx.Linear(config.ffn_dim, config.dim, **kinds)

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated and gated by time."""

    def __init__(self, config: WanConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.eps = config.eps
        self.attn1 = Attention(config, **kinds)
        self.attn2 = Attention(config, **kinds)
        self.norm2 = LayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(config, **kinds)
        self.scale_shift_table = nnx.Param(_table(rngs, 6, config.dim))

    def __call__(
        self,
        x: Float[Array, "B N C"],
        text: Float[Array, "B L C"],
        modulation: Float[Array, "B 6 C"],
        rotary: CosSin,
    ) -> Float[Array, "B N C"]:
        table = self.scale_shift_table[...][None] + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (table[:, i : i + 1] for i in range(6))

        normed = _modulate(x, shift, scale, self.eps)
        x = _gated(x, self.attn1(normed, normed, rotary), gate)
        x = x + self.attn2(self.norm2(x), text)
        return _gated(x, self.ffn(_modulate(x, ffn_shift, ffn_scale, self.eps)), ffn_gate)


def _table(rngs: nnx.Rngs, rows: int, dim: int) -> Float[Array, "rows dim"]:
    return jax.random.normal(rngs.params(), (rows, dim), jnp.float32) * dim**-0.5


def _modulate(
    x: Float[Array, "B N C"], shift: Float[Array, "B 1 C"], scale: Float[Array, "B 1 C"], eps: float
) -> Float[Array, "B N C"]:
    return (layer_norm(x.astype(jnp.float32), eps) * (1 + scale) + shift).astype(x.dtype)


def _gated(x: Float[Array, "B N C"], y: Float[Array, "B N C"], gate: Float[Array, "B 1 C"]) -> Float[Array, "B N C"]:
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


class TextEmbedder(nnx.Module):
    """Text features to the transformer's width; also the shape of the time embedder, with another activation."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        activation: Callable[[Array], Array],
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = {"kernel_init": _normal, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.linear_1 = nnx.Linear(in_dim, dim, **kinds)
        self.linear_2 = nnx.Linear(dim, dim, **kinds)
        self.activation = activation

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nnx.Module):
    """Diffusion time and text, as the blocks take them."""

    def __init__(self, config: WanConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.freq_dim = config.freq_dim
        self.time_embedder = TextEmbedder(
            config.freq_dim, config.dim, jax.nn.silu, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs
        )
        self.time_proj = nnx.Linear(
            config.dim, 6 * config.dim, kernel_init=_xavier, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.text_embedder = TextEmbedder(
            config.text_dim, config.dim, _gelu_tanh, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )


def _gelu_tanh(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    return jax.nn.gelu(x, approximate=True)


class WanTransformer(nnx.Module):
    """Velocity of a noisy latent video under a text.

    The blocks are one module whose parameters have a leading axis of ``num_layers``; the forward pass scans over it.
    """

    def __init__(
        self, config: WanConfig, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.patch_embedding = nnx.Conv(
            config.in_channels, config.dim, config.patch_size, strides=config.patch_size, padding="VALID",
            kernel_init=_xavier, rngs=rngs, **kinds,
        )  # fmt: skip
        self.condition_embedder = ConditionEmbedder(config, rngs=rngs, **kinds)
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r, **kinds), in_axes=0, out_axes=0)(
            rngs.split(config.num_layers)
        )
        self.scale_shift_table = nnx.Param(_table(rngs, 2, config.dim))
        out = config.out_channels * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.proj_out = nnx.Linear(config.dim, out, kernel_init=nnx.initializers.zeros_init(), rngs=rngs, **kinds)

    def __call__(
        self,
        latents: Float[Array, "B T H W {self.config.in_channels}"],
        timesteps: Num[Array, " B"],
        text: Float[Array, "B L {self.config.text_dim}"],
    ) -> Float[Array, "B T H W {self.config.out_channels}"]:
        """The velocity (noise − video) in the compute dtype.

        Args:
            latents: normalised latents, channels last; T, H, W multiples of the patch.
            timesteps: diffusion time in 0…1000, whole or fractional.
            text: the encoder's output, zero beyond the prompt (Wan pads to 512; nothing here depends on it).

        Raises:
            RehyatError: T, H or W is not a multiple of the patch.
        """
        batch, *sizes = latents.shape[:4]
        patch = self.config.patch_size
        if any(size % p for size, p in zip(sizes, patch, strict=True)):
            raise RehyatError(f"latents of {sizes} frames, rows, columns are not divisible into patches of {patch}")
        frames, height, width = (size // p for size, p in zip(sizes, patch, strict=True))
        rotary = rotary_embedding(self.config.attention_head_dim, jnp.arange(frames), height, width)

        x = self.patch_embedding(latents.astype(self.dtype)).reshape(batch, -1, self.config.dim)
        condition = self.condition_embedder
        time = condition.time_embedder(timestep_embedding(timesteps, self.config.freq_dim)).astype(self.dtype)
        modulation = condition.time_proj(jax.nn.silu(time)).astype(jnp.float32).reshape(batch, 6, -1)
        context = condition.text_embedder(text.astype(self.dtype))

        graph, layers = nnx.split(self.blocks)

        def step(x: Array, layer: Any) -> tuple[Array, None]:
            return nnx.merge(graph, layer)(x, context, modulation, rotary), None

        x, _ = jax.lax.scan(step, x, layers)

        shift, scale = (
            self.scale_shift_table[...][None, i : i + 1] + time.astype(jnp.float32)[:, None] for i in range(2)
        )
        out = self.proj_out(_modulate(x, shift, scale, self.config.eps))
        return _unpatchify(out, (frames, height, width), patch)


def _unpatchify(
    x: Float[Array, "B N C"], grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> Float[Array, "B T H W D"]:
    """Tokens, time-major, each the values of its patch (patch time, row, column, channel), back to a latent video."""
    x = x.reshape(x.shape[0], *grid, *patch, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], *(size * p for size, p in zip(grid, patch, strict=True)), -1)
