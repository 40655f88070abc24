"""A block of the Wan2.1 transformer: self-attention, cross-attention to the text, feed-forward.

Sources: Wan-Video/Wan2.1 ``wan/modules/model.py``; diffusers ``models/transformers/transformer_wan.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rehyat_jax.adapters.linear import Linear
from rehyat_jax.attention.sharded import softmax_over_devices, softmax_to_text
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.norms import LayerNorm, RMSNorm, layer_norm
from rehyat_jax.models.wan.positions import CosSin, rotate
from rehyat_jax.runtime.mesh import Dimension
from rehyat_jax.runtime.variables import kernel

_xavier = nnx.initializers.xavier_uniform()


class TextKV(NamedTuple):
    """What cross-attention sees of a text, of one block or of several; in the compute dtype, the keys normed."""

    k: Float[Array, "*layers B L H D"]
    v: Float[Array, "*layers B L H D"]
    #: Of an image's features, where the model attends to them beside the text.
    image_k: Float[Array, "*layers B M H D"] | None = None
    image_v: Float[Array, "*layers B M H D"] | None = None


#: What a block's self-attention does with q, k and v: its output (v's shape), and whatever else the caller wants back.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class Attention(nnx.Module):
    """Projections, q/k norm over the full width, rotary positions when given, output projection."""

    def __init__(
        self, config: WanConfig, *, image: bool = False, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """
        Args:
            image: with keys and values of an image's features.
        """
        self.heads = config.num_attention_heads

        def linear(*dimensions: Dimension) -> Linear:
            return Linear(
                config.dim,
                config.dim,
                kernel_init=_xavier,
                kernel_metadata=kernel(*dimensions),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.to_q, self.to_k, self.to_v = (linear("width", "heads") for _ in range(3))
        self.to_out = linear("heads", "width")
        self.norm_q = RMSNorm(config.dim, config.eps, param_dtype=param_dtype)
        self.norm_k = RMSNorm(config.dim, config.eps, param_dtype=param_dtype)
        if image:
            self.add_k_proj, self.add_v_proj = (linear("width", "heads") for _ in range(2))
            self.norm_added_k = RMSNorm(config.dim, config.eps, param_dtype=param_dtype)

    # What the attention itself takes: projected, normed, split into heads, rotated to their positions.

    def q(self, x: Float[Array, "B N C"], rotary: CosSin | None = None) -> Float[Array, "B N H D"]:
        return _placed(self._split(self.norm_q(self.to_q(x))), rotary)

    def k(self, x: Float[Array, "B M C"], rotary: CosSin | None = None) -> Float[Array, "B M H D"]:
        return _placed(self._split(self.norm_k(self.to_k(x))), rotary)

    def v(self, x: Float[Array, "B M C"]) -> Float[Array, "B M H D"]:
        return self._split(self.to_v(x))

    def image_kv(self, image: Float[Array, "B I C"]) -> tuple[Float[Array, "B I H D"], Float[Array, "B I H D"]]:
        """An image's keys and values; the queries are the text's."""
        return self._split(self.norm_added_k(self.add_k_proj(image))), self._split(self.add_v_proj(image))

    def out(self, y: Float[Array, "B N H D"]) -> Float[Array, "B N C"]:
        """The heads' results, mixed."""
        return self.to_out(y.reshape(*y.shape[:2], -1))

    def _split(self, y: Float[Array, "B N C"]) -> Float[Array, "B N H D"]:
        return y.reshape(*y.shape[:2], self.heads, -1)


def _placed(x: Float[Array, "B N H D"], rotary: CosSin | None) -> Float[Array, "B N H D"]:
    return x if rotary is None else rotate(x, rotary)


class FeedForward(nnx.Module):
    """Two linear layers with tanh-approximated GELU between."""

    def __init__(self, config: WanConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        kinds = {"kernel_init": _xavier, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.up = Linear(config.dim, config.ffn_dim, kernel_metadata=kernel("width", "hidden"), **kinds)
        self.down = Linear(config.ffn_dim, config.dim, kernel_metadata=kernel("hidden", "width"), **kinds)

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        return self.down(self.up(x, gelu=True))


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated and gated by time."""

    def __init__(self, config: WanConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.eps = config.eps
        self.attn1 = Attention(config, **kinds)
        self.attn2 = Attention(config, image=config.image_dim is not None, **kinds)
        self.norm2 = LayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(config, **kinds)
        self.scale_shift_table = nnx.Param(modulation_table(rngs, 6, config.dim))

    def __call__(
        self,
        x: Float[Array, "B N C"],
        text: Float[Array, "B L C"],
        modulation: Float[Array, "B M 6 C"],
        rotary: CosSin,
    ) -> Float[Array, "B N C"]:
        return self.attending(x, text, modulation, rotary, _softmax)[0]

    def precompute_text_kv(self, text: Float[Array, "B L C"], image: Float[Array, "B I C"] | None = None) -> TextKV:
        """What this block's cross-attention sees of the text, and of an image's features beside it."""
        kv = TextKV(self.attn2.k(text), self.attn2.v(text))
        return kv if image is None else TextKV(*kv[:2], *self.attn2.image_kv(image))

    def attending(
        self,
        x: Float[Array, "B N C"],
        text: Float[Array, "B L C"] | TextKV,
        modulation: Float[Array, "B M 6 C"],
        rotary: CosSin,
        attend: Attend,
        *,
        text_repeats: int = 1,
        image: Float[Array, "B I C"] | None = None,
    ) -> tuple[Float[Array, "B N C"], Any]:
        """The block with another self-attention between its projections, and what that gives beside its output.

        Args:
            text: embedded; or what `precompute_text_kv` made of that, where calls share it.
            modulation: of the time: one for all tokens, or one for each M-th part of them, in order.
            text_repeats: how many tokens of the text the last one stands for.
            image: features, embedded, where ``text`` is no `TextKV` that has read them.
        """
        table = self.scale_shift_table[...][None, None] + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (table[:, :, i] for i in range(6))

        normed = modulate(x, shift, scale, self.eps)
        y, more = attend(self.attn1.q(normed, rotary), self.attn1.k(normed, rotary), self.attn1.v(normed))
        x = _gated(x, self.attn1.out(y), gate)
        # Read no earlier than needed: training would hold it for longer.
        read, query = (
            text if isinstance(text, TextKV) else self.precompute_text_kv(text, image),
            self.attn2.q(self.norm2(x)),
        )
        seen = softmax_to_text(query, read.k, read.v, repeats=text_repeats)
        if read.image_k is not None and read.image_v is not None:
            seen = seen + softmax_to_text(query, read.image_k, read.image_v)
        x = x + self.attn2.out(seen)
        return _gated(x, self.ffn(modulate(x, ffn_shift, ffn_scale, self.eps)), ffn_gate), more


def _softmax(q: Float[Array, "B N H D"], k: Float[Array, "B N H D"], v: Float[Array, "B N H D"]) -> tuple[Array, None]:
    return softmax_over_devices(q, k, v), None


def modulation_table(rngs: nnx.Rngs, rows: int, dim: int) -> Float[Array, "rows dim"]:
    return jax.random.normal(rngs.params(), (rows, dim), jnp.float32) * dim**-0.5


def modulate(
    x: Float[Array, "B N C"], shift: Float[Array, "B M C"], scale: Float[Array, "B M C"], eps: float
) -> Float[Array, "B N C"]:
    """Layer norm, then scaled and shifted: each M-th part of the tokens by its own."""
    normed = _parts(layer_norm(x.astype(jnp.float32), eps), scale)
    return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).reshape(x.shape).astype(x.dtype)


def _gated(x: Float[Array, "B N C"], y: Float[Array, "B N C"], gate: Float[Array, "B M C"]) -> Float[Array, "B N C"]:
    added = (_parts(y.astype(jnp.float32), gate) * gate[:, :, None]).reshape(x.shape)
    return (x.astype(jnp.float32) + added).astype(x.dtype)


def _parts(x: Float[Array, "B N C"], each: Float[Array, "B M C"]) -> Float[Array, "B M L C"]:
    return x.reshape(*each.shape[:2], -1, x.shape[-1])
