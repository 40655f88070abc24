"""Recurrent hybrid attention: the one contract, and the choice among its implementations."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Literal, get_args, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.options import Stabilizer
from rehyat_jax.attention.linear import LinearState
from rehyat_jax.attention.pallas import pallas, unsupported
from rehyat_jax.attention.reference import reference
from rehyat_jax.attention.scan import scan
from rehyat_jax.attention.state import HybridState, empty_places
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.runtime.mesh import whole_on_each_device
from rehyat_jax.runtime.platform import platform

Implementation = Literal["auto", "reference", "scan", "pallas"]

_log = logging.getLogger(__name__)


@overload
def hybrid_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    *,
    chunk: int,
    overlap: int,
    causal: bool = ...,
    stabilizer: Stabilizer = ...,
    implementation: Implementation = ...,
    decay: Float[Array, " H"] | None = ...,
    initial_state: HybridState | None = ...,
    return_state: Literal[False] = ...,
) -> Float[Array, "B N H D"]: ...


@overload
def hybrid_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    *,
    chunk: int,
    overlap: int,
    causal: bool = ...,
    stabilizer: Stabilizer = ...,
    implementation: Implementation = ...,
    decay: Float[Array, " H"] | None = ...,
    initial_state: HybridState | None = ...,
    return_state: Literal[True],
) -> tuple[Float[Array, "B N H D"], HybridState]: ...


def hybrid_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    *,
    chunk: int,
    overlap: int,
    causal: bool = True,
    stabilizer: Stabilizer = "row_max",
    implementation: Implementation = "auto",
    decay: Float[Array, " H"] | None = None,
    initial_state: HybridState | None = None,
    return_state: bool = False,
) -> Float[Array, "B N H D"] | tuple[Float[Array, "B N H D"], HybridState]:
    """Softmax over the query's chunk and the ``overlap`` tokens before it, φ_q·φ_k over the rest, one normaliser.

    ReHyAt (arXiv 2601.04342), with the recurrence corrected: see ``docs/notebook/method.md``. q, k, v and the features
    (φ_q(q) and φ_k(k) already) are time-major; ``chunk`` and ``overlap`` count tokens. The result has v's shape and
    dtype; scores and sums are in float32 (float64 for float64 inputs), and the stabiliser carries no gradient.

    Args:
        causal: the linear set is every token before the window; else every token outside it.
        stabilizer: the c of ``exp(q·k/√D − c)``, which the linear part is not divided by: ``"row_max"`` (as printed),
            ``"lse"`` (the softmax part's sum is 1) or ``"none"`` (0: φ_q·φ_k stands for ``exp(q·k/√D)`` itself).
        implementation: ``"reference"`` is the dense equation, ``"scan"`` scans over the chunks, ``"pallas"`` is the
            kernels for TPU (interpreted on a CPU, slowly) and CUDA, which arrays divided among devices reach inside
            ``jax.shard_map``. ``"auto"`` is pallas on these two where it can be, else scan.
        decay: γ of each head: every chunk, what is in the state is multiplied by it before more is added. None is 1.
        initial_state: what an earlier call over the tokens before these returned; its length must have been a
            multiple of ``chunk`` for the two calls to equal one. None: nothing came before.
        return_state: also return the state after the last token.

    Raises:
        ConfigError: an impossible or unknown setting, or a state or decay where ``causal`` is False.
        RehyatError: arrays or a state whose shapes or dtypes do not fit one another.
        NotImplementedError: the implementation named cannot do what is asked.
    """
    _check_settings(chunk, overlap, stabilizer, implementation)
    _check_arrays(q, k, v, features_q, features_k, decay)
    if not causal:
        for name, given in {
            "initial_state": initial_state is not None,
            "return_state": return_state,
            "decay": decay is not None,
        }.items():
            if given:
                raise ConfigError(f"non-causal hybrid attention has no past to carry: {name} needs causal=True")
    state = init_state(q, v, features_k, overlap) if initial_state is None else initial_state
    _check_state(state, q, v, features_k, overlap)
    if decay is None:
        decay = jnp.ones(q.shape[2], state.s.dtype)
    by_kernels = functools.partial(pallas, begins=initial_state is None)
    named: dict[str, Callable[..., tuple[jax.Array, HybridState]]] = {
        "reference": reference,
        "scan": scan,
        "pallas": by_kernels,
    }
    if implementation == "auto":
        fits = platform() in ("tpu", "gpu") and not unsupported(q, v, features_q) and whole_on_each_device()
        implementation = "pallas" if fits else "scan"
        _log.debug("hybrid_attention of q %s %s: %s", q.dtype, q.shape, implementation)
    out, state = named[implementation](
        q,
        k,
        v,
        features_q,
        features_k,
        chunk=chunk,
        overlap=overlap,
        causal=causal,
        stabilizer=stabilizer,
        decay=decay.astype(state.s.dtype),
        state=state,
    )
    return (out, state) if return_state else out


def init_state(
    q: Float[Array, "B N H D"], v: Float[Array, "B N H D"], features_k: Float[Array, "B N H F"], overlap: int
) -> HybridState:
    """``HybridState.zeros`` for these inputs, sharded as they are."""
    return HybridState(
        *LinearState.empty(features_k, v),
        k=empty_places(q, overlap),
        v=empty_places(v, overlap),
        features_k=empty_places(features_k, overlap),
        seen=jnp.zeros((), jnp.int32),
    )


def _check_settings(chunk: int, overlap: int, stabilizer: str, implementation: str) -> None:
    if chunk < 1:
        raise ConfigError(f"chunk must be at least 1 token, not {chunk}")
    if overlap < 0:
        raise ConfigError(f"overlap must be at least 0 tokens, not {overlap}")
    for name, value, known in [
        ("stabilizer", stabilizer, get_args(Stabilizer)),
        ("implementation", implementation, get_args(Implementation)),
    ]:
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def _check_arrays(
    q: jax.Array, k: jax.Array, v: jax.Array, features_q: jax.Array, features_k: jax.Array, decay: jax.Array | None
) -> None:
    if q.ndim != 4 or features_q.ndim != 4 or q.shape[1] < 1:
        raise RehyatError(
            f"q and features_q must be [batch, tokens, heads, width] with at least one token, not {q.shape} and "
            f"{features_q.shape}"
        )
    for name, array, expected in [
        ("k", k, q.shape),
        ("v", v, q.shape),
        ("features_q", features_q, (*q.shape[:3], features_q.shape[3])),
        ("features_k", features_k, features_q.shape),
    ]:
        if array.shape != expected:
            raise RehyatError(f"{name} is {array.shape} where {expected} was expected")
    if k.dtype != q.dtype or features_k.dtype != features_q.dtype:
        raise RehyatError(
            f"q and k ({q.dtype}, {k.dtype}), and features_q and features_k ({features_q.dtype}, {features_k.dtype}), "
            "must have one dtype"
        )
    if decay is not None and decay.shape != (q.shape[2],):
        raise RehyatError(f"decay is {decay.shape} where one number for each of {q.shape[2]} heads was expected")


def _check_state(state: HybridState, q: jax.Array, v: jax.Array, features_k: jax.Array, overlap: int) -> None:
    expected = jax.eval_shape(functools.partial(init_state, overlap=overlap), q, v, features_k)
    for name, got, want in zip(HybridState._fields, state, expected, strict=True):
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise RehyatError(
                f"the state's {name} is {got.dtype}{list(got.shape)} where {want.dtype}{list(want.shape)} was expected"
            )
