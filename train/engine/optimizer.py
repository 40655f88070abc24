"""AdamW or Muon with warm-up, cosine decay and clipping; the moving average of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.variables import axes_of, map_variables

#: Of the learning rate, by variable type: of several that a variable is of, the first; of none, all of it.
Shares = Mapping[type[nnx.Variable], float]


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

    #: Muon (Jordan et al. 2024, by optax) for matrices (`rehyat_jax.runtime.variables.Axes`); the rest goes by Adam.
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
    #: Of Adam. Muon's own momentum is another.
    beta1: float = 0.9
    beta2: float = 0.99
    #: Gradients of a larger norm, over all parameters, are scaled down to it.
    clip_norm: float = 1.0
    #: Decay a step of the moving average of the weights, which is what is kept in the end.
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, bound = getattr(self, field.name), 1.0 if field.name in ("beta1", "beta2", "ema_decay") else math.inf
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
                adam_b1=self.beta1,
                adam_b2=self.beta2,
                weight_decay=self.weight_decay,
                muon_weight_dimension_numbers=_matrices,
            )
            return optax.chain(clip, muon)
        return optax.chain(
            clip,
            optax.scale_by_adam(b1=self.beta1, b2=self.beta2),
            optax.add_decayed_weights(self.weight_decay, mask=_decays),
        )

    def init(self, params: PyTree) -> TrainState:
        step, *skipped = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each is donated
        return TrainState(
            step, Skipped(*skipped), params, jax.tree.map(jnp.copy, params), self._transform().init(params)
        )

    def apply(
        self, state: TrainState, gradients: PyTree, rate: Float[Array, ""], *, shares: Shares = MappingProxyType({})
    ) -> TrainState:
        """One step with the learning rate ``rate``, or the share of it that a variable's type has.

        A step whose gradients are not all finite, or too large for float32 to hold their norm, is counted and changes
        nothing else.
        """
        finite = jnp.isfinite(optax.tree.norm(gradients))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer array
            updates, optimizer = self._transform().update(gradients, state.optimizer, state.params)
        if shares:
            updates = map_variables(lambda variable, u: _share(shares, variable) * u, updates)
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
    """How Muon takes each parameter as a matrix, or as one for each layer or head: its `Axes`' inputs into its last."""

    def dims(variable: Any, x: Array) -> optax.contrib.MuonDimensionNumbers | None:
        if (axes := axes_of(variable)) is None or not axes.inputs:
            return None
        last = x.ndim - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(last - axes.inputs, last)), last)

    return map_variables(dims, params)


def _decays(params: PyTree) -> PyTree:
    """Which parameters have weight decay."""
    return map_variables(lambda variable, _: (axes := axes_of(variable)) is not None and axes.decays, params)


def _share(shares: Shares, variable: Any) -> float:
    return next((share for kind, share in shares.items() if isinstance(variable, kind)), 1.0)
