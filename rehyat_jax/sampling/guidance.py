"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): away from a negative prompt, towards the prompt."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rehyat_jax.errors import ConfigError
from rehyat_jax.sampling.condition import Condition

#: (latents, t [B] in 0..1000) -> velocity, of the latents' shape.
Velocity = Callable[[Float[Array, "B *shape"], Float[Array, "B"]], Float[Array, "B *shape"]]
#: (latents, t [B] or [B, T], text) -> velocity; under a condition with image features also ``image=``.
Model = Callable[..., Float[Array, "N *shape"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """v = v_negative + scale (v_prompt - v_negative); at a scale of 1 or less only the prompt counts, as in diffusers.

    Args:
        scale: diffusers' ``guidance_scale``.
        forward: run both prompts as ``"one"`` forward of twice the batch, or as ``"two"``, in less memory.

    Raises:
        ConfigError: the scale is not finite.
    """

    scale: float | int = 5.0
    forward: Literal["one", "two"] = "one"

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ConfigError(f"Guidance.scale must be a finite number, not {self.scale!r}")

    @property
    def needs_negative(self) -> bool:
        """Whether the negative prompt counts at all."""
        return self.scale > 1

    @property
    def evaluations(self) -> int:
        """Evaluations of the model a step: of the prompt, and of the negative prompt where that counts."""
        return 2 if self.needs_negative else 1

    def combine(self, velocities: Sequence[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
        """The velocity to follow, from the prompt's and, where that counts, the negative prompt's."""
        if not self.needs_negative:
            return velocities[0]
        return velocities[1] + self.scale * (velocities[0] - velocities[1])


def guided_velocity(
    model: Model,
    text: Float[Array, "evaluations B L text_dim"],
    *,
    guidance: Guidance,
    dtype: DTypeLike = jnp.float32,
    condition: Condition | None = None,
) -> Velocity:
    """The velocity that a solver follows, from a model and the embeddings of prompts and, after them, negative prompts.

    Latents and texts go into the model in ``dtype``, the model's own, as in diffusers' ``WanPipeline``; its output is
    guided in the latents' dtype (float32), as in Wan-Video/Wan2.1 ``wan/text2video.py``. With a model in bfloat16
    diffusers guides in bfloat16, which is why the two then differ by bfloat16's rounding; in float32 they are the same.
    Both evaluations see the same condition.

    Raises:
        ConfigError: the guidance needs a negative prompt and none is given.
    """
    if len(text) < guidance.evaluations:
        raise ConfigError(f"guidance of scale {guidance.scale} needs a negative prompt (it may be empty)")
    prompts = [row.astype(dtype) for row in text[: guidance.evaluations]]
    count = len(prompts)
    image = {} if condition is None or condition.image is None else {"image": condition.image.astype(dtype)}

    def velocity(latents: Float[Array, "B *shape"], t: Float[Array, "B"]) -> Float[Array, "B *shape"]:
        x, times = (latents, t) if condition is None else condition.seen(latents, t)
        x = x.astype(dtype)
        if guidance.forward == "one":
            every = {name: jnp.concatenate([each] * count) for name, each in image.items()}
            x, times = jnp.concatenate([x] * count), jnp.concatenate([times] * count)
            outputs = jnp.split(model(x, times, jnp.concatenate(prompts), **every).astype(latents.dtype), count)
        else:
            outputs = [model(x, times, prompt, **image).astype(latents.dtype) for prompt in prompts]
        return guidance.combine(outputs)

    return velocity
