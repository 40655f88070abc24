"""The linear part alone: no softmax, and a chunk reads the state that it has itself entered.

LinFusion (arXiv 2409.02097): a baseline for hybrid attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.options import Positive
from rehyat_jax.attention.api import Implementation
from rehyat_jax.attention.features import Activation
from rehyat_jax.attention.linear import LinearState
from rehyat_jax.attention.scan import over_chunks, ratio
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.base import MOST_FRAMES, MixerConfig, Weights, register, unwritten, whole
from rehyat_jax.mixers.checks import check_alike, check_state
from rehyat_jax.mixers.parts import FeatureMixer, linear_flops
from rehyat_jax.runtime.mesh import Dimension, devices_along


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(MixerConfig):
    """Fields as in `HybridConfig`."""

    name: ClassVar[str] = "linear"

    chunk_frames: int = whole(3, 1, MOST_FRAMES)
    causal: bool = True
    degree: int = whole(2, 1, 8)
    layers: int = whole(2, 1, 8)
    activation: Activation = "gelu"
    positive: Positive = "softplus"
    decay: bool = False
    implementation: Implementation = unwritten("auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay and not self.causal:
            raise ConfigError("decay is for causal blocks: others have no state that could fade")

    def make(self, **kinds: Any) -> LinearMixer:
        return LinearMixer(self, **kinds)

    def why_not_stream(self) -> str | None:
        return None if self.causal else "are not causal, they attend to later frames"

    def flops(self, *, frames: int, frame: int, heads: int, head_dim: int) -> int:
        return linear_flops(self, tokens=frames * frame, heads=heads, head_dim=head_dim)

    def divided(self, head_dim: int) -> Mapping[Dimension, int]:
        return {"channels": head_dim, "features": self.degree * head_dim}


class LinearMixer(FeatureMixer):
    """Every token by the state, none by softmax."""

    config: Linear

    def __call__(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        *,
        frame: int,
        tokens: int | None = None,
    ) -> Float[Array, "B N H D"]:
        if devices_along("time") > 1:
            raise ConfigError("blocks of kind 'linear' need a mesh that does not shard time (context 1)")
        config = self.config
        return linear_attention(
            *self._features(q, k),
            v,
            chunk=config.chunk_frames * frame,
            causal=config.causal,
            decay=self.decay,
        )

    def init_state(self, *, batch: int, frame: int, dtype: DTypeLike) -> LinearState:
        features = self.config.degree * self.head_dim
        return LinearState.zeros(batch, heads=self.heads, head_dim=self.head_dim, feature_dim=features, dtype=dtype)

    def step(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        state: Any,
        *,
        frame: int,
        first: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B N H D"], LinearState]:
        chunk = self.config.chunk_frames * frame
        return linear_attention(
            *self._features(q, k), v, chunk=chunk, decay=self.decay, initial_state=state, return_state=True
        )

    def state_dimensions(self) -> LinearState:
        axes: Any = ("batch", "stream heads", None, None)
        return LinearState(axes, axes[:3])

    def weights(
        self, q: Float[Array, "B N H D"], k: Float[Array, "B N H D"], *, queries: Int[Array, " Q"], frame: int
    ) -> Weights:
        features_q, features_k = (x.astype(jnp.float32) for x in (self.phi_q(q)[:, queries], self.phi_k(k)))
        chunk = self.config.chunk_frames * frame
        t, j = (queries // chunk)[:, None], jnp.arange(k.shape[1], dtype=queries.dtype)[None]
        nothing = jnp.zeros(jnp.broadcast_shapes(t.shape, j.shape), bool)
        linear = self.linear_weights(features_q, features_k, age=t - j // chunk)
        linear_set = j // chunk <= t if self.config.causal else ~nothing
        return Weights(jnp.zeros_like(linear), linear, nothing, linear_set)

    def _features(self, q: Array, k: Array) -> tuple[Float[Array, "B N H F"], Float[Array, "B N H F"]]:
        by = self.config.implementation
        return self.phi_q(q, implementation=by), self.phi_k(k, implementation=by)


@overload
def linear_attention(
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    causal: bool = ...,
    decay: Float[Array, " H"] | None = ...,
    initial_state: LinearState | None = ...,
    return_state: Literal[False] = ...,
) -> Float[Array, "B N H D"]: ...


@overload
def linear_attention(
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    causal: bool = ...,
    decay: Float[Array, " H"] | None = ...,
    initial_state: LinearState | None = ...,
    return_state: Literal[True],
) -> tuple[Float[Array, "B N H D"], LinearState]: ...


def linear_attention(
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    causal: bool = True,
    decay: Float[Array, " H"] | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
) -> Float[Array, "B N H D"] | tuple[Float[Array, "B N H D"], LinearState]:
    """``φ_q Σ φ_k vᵀ / φ_q Σ φ_k`` over every token of the query's chunk and those before it, or of all (not causal).

    ``decay`` as in ``hybrid_attention``: the state is multiplied by γ of its head before a chunk is added.

    Raises:
        ConfigError: an impossible setting, or a state or decay where ``causal`` is False.
        RehyatError: arrays or a state that do not fit one another.
    """
    if chunk < 1:
        raise ConfigError(f"chunk must be at least 1, not {chunk}")
    if not causal and (return_state or initial_state is not None or decay is not None):
        raise ConfigError("non-causal linear attention has no past to carry: a state or decay needs causal=True")
    check_alike(features_q=features_q, features_k=features_k)
    if v.ndim != 4 or v.shape[:3] != features_k.shape[:3]:
        raise RehyatError(f"v is {v.shape} where [batch, tokens, heads] of {features_k.shape} were expected")
    if decay is not None and decay.shape != v.shape[2:3]:
        raise RehyatError(f"decay is {decay.shape} where one number for each of {v.shape[2]} heads was expected")
    empty = LinearState.empty(features_k, v)
    check_state(initial_state, empty)

    def step(state: LinearState, x: Any) -> tuple[LinearState, Array]:
        features_q, features_k, v = x
        if decay is not None:
            state = state.decayed(decay.astype(state.s.dtype))
        state = state.update(features_k, v)
        return state, ratio(*state.read_out(features_q)).astype(v.dtype)

    state, out = over_chunks(
        step,
        empty if initial_state is None else initial_state,
        (features_q, features_k, v),
        chunk if causal else v.shape[1],
    )
    return (out, state) if return_state else out
