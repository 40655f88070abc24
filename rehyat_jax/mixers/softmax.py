"""Softmax attention over the whole video: the teacher's own self-attention, which an unconverted block keeps."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rehyat_jax.attention.sharded import softmax_over_devices
from rehyat_jax.errors import RehyatError
from rehyat_jax.mixers.base import Mixer, MixerConfig, register


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(MixerConfig):
    """A block as the teacher has it."""

    name: ClassVar[str] = "softmax"
    converts: ClassVar[bool] = False
    losses: ClassVar = ()
    #: Every frame sees every other: there are no chunks that a cut could go through.
    chunk_frames = 1

    def make(self, **_: Any) -> SoftmaxMixer:
        return SoftmaxMixer()

    def why_not_stream(self) -> str | None:
        return "attend to the whole video by softmax"

    def flops(self, *, frames: int, frame: int, heads: int, head_dim: int) -> int:
        return 4 * (frames * frame) ** 2 * heads * head_dim


class SoftmaxMixer(Mixer):
    """Without parameters and without a state."""

    def __call__(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        *,
        frame: int,
        tokens: int | None = None,
    ) -> Float[Array, "B N H D"]:
        return softmax_over_devices(q, k, v, tokens=tokens)

    def init_state(self, *, batch: int, frame: int, dtype: DTypeLike) -> Any:
        raise RehyatError("softmax over the whole video has no state that would stand for its past")

    def step(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        state: Any,
        *,
        frame: int,
        first: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B N H D"], Any]:
        raise RehyatError("softmax over the whole video has no state that would stand for its past")
