"""UMT5's encoder: the text encoder of Wan2.1.

T5's encoder (arXiv:1910.10683) with a gated GELU feed-forward (T5 1.1) and, as UMT5 has it (arXiv:2304.09151), a table
of relative position biases of its own in every layer. Behaviour follows huggingface/transformers
``src/transformers/models/umt5/modeling_umt5.py``.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rehyat_jax.adapters.linear import Linear
from rehyat_jax.errors import ConfigError
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.runtime.offload import fetched, keep_on_host
from rehyat_jax.runtime.variables import described, kernel, table


def relative_position_buckets(length: int, *, num_buckets: int, max_distance: int) -> Int[np.ndarray, "L L"]:
    """The row of the bias table that query i (first axis) uses for key j.

    Half of the buckets are for keys after the query. Of each half, half are exact distances and the rest grow
    logarithmically up to ``max_distance``, beyond which all distances share the last one. The logarithm is taken in
    float32, as in transformers, because distances on a bucket's edge fall to one side or the other by rounding.
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # Distances below `exact` do not use the logarithm; 1 keeps it finite for them.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return (np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


def first_position_biases(config: TextEncoderConfig) -> Float[Array, "buckets heads"]:
    """A fresh table: heads in pairs, one that looks back and one ahead, each less the farther a token is.

    ALiBi's slopes (arXiv:2108.12409), in both directions. With T5's random table a small encoder trained along with a
    diffusion model stays a bag of words (docs/notebook/decisions.md). In JAX, so that the shapes of a model cost
    nothing.
    """
    half, heads = config.relative_attention_num_buckets // 2, config.num_heads
    exact = half // 2  # the buckets of one distance each; beyond, a bucket's lower end grows geometrically
    bucket = jnp.arange(half, dtype=jnp.float32)
    ratio = (config.relative_attention_max_distance / exact) ** (jnp.maximum(bucket - exact, 0) / (half - exact))
    back = jnp.where(bucket < exact, bucket, exact * ratio)
    offset = jnp.concatenate([-back, back])[:, None]
    head, last_pair = jnp.arange(heads, dtype=jnp.float32)[None, :], max(1, (heads - 1) // 2)
    slope = 0.5 ** (1 + head // 2 * min(1.0, 7 / last_pair))
    sign = 1 - 2 * (head % 2)
    return -slope * jnp.abs(offset) - jnp.where(offset * sign < 0, 2.0, 0.0)


class T5LayerNorm(nnx.Module):
    """Root mean square norm: no mean, no bias; computed in float32 whatever the input."""

    def __init__(self, features: int, *, epsilon: float, param_dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Multi-head attention with a learned bias by relative position, and without the usual 1/sqrt(d)."""

    def __init__(self, config: TextEncoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = config.d_model, config.num_heads * config.d_kv
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        # T5 folds 1/sqrt(d_kv) into q's initialisation.
        self.q = _linear(width, inner, (width * config.d_kv) ** -0.5, kernel("width", "heads"), **kinds)
        self.k = _linear(width, inner, width**-0.5, kernel("width", "heads"), **kinds)
        self.v = _linear(width, inner, width**-0.5, kernel("width", "heads"), **kinds)
        self.o = _linear(inner, width, inner**-0.5, kernel("heads", "width"), **kinds)
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            embedding_init=lambda *_: first_position_biases(config).astype(param_dtype),
            embedding_metadata=table(),
            rngs=rngs,
        )
        self.num_heads, self.d_kv = config.num_heads, config.d_kv

    def __call__(
        self, x: Float[Array, "B L D"], mask: Float[Array, "B L"], *, buckets: Int[Array, "L L"]
    ) -> Float[Array, "B L D"]:
        """``mask`` is added to the scores: 0 for a real key, hugely negative for padding."""
        shape = (*x.shape[:2], self.num_heads, self.d_kv)
        q, k, v = (projection(x).reshape(shape) for projection in (self.q, self.k, self.v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        bias = jnp.moveaxis(self.relative_attention_bias(buckets), -1, 0)[None] + mask[:, None, None, :]
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(v.dtype)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], self.num_heads * self.d_kv))


class GatedFeedForward(nnx.Module):
    """wo(gelu(wi_0 x) · wi_1 x), with the tanh form of GELU."""

    def __init__(self, config: TextEncoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = config.d_model, config.d_ff
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.wi_0 = _linear(width, inner, width**-0.5, kernel("width", "hidden"), **kinds)
        self.wi_1 = _linear(width, inner, width**-0.5, kernel("width", "hidden"), **kinds)
        self.wide, stored = _residual_dtype(dtype), _residual_dtype(param_dtype)
        wide: dict[str, Any] = {"dtype": self.wide, "param_dtype": stored, "rngs": rngs}
        self.wo = _linear(inner, width, inner**-0.5, kernel("hidden", "width"), **wide)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        gate = jax.nn.gelu(self.wi_0(x), approximate=True).astype(self.wide)
        return self.wo(gate * self.wi_1(x).astype(self.wide))


class UMT5Block(nnx.Module):
    """Self-attention, then the feed-forward; each normed before and added after."""

    def __init__(self, config: TextEncoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        epsilon = config.layer_norm_epsilon
        self.self_attention_norm = T5LayerNorm(config.d_model, epsilon=epsilon, param_dtype=param_dtype)
        self.self_attention = SelfAttention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.ffn_norm = T5LayerNorm(config.d_model, epsilon=epsilon, param_dtype=param_dtype)
        self.ffn = GatedFeedForward(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Float[Array, "B L"], *, buckets: Int[Array, "L L"]
    ) -> Float[Array, "B L D"]:
        x = x + self.self_attention(self.self_attention_norm(x), mask, buckets=buckets).astype(x.dtype)
        return x + self.ffn(self.ffn_norm(x)).astype(x.dtype)


class UMT5Encoder(nnx.Module):
    """UMT5's encoder stack, from token ids to hidden states.

    Parameters of ``block`` have a leading layer axis; the forward pass scans over it. Layer norms, position biases and
    softmax are computed in float32, the rest in ``dtype``; in float16 the feed-forward's sums and the residual stream
    are float32 too. Freshly made, it has T5's initialisation: each projection keeps the variance of its input,
    embeddings have variance one.

    Args:
        config: sizes.
        dtype: of the computation and of the result.
        param_dtype: of the stored parameters.
        rngs: the ``params`` stream initialises.

    Raises:
        ConfigError: too few buckets, or too short a largest distance, for both kinds of bucket.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        exact = config.relative_attention_num_buckets // 4
        if not 1 <= exact < config.relative_attention_max_distance:
            raise ConfigError(
                "TextEncoderConfig.relative_attention_num_buckets must be at least 4, and a quarter of it less than "
                f"relative_attention_max_distance, not {config.relative_attention_num_buckets} and "
                f"{config.relative_attention_max_distance}"
            )
        self.config = config
        self.shared = nnx.Embed(
            config.vocab_size,
            config.d_model,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(1.0),
            embedding_metadata=table("width"),
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> UMT5Block:
            return UMT5Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.block = stack(rngs)
        self.final_layer_norm = T5LayerNorm(config.d_model, epsilon=config.layer_norm_epsilon, param_dtype=param_dtype)
        #: Whether the blocks stay in the host's memory (`keep_blocks_on_host`).
        self.offloaded = False

    def keep_blocks_on_host(self) -> None:
        """As `rehyat_jax.models.wan.transformer.WanTransformer`'s.

        Raises:
            ConfigError: the device cannot read the host's memory.
        """
        keep_on_host(self.block)
        self.offloaded = True

    def __repr__(self) -> str:
        return described(self, f"{self.config.num_layers} blocks of {self.config.d_model}")

    def __call__(
        self,
        ids: Int[Array | np.ndarray, "B L"],
        mask: Bool[Array | np.ndarray, "B L"] | Int[Array | np.ndarray, "B L"],
    ) -> Float[Array, "B L D"]:
        """Hidden states after the last norm, as transformers' ``last_hidden_state``.

        Args:
            ids: token ids, 0 ≤ id < vocab_size.
            mask: true (or not zero) for real tokens, false (or zero) for padding. Hidden states at padding are
                computed too and mean nothing.
        """
        buckets = jnp.asarray(
            relative_position_buckets(
                ids.shape[1],
                num_buckets=self.config.relative_attention_num_buckets,
                max_distance=self.config.relative_attention_max_distance,
            )
        )
        additive = jnp.where(jnp.asarray(mask).astype(bool), 0.0, jnp.finfo(jnp.float32).min).astype(jnp.float32)
        graphdef, params = nnx.split(self.block)

        def layer(x: Array, params: Any) -> tuple[Array, None]:
            here = fetched(params) if self.offloaded else params
            return nnx.merge(graphdef, here)(x, additive, buckets=buckets), None

        embedded = self.shared(jnp.asarray(ids))
        x, _ = jax.lax.scan(layer, embedded.astype(_residual_dtype(embedded.dtype)), params)
        return self.final_layer_norm(x).astype(embedded.dtype)


def _residual_dtype(dtype: DTypeLike) -> Any:
    """In float16 the sums of the feed-forward overflow: there ``wo`` and what it adds to are float32, as in
    transformers."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype) == jnp.float16 else jnp.dtype(dtype)


def _linear(
    inputs: int,
    outputs: int,
    std: float,
    metadata: dict[str, Any],
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Linear:
    return Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nnx.initializers.normal(std),
        kernel_metadata=metadata,
        rngs=rngs,
    )
