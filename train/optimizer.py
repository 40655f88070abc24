"""AdamW with warm-up, cosine decay and clipping; the moving average of the weights."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The settings of one run's optimiser."""

    learning_rate: float = 1e-3
    warmup_steps: int = 200
    #: Learning rate at the end, as a share of its peak.
    final_share: float = 0.01
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip_norm: float = 1.0
    #: Decay a step of the moving average of the weights, which is what is kept in the end.
    ema_decay: float = 0.999

    def build(self, steps: int) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, min(self.warmup_steps, steps // 2), max(steps, 2), self.learning_rate * self.final_share
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(schedule, b2=self.beta2, weight_decay=self.weight_decay, mask=_is_matrix),
        )


def _is_matrix(params: PyTree) -> PyTree:
    """Weight decay for kernels; none for norms, biases and tables."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(k, "key", None) in ("kernel", "embedding") for k in path), params
    )


class TrainState(NamedTuple):
    """All that a run carries from step to step; random keys are derived from ``step``."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    optimizer: PyTree


def init_state(params: PyTree, transform: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), transform.init(params))


def apply_gradients(
    state: TrainState, gradients: PyTree, transform: optax.GradientTransformation, *, ema_decay: float
) -> TrainState:
    updates, optimizer = transform.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # Early on the average follows closely, so that the initial weights do not linger in it.
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
    return TrainState(state.step + 1, params, ema, optimizer)
