"""AdamW or Muon with warm-up, cosine decay and clipping; the moving average of the weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PyTree

from rehyat_jax.errors import ConfigError


class Skipped(NamedTuple):
    """Steps that changed nothing, because their gradients were not finite."""

    total: Int[Array, ""]
    #: Since the last step that did change something.
    in_a_row: Int[Array, ""]


class TrainState(NamedTuple):
    """All that a run carries from step to step; random keys are derived from the step."""

    step: Int[Array, ""]
    skipped: Skipped
    params: PyTree
    ema: PyTree
    optimizer: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The settings of one run's optimiser. The length of the run is no part of the compiled step."""

    #: Muon (Jordan et al. 2024, by optax) takes kernels as matrices into their last axis; the rest goes by Adam.
    method: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    #: Muon: Adam's learning rate as a share of Muon's.
    adam_share: float = 0.1
    warmup_steps: int = 200
    #: How the rate goes from its peak, which warm-up ends at, to its end.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    #: Learning rate at the end, as a share of its peak; a constant one stays at its peak.
    final_share: float = 0.01
    weight_decay: float = 0.01
    beta2: float = 0.99
    #: Gradients of a larger norm, over all parameters, are scaled down to it.
    clip_norm: float = 1.0
    #: Decay a step of the moving average of the weights, which is what is kept in the end.
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, bound = getattr(self, field.name), 1.0 if field.name in ("beta2", "ema_decay") else math.inf
            if field.name not in ("method", "schedule") and not 0 <= value < bound:
                raise ConfigError(f"{field.name} must be at least 0 and below {bound}, not {value}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at ``step`` of ``steps``: linear warm-up, then as ``schedule`` says to ``final_share``."""
        warmup = min(self.warmup_steps, steps // 2)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
        return self.learning_rate * (self.final_share + (1 - self.final_share) * left[self.schedule])

    def _transform(self) -> optax.GradientTransformation:
        """Updates to subtract, at a learning rate of 1."""
        clip = optax.clip_by_global_norm(self.clip_norm)
        if self.method == "muon":
            muon = optax.contrib.muon(
                -1.0,
                adam_learning_rate=-self.adam_share,
                adam_b2=self.beta2,
                weight_decay=self.weight_decay,
                muon_weight_dimension_numbers=_matrices,
            )
            return optax.chain(clip, muon)
        return optax.chain(
            clip,
            optax.scale_by_adam(b2=self.beta2),
            optax.add_decayed_weights(self.weight_decay, mask=_is_matrix),
        )

    def init(self, params: PyTree) -> TrainState:
        step, *skipped = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each is donated
        return TrainState(
            step, Skipped(*skipped), params, jax.tree.map(jnp.copy, params), self._transform().init(params)
        )

    def apply(
        self, state: TrainState, gradients: PyTree, rate: Float[Array, ""], *, shares: PyTree = None
    ) -> TrainState:
        """One step with the learning rate ``rate``, or for each leaf of the parameters its share of that (a number).

        A step whose gradients are not all finite, or too large for float32 to hold their norm, is counted and changes
        nothing else.
        """
        finite = jnp.isfinite(optax.tree.norm(gradients))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer array
            updates, optimizer = self._transform().update(gradients, state.optimizer, state.params)
        if shares is not None:
            updates = jax.tree.map(lambda u, share: share * u, updates, shares)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        # Early on the average follows closely, so that the initial weights do not linger in it.
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(self.ema_decay, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        one = jnp.where(finite, 0, 1).astype(jnp.int32)
        skipped = Skipped(state.skipped.total + one, one * (state.skipped.in_a_row + 1))
        new = TrainState(state.step + 1, skipped, params, ema, optimizer)
        kept = TrainState(new.step, skipped, state.params, state.ema, state.optimizer)
        return jax.tree.map(lambda n, k: jnp.where(finite, n, k), new, kept)


def _matrices(params: PyTree) -> PyTree:
    """How each kernel is a matrix: all axes but the last into the last; a leading axis of layers is a batch.

    Of feature maps, which have a matrix a head, so is the axis of heads.
    """

    def dims(path: tuple, x: Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        if "kernel" not in names:
            return None
        first = 1 if {"blocks", "block"} & set(names) else 0
        if {"phi_q", "phi_k"} & set(names):
            first = x.ndim - 2
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, x.ndim - 1)), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(dims, params)


def _is_matrix(params: PyTree) -> PyTree:
    """Weight decay for kernels; none for norms, biases and tables."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(k, "key", None) in ("kernel", "embedding") for k in path), params
    )
