"""What a teacher's own trajectories have of clips, where a prompt is not enough: an image, or what they begin with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.sampling.condition import Condition
from train.data.prepared import Prepared
from train.data.sources import Shown, Source, encoded
from train.data.trajectories import Clips, Given


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipsGiven:
    """Of one teacher's trajectories."""

    #: How it is shown the clips' images, from when it is asked for; None: it takes none.
    shown: Callable[[], Shown] | None
    #: Whether trajectories begin with the clips under noise.
    begins: bool
    #: Encodes clips of the world.
    vae: Callable[[], WanVAE]

    def check(self, source: Source) -> None:
        """
        Raises:
            ConfigError: a source of prompts alone, or of another size than its clips.
        """
        if source.samples and not source.of_sprites:
            needs = "their first frames" if self.shown is not None else "what the lower expert begins with"
            raise ConfigError(
                f"{source.prompts} has prompts and no clips, of which this teacher needs {needs}: "
                "give a prepared folder"
            )
        if source.of_sprites:
            source.check_renders()

    def of(self, source: Source, *, seed: int) -> Clips:
        """Of the captions of a source of sprites, by their numbers."""
        scenes, made = source.scenes(seed=seed), self._of_scenes(source)
        return lambda numbers: made(scenes(numbers))

    def held_out(self, source: Source, prepared: Prepared | None, count: int) -> Given:
        """Of the clips that measure, as their captions are told.

        Args:
            prepared: the source's folder, where it has one.
        """
        if prepared is None:
            return self._of_scenes(source)(source.held_out_scenes(count))
        clips = prepared.clips(held_out=True)
        latents = np.stack([np.asarray(clips[place]["latents"], np.float32) for place in range(count)])
        return self._of_latents(jnp.asarray(latents))

    def _of_scenes(self, source: Source) -> Callable[[Any], Given]:
        graph, weights = nnx.split(self.vae())

        @jax.jit
        def latents(weights: PyTree, scenes: Any) -> Float[Array, "R T h w z"]:
            return encoded(nnx.merge(graph, weights), source.render(scenes))

        return lambda scenes: self._of_latents(latents(weights, scenes))

    def _of_latents(self, latents: Float[Array, "R T h w z"]) -> Given:
        return Given(self._condition(latents), latents if self.begins else None)

    @functools.cached_property
    def _condition(self) -> Callable[[Float[Array, "R T h w z"]], Condition | None]:
        if self.shown is None:
            return lambda latents: None
        shown = self.shown()
        return functools.partial(jax.jit(shown.condition), shown.arrays)


def planned_clips(shown: Shown | None, shape: tuple[int, ...], *, begins: bool) -> Clips:
    """Zeros in their place, of latents of this shape [T, h, w, z]."""

    def of_numbers(numbers: Int[np.ndarray, " R"]) -> Given:
        latents: Any = jax.ShapeDtypeStruct((len(numbers), *shape), jnp.float32)
        condition = None if shown is None else jax.eval_shape(shown.condition, shown.arrays, latents)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), Given(condition, latents if begins else None))

    return of_numbers
