"""How far a block's mixer is from softmax attention: what distillation minimises, and what it watches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.base import MixerConfig, Weights

#: "l1": the error of the output, as published. "score": of the weights; see `score_loss`.
LossName = Literal["l1", "score"]


def check_learns(mixers: Sequence[MixerConfig], loss: LossName) -> None:
    """
    Raises:
        ConfigError: no mixer has parameters to learn, or one that has cannot learn by this loss.
    """
    learning = [mixer for mixer in mixers if mixer.losses]
    if not learning:
        names = " and ".join(repr(mixer.name) for mixer in mixers)
        raise ConfigError(f"blocks of kind {names} have no feature maps to learn")
    for mixer in learning:
        if loss not in mixer.losses:
            raise ConfigError(
                f"the {loss} loss is not for blocks of kind {mixer.name!r}, only {', '.join(mixer.losses)}: it needs a "
                "linear part that stands beside a softmax"
            )


def relative_error(guess: Float[Array, "*shape"], truth: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Σ|guess − truth| / Σ|truth|, in float32: ReHyAt's E‖y − ŷ‖₁, on one scale for all blocks."""
    guess, truth = guess.astype(jnp.float32), truth.astype(jnp.float32)
    return jnp.mean(jnp.abs(guess - truth)) / jnp.mean(jnp.abs(truth))


def score_loss(weights: Weights) -> Float[Array, ""]:
    """log(1 + ‖e^(q·k) − φ_q·φ_k‖²) over the keys of each query's linear set, mean over the queries.

    Attention Surgery (arXiv 2509.24899), which measured it to be worse for motion than the error of the output.
    """
    apart = jnp.where(weights.linear_set[None, None], weights.softmax - weights.linear, 0)
    return jnp.mean(jnp.log1p(jnp.sum(jnp.square(apart), axis=-1)))


class Health(NamedTuple):
    """One block's normaliser n_S + n_L."""

    #: n_L / (n_S + n_L), mean over queries: near 1 the window is drowned.
    share: Float[Array, ""]
    #: The least n_S + n_L: at 0 the output is not defined.
    normaliser: Float[Array, ""]


def health(weights: Weights | None) -> Health:
    """A mixer without weights has no normaliser that could fail, and no linear share."""
    if weights is None:
        return Health(jnp.zeros(()), jnp.ones(()))
    softmax, linear = (
        jnp.sum(jnp.where(where[None, None], values, 0), axis=-1)
        for values, where in [(weights.softmax, weights.softmax_set), (weights.linear, weights.linear_set)]
    )
    return Health(jnp.mean(linear / (softmax + linear)), jnp.min(softmax + linear))
