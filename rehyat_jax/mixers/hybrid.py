"""ReHyAt (arXiv 2601.04342): softmax in a window of chunks, a linear part for the past, one normaliser."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import stop_gradient
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.merge import stabilizer_of
from pallas_kernels.options import Positive, Stabilizer
from rehyat_jax.attention.api import Implementation
from rehyat_jax.attention.features import Activation
from rehyat_jax.attention.sharded import STATE, hybrid_over_devices, hybrid_step_over_devices
from rehyat_jax.attention.state import HybridState
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.base import MOST_FRAMES, MixerConfig, Weights, register, unwritten, whole
from rehyat_jax.mixers.parts import FeatureMixer, linear_flops, not_below_zero
from rehyat_jax.mixers.window import window_pairs
from rehyat_jax.runtime.mesh import Dimension
from rehyat_jax.runtime.variables import GateParam


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(MixerConfig):
    """Fields as in `HybridConfig`."""

    name: ClassVar[str] = "hybrid"
    losses: ClassVar = ("l1", "score")

    chunk_frames: int = whole(3, 1, MOST_FRAMES)
    overlap_frames: int = whole(1, 0, MOST_FRAMES)
    causal: bool = True
    stabilizer: Stabilizer = "row_max"
    degree: int = whole(2, 1, 8)
    layers: int = whole(2, 1, 8)
    activation: Activation = "gelu"
    positive: Positive = "softplus"
    decay: bool = False
    length_norm: bool = False
    implementation: Implementation = unwritten("auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decay", "length_norm"):
            if getattr(self, name) and not self.causal:
                raise ConfigError(f"{name} is for causal blocks: others have no past to weigh against a window")

    def make(self, **kinds: Any) -> HybridMixer:
        return HybridMixer(self, **kinds)

    def why_not_stream(self) -> str | None:
        return None if self.causal else "are not causal, they attend to later frames"

    def flops(self, *, frames: int, frame: int, heads: int, head_dim: int) -> int:
        pairs = window_pairs(self.chunk_frames, self.overlap_frames, 0, frames=frames) * frame**2
        linear = linear_flops(self, tokens=frames * frame, heads=heads, head_dim=head_dim)
        return 4 * pairs * heads * head_dim + linear

    def divided(self, head_dim: int) -> Mapping[Dimension, int]:
        return {"channels": head_dim, "features": self.degree * head_dim}


class HybridMixer(FeatureMixer):
    """Softmax over a window and the state beside it; a number a head for the past's weight where the configuration has
    it."""

    config: Hybrid

    def __init__(
        self, config: Hybrid, *, heads: int, head_dim: int, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, heads=heads, head_dim=head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if config.length_norm:
            self.length_power = GateParam(jnp.zeros(heads, jnp.float32))

    def past_weight(self, tokens: int, *, frame: int, first: int | Int[Array, ""]) -> Float[Array, "{tokens} H"]:
        """The factor of φ_q·φ_k for queries of the frames from ``first`` on: (1 + n / T_c)^−p, n the frames before the
        softmax window and p ≥ 0 the head's power, 0 at the start and with the gradient of `decay_of`'s λ.

        n_L is a sum over the past and grows with it where the softmax part does not: at p = 0 it drowns the window in
        the end, at p = 1 it is a mean and keeps its share at every length. Unlike with decay, nothing is forgotten.
        """
        chunk = self.config.chunk_frames
        frames = jnp.asarray(first, jnp.int32) + jnp.arange(tokens, dtype=jnp.int32) // frame
        past = jnp.maximum(frames // chunk * chunk - self.config.overlap_frames, 0).astype(jnp.float32)
        return jnp.exp(-jnp.log1p(past / chunk)[:, None] * not_below_zero(self.length_power[...])[None])

    def __call__(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        *,
        frame: int,
        tokens: int | None = None,
    ) -> Float[Array, "B N H D"]:
        features = self._features(q, k, frame=frame, first=0)
        return hybrid_over_devices(q, k, v, *features, **self._settings(frame))

    def init_state(self, *, batch: int, frame: int, dtype: DTypeLike) -> HybridState:
        return HybridState.zeros(
            batch,
            heads=self.heads,
            head_dim=self.head_dim,
            feature_dim=self.config.degree * self.head_dim,
            overlap=self.config.overlap_frames * frame,
            dtype=dtype,
        )

    def step(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        state: Any,
        *,
        frame: int,
        first: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B N H D"], HybridState]:
        features = self._features(q, k, frame=frame, first=first)
        return hybrid_step_over_devices(q, k, v, *features, state, **self._settings(frame))

    def state_dimensions(self) -> HybridState:
        return STATE

    def weights(
        self, q: Float[Array, "B N H D"], k: Float[Array, "B N H D"], *, queries: Int[Array, " Q"], frame: int
    ) -> Weights:
        config = self.config
        features_q, features_k = self.phi_q(q), self.phi_k(k)
        if config.length_norm:
            weight = self.past_weight(q.shape[1], frame=frame, first=0)[None, :, :, None]
            features_q = features_q.astype(jnp.float32) * weight
        chunk, overlap = config.chunk_frames * frame, config.overlap_frames * frame
        t, j = (queries // chunk)[:, None], jnp.arange(k.shape[1], dtype=queries.dtype)[None]
        enters, leaves = j // chunk, (j + overlap) // chunk
        softmax_set, linear_set = (enters <= t) & (t <= leaves), leaves < t
        if not config.causal:
            linear_set = ~softmax_set

        q, k, features_q, features_k = (
            x.astype(jnp.float32) for x in (q[:, queries], k, features_q[:, queries], features_k)
        )
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        inside = jnp.where(softmax_set[None, None], scores, -jnp.inf)
        m = inside.max(axis=-1, keepdims=True)
        c = stabilizer_of(config.stabilizer, m, lambda: jax.nn.logsumexp(inside, axis=-1, keepdims=True))
        linear = self.linear_weights(features_q, features_k, age=t - 1 - leaves)
        return Weights(jnp.exp(scores - stop_gradient(c)), linear, softmax_set, linear_set)

    def _features(
        self, q: Array, k: Array, *, frame: int, first: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B N H F"], Float[Array, "B N H F"]]:
        config = self.config
        weight = self.past_weight(q.shape[1], frame=frame, first=first) if config.length_norm else None
        by = config.implementation
        return self.phi_q(q, weight, implementation=by), self.phi_k(k, implementation=by)

    def _settings(self, frame: int) -> dict[str, Any]:
        config = self.config
        return {
            "chunk": config.chunk_frames * frame,
            "overlap": config.overlap_frames * frame,
            "causal": config.causal,
            "stabilizer": config.stabilizer,
            "implementation": config.implementation,
            "decay": self.decay,
        }
