"""What Wan2.1's image-to-video transformers have more: image features embedded, and their keys and values.

Sources: Wan-Video/Wan2.1 ``wan/modules/model.py`` (``MLPProj``, ``WanI2VCrossAttention``); diffusers
``models/transformers/transformer_wan.py`` (``WanImageEmbedding``).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rehyat_jax.adapters.linear import Linear
from rehyat_jax.errors import RehyatError
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.norms import LayerNorm
from rehyat_jax.runtime.variables import kernel

_xavier = nnx.initializers.xavier_uniform()
#: The image MLP's; the blocks' is the configuration's.
_EPS = 1e-5


class ImageEmbedder(nnx.Module):
    """Norm, two linear layers with exact GELU between, norm: image features to the transformer's width."""

    def __init__(self, config: WanConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.image_dim
        assert width is not None
        kinds: dict[str, Any] = {"kernel_init": _xavier, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = LayerNorm(width, _EPS)
        self.linear_1 = Linear(width, width, kernel_metadata=kernel(None, "width"), **kinds)
        self.linear_2 = Linear(width, config.dim, kernel_metadata=kernel("width", None), **kinds)
        self.norm2 = LayerNorm(config.dim, _EPS)
        self.tokens = config.pos_embed_seq_len
        self.pos_embed: nnx.Param[Array] | None = nnx.data(None)
        if self.tokens is not None:
            self.pos_embed = nnx.Param(jnp.zeros((self.tokens, width), param_dtype))

    def __call__(self, image: Float[Array, "B L D"]) -> Float[Array, "B L C"]:
        """
        Raises:
            RehyatError: there are not as many tokens as positions: the model takes two images.
        """
        if self.pos_embed is not None:
            if image.shape[1] != self.tokens:
                raise RehyatError(f"this model takes {self.tokens} tokens of images, not {image.shape[1]}")
            image = image + self.pos_embed[...].astype(image.dtype)[None]
        return self.norm2(self.linear_2(jax.nn.gelu(self.linear_1(self.norm1(image)), approximate=False)))
