"""Wan video diffusion transformers in JAX, and their conversion into models that recur (ReHyAt).

Names are imported when first used: ``import rehyat_jax`` alone costs nothing, so that a program can answer ``--help``
before it loads JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rehyat_jax.attention.api import hybrid_attention
    from rehyat_jax.mixers.config import HybridConfig
    from rehyat_jax.models.checkpoints import (
        load_text_encoder,
        load_transformer,
        load_vae,
        save_text_encoder,
        save_transformer,
        save_vae,
    )
    from rehyat_jax.models.umt5.config import TextEncoderConfig
    from rehyat_jax.models.wan.config import VAEConfig, WanConfig
    from rehyat_jax.pipeline import TextToVideo
    from rehyat_jax.runtime.eight_bits import EightBits
    from rehyat_jax.runtime.mesh_config import MeshConfig
    from rehyat_jax.streams.state import StreamState
    from rehyat_jax.streams.stream import Stream
    from rehyat_jax.streams.timeline import Timeline
    from rehyat_jax.video.display import Video
    from rehyat_jax.video.formats import write_video
    from rehyat_jax.video.reading import read_video

__version__ = "0.1.0"

_HOMES = {
    "EightBits": "rehyat_jax.runtime.eight_bits",
    "HybridConfig": "rehyat_jax.mixers.config",
    "MeshConfig": "rehyat_jax.runtime.mesh_config",
    "Stream": "rehyat_jax.streams.stream",
    "StreamState": "rehyat_jax.streams.state",
    "TextEncoderConfig": "rehyat_jax.models.umt5.config",
    "TextToVideo": "rehyat_jax.pipeline",
    "Timeline": "rehyat_jax.streams.timeline",
    "VAEConfig": "rehyat_jax.models.wan.config",
    "Video": "rehyat_jax.video.display",
    "WanConfig": "rehyat_jax.models.wan.config",
    "hybrid_attention": "rehyat_jax.attention.api",
    "load_text_encoder": "rehyat_jax.models.checkpoints",
    "load_transformer": "rehyat_jax.models.checkpoints",
    "load_vae": "rehyat_jax.models.checkpoints",
    "read_video": "rehyat_jax.video.reading",
    "save_text_encoder": "rehyat_jax.models.checkpoints",
    "save_transformer": "rehyat_jax.models.checkpoints",
    "save_vae": "rehyat_jax.models.checkpoints",
    "write_video": "rehyat_jax.video.formats",
}

__all__ = [
    "EightBits",
    "HybridConfig",
    "MeshConfig",
    "Stream",
    "StreamState",
    "TextEncoderConfig",
    "TextToVideo",
    "Timeline",
    "VAEConfig",
    "Video",
    "WanConfig",
    "__version__",
    "hybrid_attention",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "read_video",
    "save_text_encoder",
    "save_transformer",
    "save_vae",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
