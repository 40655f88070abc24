"""Features of images: an image encoder that is read when the first image comes."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from rehyat_jax.models.clip.config import Preparation
from rehyat_jax.models.clip.encoder import ImageEncoder
from rehyat_jax.models.networks import make_plan
from rehyat_jax.runtime.platform import precision
from rehyat_jax.video.images import Images
from rehyat_jax.weights.files import read_json
from rehyat_jax.weights.load import filled

#: How images are prepared, beside the encoder.
PROCESSOR_FILE = Path("image_processor", "preprocessor_config.json")


class ImageFeatures:
    """What a transformer attends to of one or two images.

    Args:
        folder: of the whole checkpoint.

    Raises:
        CheckpointError, ConfigError: the encoder's files are incomplete, damaged or impossible.
    """

    def __init__(self, folder: Path) -> None:
        self._plan = make_plan(folder, "image_encoder")
        config, file = self._plan.config, folder / PROCESSOR_FILE
        known = file.is_file()
        #: Of images for the encoder.
        self.preparation = Preparation.from_dict(read_json(file), config=config) if known else Preparation.of(config)

    @property
    def shape(self) -> tuple[int, int]:
        """Of one image: tokens, width."""
        return self._plan.config.tokens, self._plan.config.hidden_size

    @cached_property
    def _encoder(self) -> tuple[Any, Any]:
        return nnx.split(self.read())

    def read(self) -> ImageEncoder:
        """The encoder, from disk, in float32."""
        return cast(ImageEncoder, filled(self._plan, dtype=np.dtype(np.float32)))

    def __call__(self, images: Images) -> Float[Array, "L D"]:
        """In float32, the first image's tokens before the last one's."""
        given = [image for image in (images.first, images.last) if image is not None]
        pixels = jnp.asarray(np.stack([self.preparation(image) for image in given]))
        graph, weights = self._encoder
        with precision(jnp.float32):
            features = _encode(weights, pixels, graph=graph)
        return features.reshape(-1, features.shape[-1])


@partial(jax.jit, static_argnames="graph")
def _encode(weights: Any, pixels: Float[Array, "B H W 3"], *, graph: Any) -> Float[Array, "B L D"]:
    encoder: ImageEncoder = nnx.merge(graph, weights)
    return encoder(pixels)
