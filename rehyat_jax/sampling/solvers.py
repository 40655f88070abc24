"""Solvers of the flow dx/dsigma = velocity(x, sigma): ``init`` and ``step`` with an explicit state, free of any loop.

What a step needs to know of the noise levels is worked out beforehand, in float64 on the host, as a pytree of
coefficients with a leading axis of steps: a scan takes its rows, and so does a Python loop.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rehyat_jax.errors import ConfigError


@runtime_checkable
class Solver(Protocol):
    """A solver: coefficients once, ``init`` once, then ``step`` with each row of the coefficients in turn.

    The state is a pytree of arrays whose shapes never change; its field ``latents`` is the sample as it stands. Its
    dtype is the noise's (float32 in Wan) whatever the dtype of the velocities.
    """

    #: Whether ``step`` takes fresh standard normal noise; else it is given none.
    stochastic: ClassVar[bool]

    def coefficients(self, sigmas: Float[np.ndarray, "levels"]) -> Any: ...

    def init(self, latents: Float[Array, "*shape"]) -> Any: ...

    def step(
        self,
        state: Any,
        velocity: Float[Array, "*shape"],
        *,
        coefficients: Any,
        noise: Float[Array, "*shape"] | None = None,
    ) -> Any: ...


class EulerState(NamedTuple):
    latents: Float[Array, "*shape"]


@dataclasses.dataclass(frozen=True)
class Euler:
    """Euler's method, as diffusers' ``FlowMatchEulerDiscreteScheduler``."""

    stochastic: ClassVar[bool] = False

    def coefficients(self, sigmas: Float[np.ndarray, "levels"]) -> Float[np.ndarray, "levels-1"]:
        """The steps in sigma (negative)."""
        return np.diff(sigmas.astype(np.float64))

    def init(self, latents: Float[Array, "*shape"]) -> EulerState:
        return EulerState(latents)

    def step(
        self,
        state: EulerState,
        velocity: Float[Array, "*shape"],
        *,
        coefficients: Float[Array, ""],
        noise: Float[Array, "*shape"] | None = None,
    ) -> EulerState:
        x = state.latents
        return EulerState(x + coefficients.astype(x.dtype) * velocity.astype(x.dtype))


class RenoiseCoefficients(NamedTuple):
    """The level of a step, and the next one's."""

    sigma: Float[Array | np.ndarray, "*steps"]
    following: Float[Array | np.ndarray, "*steps"]


@dataclasses.dataclass(frozen=True)
class Renoise:
    """A few-step student's: each step guesses the data, x̂ = z - sigma v, and returns it to the next level with fresh
    noise, (1 - sigma') x̂ + sigma' e; the last guess is the sample.

    Multistep sampling of consistency models (Song et al., arXiv 2303.01469, algorithm 1), as CausVid (arXiv 2412.07772)
    and Self-Forcing (arXiv 2506.08009) sample. Models that were not trained for large steps are blurred by it.
    """

    stochastic: ClassVar[bool] = True

    def coefficients(self, sigmas: Float[np.ndarray, "levels"]) -> RenoiseCoefficients:
        sigmas = sigmas.astype(np.float64)
        return RenoiseCoefficients(sigmas[:-1], sigmas[1:])

    def init(self, latents: Float[Array, "*shape"]) -> EulerState:
        return EulerState(latents)

    def step(
        self,
        state: EulerState,
        velocity: Float[Array, "*shape"],
        *,
        coefficients: RenoiseCoefficients,
        noise: Float[Array, "*shape"] | None = None,
    ) -> EulerState:
        """
        Raises:
            ConfigError: there is no fresh noise.
        """
        if noise is None:
            raise ConfigError("the solver Renoise needs fresh noise at each step")
        x = state.latents
        sigma, following = (jnp.asarray(c, x.dtype) for c in coefficients)
        guess = x - sigma * velocity.astype(x.dtype)
        return EulerState((1 - following) * guess + following * noise.astype(x.dtype))


class UniPCState(NamedTuple):
    """The predicted sample, the corrected one a step before it, and the last predictions of the data, newest first."""

    latents: Float[Array, "*shape"]
    corrected: Float[Array, "*shape"]
    denoised: Float[Array, "order *shape"]


class UniPCCoefficients(NamedTuple):
    """Weights of the last corrected sample, then of the predictions of the data, newest first."""

    sigma: Float[Array | np.ndarray, "*steps"]
    corrector: Float[Array | np.ndarray, "*steps order+2"]  # of the newest order + 1 predictions
    predictor: Float[Array | np.ndarray, "*steps order+1"]  # of the newest ``order``


@dataclasses.dataclass(frozen=True)
class UniPC:
    """UniPC with B(h) = e^h - 1, predicting the data (Zhao et al., arXiv 2302.04867).

    As diffusers' ``UniPCMultistepScheduler`` (bh2, lower order at the end, the corrector at every step but the first)
    and Wan-Video/Wan2.1's ``FlowUniPCMultistepScheduler``.

    Predictor and corrector are both x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) D, with alpha = 1 - sigma,
    lambda = log(alpha / sigma), h = lambda_t - lambda_s, and D a weighted mean of predictions of the data.

    Raises:
        ConfigError: the order is not 1, 2 or 3.
    """

    order: int = 2

    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ConfigError(f"UniPC.order must be 1, 2 or 3, not {self.order!r}")

    def coefficients(self, sigmas: Float[np.ndarray, "levels"]) -> UniPCCoefficients:
        """
        Raises:
            ConfigError: the first level is 1, where the signal-to-noise ratio is zero.
        """
        if sigmas[0] >= 1:
            raise ConfigError("UniPC needs a first noise level below 1; the grid 'diffusers-euler' starts at 1")
        sigmas = sigmas.astype(np.float64)
        steps = len(sigmas) - 1
        corrector = np.zeros((steps, self.order + 2))
        predictor = np.zeros((steps, self.order + 1))
        corrector[0, 0] = 1  # Nothing to correct yet: the noise itself.
        for i in range(steps):
            order = min(self.order, i + 1, steps - i)
            past = np.arange(i - 1, i - order, -1)
            scale, weights = _update(sigmas, start=i, end=i + 1, nodes=past)
            predictor[i, : order + 1] = np.append(scale, weights)
            if i + 1 < steps:
                # The next step, which knows the velocity at the end of this one, does this one over.
                scale, weights = _update(sigmas, start=i, end=i + 1, nodes=np.append(past, i + 1))
                at_end = weights[-1]
                corrector[i + 1, : order + 2] = np.concatenate([[scale, at_end], weights[:-1]])
        return UniPCCoefficients(sigmas[:-1], corrector, predictor)

    def init(self, latents: Float[Array, "*shape"]) -> UniPCState:
        return UniPCState(latents, latents, jnp.zeros((self.order, *latents.shape), latents.dtype))

    def step(
        self,
        state: UniPCState,
        velocity: Float[Array, "*shape"],
        *,
        coefficients: UniPCCoefficients,
        noise: Float[Array, "*shape"] | None = None,
    ) -> UniPCState:
        dtype = state.latents.dtype
        sigma, corrector, predictor = (jnp.asarray(c, dtype) for c in coefficients)
        newest = state.latents - sigma * velocity.astype(dtype)
        denoised = jnp.concatenate([newest[None], state.denoised])
        corrected = corrector[0] * state.corrected + _weighted_sum(corrector[1:], denoised)
        denoised = denoised[: self.order]
        latents = predictor[0] * corrected + _weighted_sum(predictor[1:], denoised)
        return UniPCState(latents, corrected, denoised)


def _weighted_sum(weights: Float[Array, "n"], terms: Float[Array, "n *shape"]) -> Float[Array, "*shape"]:
    # Not a dot product: those may run in reduced precision on an accelerator.
    total = weights[0] * terms[0]
    for k in range(1, len(weights)):
        total = total + weights[k] * terms[k]
    return total


def _update(sigmas: np.ndarray, *, start: int, end: int, nodes: np.ndarray) -> tuple[float, np.ndarray]:
    """The factor of x_start, and the weights of the predictions of the data at ``[start, *nodes]``, in x_end.

    With r_k = (lambda_k - lambda_start) / h the mean is D = m_start + sum_k rho_k (m_k - m_start) / r_k, where rho
    solves sum_k r_k^(j-1) rho_k = j! phi_(j+1)(-h) / phi_1(-h), j = 1, 2, ... For a single node the authors, and every
    program after them, take rho = 1/2.
    """
    with np.errstate(divide="ignore"):  # lambda is infinite at sigma = 0, the end of the last step
        lambdas = np.log1p(-sigmas) - np.log(sigmas)
    h = lambdas[end] - lambdas[start]
    ratio = (lambdas[nodes] - lambdas[start]) / h
    if len(nodes) <= 1:
        rho = np.full(len(nodes), 0.5)
    else:
        phi_1 = phi = np.expm1(-h) / -h
        right = []
        for j in range(1, len(nodes) + 1):
            phi = (phi - 1 / math.factorial(j)) / -h  # phi_(j+1) from phi_j
            right.append(math.factorial(j) * phi / phi_1)
        rho = np.linalg.solve(np.vander(ratio, increasing=True).T, right)
    mean = np.append(1 - (rho / ratio).sum(), rho / ratio)
    return sigmas[end] / sigmas[start], (1 - sigmas[end]) * -np.expm1(-h) * mean
