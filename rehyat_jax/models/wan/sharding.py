"""Which meshes a transformer can be sharded over."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh import ALONG


def check_mesh(
    size: Mapping[str, int], model: WanConfig, *, hybrid: Conversion | None, batch: int, latent_frames: int
) -> None:
    """
    Args:
        size: a mesh's shape, by axis.
        batch: clips of a step (of one accumulation), over all devices.

    Raises:
        ConfigError: the model's heads or width, the batch or the time do not divide by the mesh's axes.
    """
    frames = latent_frames // model.patch_size[0]
    chunk = 1 if hybrid is None else hybrid.chunk_frames
    of_mixers = [
        (f"{dimension} of a head", number, ALONG[dimension])
        for mixer in (() if hybrid is None else hybrid.distinct())
        for dimension, number in mixer.divided(model.attention_head_dim).items()
    ]
    for what, number, by in [
        ("heads", model.num_attention_heads, ("tensor",)),
        ("hidden units", model.ffn_dim, ("tensor",)),
        ("channels", model.dim, ("fsdp", "context")),
        *of_mixers,
        ("clips of a batch", batch, ("data", "fsdp")),
    ]:
        pieces = math.prod(size[axis] for axis in by)
        if number % pieces:
            raise ConfigError(f"{number} {what} do not divide by {' x '.join(by)} = {pieces} of the mesh")
    if size["context"] > 1 and (frames % chunk or frames // chunk < size["context"]):
        raise ConfigError(
            f"{frames} latent frames cannot be cut by context = {size['context']} of the mesh: that takes whole chunks "
            f"of {chunk}, one for each device at least"
        )
