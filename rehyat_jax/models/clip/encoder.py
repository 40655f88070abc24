"""CLIP's vision encoder (Radford et al., arXiv 2103.00020), as Wan's image-to-video models read an image.

Sources: transformers ``models/clip/modeling_clip.py``; Wan-Video/Wan2.1 ``wan/modules/clip.py``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rehyat_jax.adapters.linear import Linear
from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.models.clip.config import ImageEncoderConfig
from rehyat_jax.runtime.variables import kernel

_normal = nnx.initializers.normal(0.02)


class LayerNorm(nnx.Module):
    """Layer norm with affine part, float32 inside."""

    def __init__(self, features: int, eps: float, *, param_dtype: DTypeLike) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)


class Layer(nnx.Module):
    """Self-attention and feed-forward, each behind a norm."""

    def __init__(self, config: ImageEncoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        kinds: dict[str, Any] = {"kernel_init": _normal, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.heads, self.act = config.num_attention_heads, config.hidden_act
        self.norm1 = LayerNorm(width, config.layer_norm_eps, param_dtype=param_dtype)
        self.q, self.k, self.v = (
            Linear(width, width, kernel_metadata=kernel("width", "heads"), **kinds) for _ in range(3)
        )
        self.out = Linear(width, width, kernel_metadata=kernel("heads", "width"), **kinds)
        self.norm2 = LayerNorm(width, config.layer_norm_eps, param_dtype=param_dtype)
        self.up = Linear(width, inner, kernel_metadata=kernel("width", "hidden"), **kinds)
        self.down = Linear(inner, width, kernel_metadata=kernel("hidden", "width"), **kinds)

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        normed = self.norm1(x)
        q, k, v = (layer(normed).reshape(*x.shape[:2], self.heads, -1) for layer in (self.q, self.k, self.v))
        x = x + self.out(softmax_attention(q, k, v).reshape(x.shape))
        inner = self.up(self.norm2(x))
        inner = jax.nn.gelu(inner, approximate=False) if self.act == "gelu" else inner * jax.nn.sigmoid(1.702 * inner)
        return x + self.down(inner)


class ImageEncoder(nnx.Module):
    """Features of prepared images: the input of the encoder's last layer.

    All layers are kept, as files have them; the last one and the norm after it are not computed.

    Args:
        config: sizes.
        dtype: of computation and of results.
        param_dtype: of the parameters.
        rngs: the stream ``params`` draws the initial values.
    """

    def __init__(
        self,
        config: ImageEncoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        width, patch = config.hidden_size, config.patch_size
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.class_embedding = nnx.Param(_normal(rngs.params(), (width,), param_dtype))
        shape = (patch, patch, 3, width)
        self.patch_kernel = nnx.Param(_normal(rngs.params(), shape, param_dtype), **kernel(*[None] * 4))
        self.positions = nnx.Param(_normal(rngs.params(), (config.tokens, width), param_dtype))
        self.norm_in = LayerNorm(width, config.layer_norm_eps, param_dtype=param_dtype)
        self.layers = nnx.vmap(lambda r: Layer(config, rngs=r, **kinds), in_axes=0, out_axes=0)(
            rngs.split(config.num_hidden_layers)
        )
        self.norm_out = LayerNorm(width, config.layer_norm_eps, param_dtype=param_dtype)

    def __call__(
        self, pixels: Float[Array, "B {self.config.image_size} {self.config.image_size} 3"]
    ) -> Float[Array, "B L C"]:
        """transformers' ``hidden_states[-2]``: a token for the whole image, then its patches by rows."""
        patch = self.config.patch_size
        x = jax.lax.conv_general_dilated(
            pixels.astype(self.dtype),
            self.patch_kernel[...].astype(self.dtype),
            (patch, patch),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype)[None, None], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...].astype(self.dtype)[None]
        graph, layers = nnx.split(self.layers)
        used = jax.tree.map(lambda p: p[:-1], layers)
        return jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x), None), self.norm_in(x), used)[0]
