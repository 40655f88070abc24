"""Sinusoids of positions: cos and sin of (position × frequency), as exact as float64 makes them, in float32 arithmetic.

Wan computes its rotary tables and (in the original program) its time embedding in float64, which JAX has only behind a
global flag. A float32 product of a position near 1,000 with a frequency is wrong by 6e-5 radians; here the product is
split into pieces that float32 holds exactly and reduced to a fraction of a turn, so that the angle is right to 1e-6
radians for every position up to 2²⁴, traced or not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from rehyat_jax.runtime.platform import platform

_THETA = 10_000.0


class CosSin(NamedTuple):
    cos: Float[Array, "..."]
    sin: Float[Array, "..."]


def cos_sin(positions: Num[Array, "*P"], frequencies: Float[np.ndarray, " F"]) -> CosSin:
    """cos and sin of ``positions[..., None] * frequencies``, float32, ``[*P, F]``.

    Args:
        positions: whole or fractional, 0 to 2²⁴, exactly representable in float32; may be traced.
        frequencies: radians a position, float64 on the host, at most 1.
    """
    position = positions.astype(jnp.float32)[..., None]
    turns_each = frequencies.astype(np.float64) / (2 * np.pi)
    rate = np.expand_dims(turns_each, tuple(range(positions.ndim)))
    whole = jnp.round(position)
    high = jnp.floor(whole / 4096)
    low_turns, low_rest = _turns(whole - high * 4096, rate)
    high_turns, high_rest = _turns(high, rate * 4096)
    rest = low_rest + high_rest + (position - whole) * jnp.asarray(rate, jnp.float32)
    angle = 2 * np.pi * _wrap(_wrap(low_turns + high_turns) + rest)
    return CosSin(jnp.cos(angle), jnp.sin(angle))


def _turns(
    count: Float[Array, "..."], rate: Float[np.ndarray, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """``count * rate`` for whole counts up to 2¹²: its multiple of 2⁻²⁴ less whole turns, exact, and the small rest."""
    rate = rate - np.round(rate)
    first = np.round(rate * 2**12) / 2**12
    second = np.round((rate - first) * 2**24) / 2**24
    # At most 24 bits in every product and sum.
    exact = _wrap(_wrap(count * jnp.asarray(first, jnp.float32)) + count * jnp.asarray(second, jnp.float32))
    return exact, count * jnp.asarray(rate - first - second, jnp.float32)


def _wrap(turns: Float[Array, "..."]) -> Float[Array, "..."]:
    """Less whole turns, exactly: -½ to ½."""
    return turns - jnp.round(turns)


def timestep_embedding(timesteps: Num[Array, "*B"], dim: int) -> Float[Array, "*B {dim}"]:
    """Wan's [cos, sin] embedding of the diffusion time in 0…1000 (Wan2.1 ``wan/modules/model.py``)."""
    half = dim // 2
    both = cos_sin(timesteps, _THETA ** (-np.arange(half, dtype=np.float64) / half))
    return jnp.concatenate([both.cos, both.sin], axis=-1)


def rotary_embedding(head_dim: int, frames: Num[Array, " T"], height: int, width: int) -> CosSin:
    """Rotary factors of the interleaved pairs of one head, time-major: cos and sin ``[T·height·width, head_dim/2]``.

    The pairs are split over time, height and width as in Wan: of 128 channels 44, 42 and 42.

    Positions are not limited to the 1,024 of Wan's tables: the table is an artefact of its implementation, and the
    formula simply goes on. In softmax attention only differences of positions matter, so a frame past 1,024 sees its
    neighbours exactly as an earlier one does.

    Args:
        frames: the latent frames' positions in time, consecutive for a whole video; may be traced.
    """
    side = 2 * (head_dim // 6)
    axes = []
    for axis, (positions, dim) in enumerate(
        [(frames, head_dim - 2 * side), (jnp.arange(height), side), (jnp.arange(width), side)]
    ):
        both = cos_sin(positions, _THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim))
        shape = [1, 1, 1, dim // 2]
        shape[axis] = positions.shape[0]
        full = (frames.shape[0], height, width, dim // 2)
        axes.append(CosSin(*(jnp.broadcast_to(x.reshape(shape), full) for x in both)))
    return CosSin(*(jnp.concatenate(parts, axis=-1).reshape(-1, head_dim // 2) for parts in zip(*axes, strict=True)))


@jax.custom_vjp
def rotate(x: Float[Array, "B N H D"], rotary: CosSin) -> Float[Array, "B N H D"]:
    """Turn each interleaved pair (2i, 2i+1) of ``x`` by its position's angle, in float32.

    By neighbours along the channels, never as pairs along an axis of two, which a TPU would pad to a tile. The gradient
    is rotated back by the same angle; positions have none.
    """
    return _rotated(x, rotary)


def _rotate_forward(x: Array, rotary: CosSin) -> tuple[Array, CosSin]:
    return _rotated(x, rotary), rotary


def _rotate_backward(rotary: CosSin, gradient: Array) -> tuple[Array, CosSin]:
    back = _rotated(gradient, CosSin(rotary.cos, -rotary.sin))
    if platform() == "gpu":
        # Else XLA rotates back inside the norm's sums, each channel many times over: an eighth of a small model's step.
        back = jax.lax.optimization_barrier(back)
    return back, CosSin(*(jnp.zeros_like(x) for x in rotary))


rotate.defvjp(_rotate_forward, _rotate_backward)


def _rotated(x: Float[Array, "B N H D"], rotary: CosSin) -> Float[Array, "B N H D"]:
    wide, even = x.astype(jnp.float32), jnp.arange(x.shape[-1]) % 2 == 0
    cos, sin = (jnp.repeat(half, 2, axis=-1)[None, :, None] for half in rotary)
    partner = jnp.where(even, -jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    return (wide * cos + partner * sin).astype(x.dtype)
