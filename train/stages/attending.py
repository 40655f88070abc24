"""How the blocks of a teacher attend, and the mixers that learn from them beside it: a whole video, or as a stream."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rehyat_jax.attention.sharded import softmax_over_devices
from rehyat_jax.mixers.base import Mixer, MixerConfig
from rehyat_jax.models.wan.forced import attend_forced


@runtime_checkable
class Attending(Protocol):
    """q, k and v of a block's rows into its output."""

    @property
    def rows(self) -> int:
        """How many belong together."""

    def teach(self, q: Array, k: Array, v: Array, *, frame: int, tokens: int | None) -> Float[Array, "R N H D"]:
        """The teacher's own attention; tokens after ``tokens`` are padding."""

    def apply(
        self, mixer: Mixer, q: Array, k: Array, v: Array, *, frame: int, tokens: int | None
    ) -> Float[Array, "R N H D"]:
        """A mixer's."""


@dataclasses.dataclass(frozen=True)
class WholeVideo:
    """Every row is a video at one noise level, and the teacher's attention is softmax over all of it."""

    rows: int = 1

    def teach(self, q: Array, k: Array, v: Array, *, frame: int, tokens: int | None) -> Float[Array, "R N H D"]:
        return softmax_over_devices(q, k, v, tokens=tokens)

    def apply(
        self, mixer: Mixer, q: Array, k: Array, v: Array, *, frame: int, tokens: int | None
    ) -> Float[Array, "R N H D"]:
        return mixer(q, k, v, frame=frame, tokens=tokens)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Rows in turn a noisy video and its finished frames, as a stream meets them (`rehyat_jax.models.wan.forced`): a
    noisy chunk and the finished one see the finished chunks before them, as far as the teacher's own mixer sees.

    Args:
        teacher: which has no parameters.
    """

    teacher: MixerConfig
    rows: int = 2

    def teach(self, q: Array, k: Array, v: Array, *, frame: int, tokens: int | None) -> Float[Array, "R N H D"]:
        *_, heads, width = q.shape
        kinds = {"dtype": q.dtype, "param_dtype": q.dtype}
        # Of a mixer without parameters nothing is drawn.
        mixer = self.teacher.make(heads=heads, head_dim=width, **kinds, rngs=None)
        return self.apply(mixer, q, k, v, frame=frame, tokens=tokens)

    def apply(
        self, mixer: Mixer, q: Array, k: Array, v: Array, *, frame: int, tokens: int | None
    ) -> Float[Array, "R N H D"]:
        state = mixer.init_state(batch=q.shape[0] // self.rows, frame=frame, dtype=q.dtype)
        return attend_forced(mixer, state, q, k, v, frame=frame, chunk=self.teacher.chunk_frames)[0]


def taken(x: Array, rows: Int[Array, " P"], *, together: int) -> Array:
    """Of an array over rows those of these numbers, where so many belong together and are numbered as one."""
    if together == 1:
        return x[rows]
    grouped = x.reshape(-1, together, *x.shape[1:])[rows]
    return jnp.reshape(grouped, (-1, *x.shape[1:]))
