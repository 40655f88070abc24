"""Noise levels of clips whose beginning is history: nearly finished, and not learned itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from rehyat_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """Clips whose chunks have noise levels of their own, many of them almost none (Diffusion Forcing, arXiv
    2407.01392): so that a chunk learns to go on from finished ones, which a stream then remembers as they are.

    At one level for all frames the past is as noisy as the present. What only it can tell, as who is behind the pillar,
    then shows at the few levels at which the past is clear enough to tell it and the present not to know it already.
    """

    #: Of clips; the others have one level for all frames.
    share: float = 0.0
    #: Of their chunks, those that are history: nearly clean, and not learned themselves.
    clean: float = 0.5
    #: The highest noise level of history.
    noise: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.clean < 1 and 0 <= self.noise < 1):
            raise ConfigError("history needs a share from 0 to 1, and clean and noise from 0 to below 1")

    def levels(
        self, sigma: Float[Array, " B"], key: Key[Array, ""], *, frames: int, chunk: int
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Noise levels of latent frames, from a level for each clip, and what each frame counts in the loss: in clips
        with history a level for each chunk, the clip's own, history's, or another clip's."""
        size = sigma.shape[0]
        chunks = jnp.arange(frames, dtype=jnp.int32) // chunk
        own, mixed, clean, noise = jax.random.split(key, 4)
        shape = size, -(-frames // chunk)
        others = jax.vmap(lambda k: jax.random.permutation(k, sigma))(jax.random.split(mixed, shape[1])).T
        past = jax.random.bernoulli(clean, self.clean, shape)
        levels = jnp.where(past, self.noise * jax.random.uniform(noise, shape), others)
        # Stratified over the batch, whose order says nothing but the clip's level: which is left at random.
        apart = (jax.random.permutation(own, size) < round(self.share * size))[:, None]
        weights = 1 - (past & apart).astype(jnp.float32)
        return jnp.where(apart, levels, sigma[:, None])[:, chunks], weights[:, chunks]
