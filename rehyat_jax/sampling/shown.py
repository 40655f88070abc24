"""Latents that are made, as others see them: shown to a function that a caller gave, and checked to be finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rehyat_jax.errors import NotFiniteError, RehyatError
from rehyat_jax.runtime import arguments


class LatentsSeen(NamedTuple):
    """Latents as whoever asked for them sees them: of a whole video after a step, or of a chunk that is finished."""

    #: Normalised, as the transformer has them; a copy on the host.
    latents: Float[np.ndarray, "B T h w z"]
    #: The first of these latent frames, counted from the video's beginning.
    first_frame: int
    #: Denoising steps that are done, and those in all.
    step: int
    steps: int


#: Shown latents, it returns others to go on with, or None. Chunks go on as they are: later ones have seen them.
OnLatents: TypeAlias = Callable[[LatentsSeen], Any]


def check_callable(on_latents: Any) -> None:
    """
    Raises:
        RehyatError: it can be called by nobody.
    """
    if on_latents is not None and not callable(on_latents):
        raise arguments.wrong("on_latents", on_latents, "a function of latents that are seen")


def replacement(found: Any, latents: Float[Array, "B T h w z"]) -> Float[Array, "B T h w z"]:
    """What `OnLatents` returned, in the place of these; these themselves for None.

    Raises:
        RehyatError: it is no array of their shape, or not finite.
    """
    if found is None:
        return latents
    if not isinstance(found, np.ndarray | Array) or found.shape != latents.shape:
        what = f"an array {list(found.shape)}" if isinstance(found, np.ndarray | Array) else type(found).__name__
        raise RehyatError(f"on_latents must return None or an array {list(latents.shape)}, not {what}")
    made = jnp.asarray(found, latents.dtype)
    if not bool(_all_finite(made)):
        raise RehyatError("on_latents returned numbers that are not finite")
    return made


def check_finite(numbers: Array, what: str) -> None:
    """
    Raises:
        NotFiniteError: some of the numbers are not finite; ``what`` made them.
    """
    if not bool(_all_finite(numbers)):
        raise NotFiniteError(f"{what} made numbers that are not finite: the model's own overflow in its number format")


@jax.jit
def _all_finite(numbers: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isfinite(numbers).all()
