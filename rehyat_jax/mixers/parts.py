"""What mixers with a linear part share: pairs of feature maps, and a head's decay."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.options import Positive
from rehyat_jax.attention.features import Activation, FeatureMap
from rehyat_jax.mixers.base import Mixer
from rehyat_jax.runtime.variables import GateParam


@runtime_checkable
class MapOptions(Protocol):
    """The options of φ that a mixer's configuration has."""

    @property
    def degree(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def positive(self) -> Positive: ...


def feature_maps(
    options: MapOptions, *, heads: int, head_dim: int, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> tuple[FeatureMap, FeatureMap]:
    """φ_q and φ_k."""

    def make() -> FeatureMap:
        return FeatureMap(
            heads,
            head_dim,
            layers=options.layers,
            degree=options.degree,
            activation=options.activation,
            positive=options.positive,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    return make(), make()


@runtime_checkable
class WithDecay(MapOptions, Protocol):
    """Those of a mixer whose state may fade."""

    @property
    def decay(self) -> bool: ...


class FeatureMixer(Mixer):
    """A mixer with φ_q and φ_k, and a number a head for decay where the configuration has it."""

    config: Any

    def __init__(
        self, config: WithDecay, *, heads: int, head_dim: int, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.config, self.heads, self.head_dim = config, heads, head_dim
        self.phi_q, self.phi_k = feature_maps(
            config, heads=heads, head_dim=head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        if config.decay:
            self.decay_rate = GateParam(jnp.zeros(heads, jnp.float32))

    @property
    def decay(self) -> Float[Array, " H"] | None:
        """γ of each head, see `decay_of`. None: 1."""
        return decay_of(self.decay_rate[...]) if self.config.decay else None

    def linear_weights(
        self, features_q: Float[Array, "B Q H F"], features_k: Float[Array, "B N H F"], *, age: Int[Array, "Q N"]
    ) -> Float[Array, "B H Q N"]:
        """φ_q·φ_k, of keys that were added so many chunks before the query's."""
        linear = jnp.einsum("bihf,bjhf->bhij", features_q, features_k)
        if self.decay is None:
            return linear
        return linear * (self.decay[:, None, None] ** jnp.maximum(age, 0).astype(jnp.float32)[None])[None]


def linear_flops(options: MapOptions, *, tokens: int, heads: int, head_dim: int) -> int:
    """Floating-point operations of both maps, and of the state's update and read-out."""
    features = options.degree * head_dim
    maps = 2 * tokens * heads * (head_dim * features + (options.layers - 1) * features**2)
    return 2 * (maps + 2 * tokens * heads * head_dim * features)


def decay_of(rate: Float[Array, "*blocks H"]) -> Float[Array, "*blocks H"]:
    """γ of each head, in (0, 1]: the share of the state that is left after each chunk.

    γ = exp(−max(λ, 0)), λ the parameter, 0 at the start. At λ = 0 a gradient that would lower it is dropped and
    one that would raise it passes whole, so that descent leaves γ = 1 freely and never ends beyond it.
    """
    return jnp.exp(-not_below_zero(rate))


@jax.custom_vjp
def not_below_zero(rate: Float[Array, "*blocks H"]) -> Float[Array, "*blocks H"]:
    """max(rate, 0), whose gradient at 0 is that of the side above."""
    return jnp.maximum(rate, 0)


def _forward(rate: Float[Array, "*blocks H"]) -> tuple[Float[Array, "*blocks H"], Float[Array, "*blocks H"]]:
    return not_below_zero(rate), rate


def _backward(rate: Float[Array, "*blocks H"], gradient: Float[Array, "*blocks H"]) -> tuple[Float[Array, "*blocks H"]]:
    return (jnp.where((rate <= 0) & (gradient > 0), 0, gradient),)


not_below_zero.defvjp(_forward, _backward)
