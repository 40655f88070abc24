"""AdamW with warm-up, cosine decay and clipping; the moving average of the weights."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree


class TrainState(NamedTuple):
    """All that a run carries from step to step; random keys are derived from the step."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    optimizer: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The settings of one run's optimiser. The length of the run is no part of the compiled step."""

    learning_rate: float = 1e-3
    warmup_steps: int = 200
    #: Learning rate at the end, as a share of its peak.
    final_share: float = 0.01
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip_norm: float = 1.0
    #: Decay a step of the moving average of the weights, which is what is kept in the end.
    ema_decay: float = 0.999

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at ``step`` of ``steps``: linear warm-up, then half a cosine down to ``final_share``."""
        warmup = min(self.warmup_steps, steps // 2)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return self.learning_rate * (
            self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
        )

    def _transform(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(b2=self.beta2),
            optax.add_decayed_weights(self.weight_decay, mask=_is_matrix),
        )

    def init(self, params: PyTree) -> TrainState:
        return TrainState(
            jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), self._transform().init(params)
        )

    def apply(self, state: TrainState, gradients: PyTree, rate: Float[Array, ""]) -> TrainState:
        """One step with the learning rate ``rate``."""
        updates, optimizer = self._transform().update(gradients, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        # Early on the average follows closely, so that the initial weights do not linger in it.
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(self.ema_decay, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        return TrainState(state.step + 1, params, ema, optimizer)


def _is_matrix(params: PyTree) -> PyTree:
    """Weight decay for kernels; none for norms, biases and tables."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(k, "key", None) in ("kernel", "embedding") for k in path), params
    )
