"""The softmax window alone: each chunk sees itself, the frames before it, and the video's first ones as sinks.

LongLive (arXiv 2509.22622), StreamingLLM. Everything else is forgotten: a baseline for hybrid attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, overload

import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rehyat_jax.attention.scan import attend, over_chunks, ratio, window
from rehyat_jax.attention.state import empty_places
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.base import MOST_FRAMES, Mixer, MixerConfig, Weights, register, whole
from rehyat_jax.mixers.checks import check_alike, check_state
from rehyat_jax.runtime.mesh import devices_along


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(MixerConfig):
    """Fields as in `HybridConfig`."""

    name: ClassVar[str] = "window"
    #: It has no parameters.
    losses: ClassVar = ()

    chunk_frames: int = whole(3, 1, MOST_FRAMES)
    overlap_frames: int = whole(1, 0, MOST_FRAMES)
    sink_frames: int = whole(0, 0, MOST_FRAMES)

    def make(self, *, heads: int, head_dim: int, **_: Any) -> WindowMixer:
        return WindowMixer(self, heads=heads, head_dim=head_dim)

    def flops(self, *, frames: int, frame: int, heads: int, head_dim: int) -> int:
        pairs = window_pairs(self.chunk_frames, self.overlap_frames, self.sink_frames, frames=frames)
        return 4 * pairs * frame**2 * heads * head_dim


class WindowMixer(Mixer):
    """Without parameters."""

    def __init__(self, config: Window, *, heads: int, head_dim: int) -> None:
        self.config, self.heads, self.head_dim = config, heads, head_dim

    def __call__(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        *,
        frame: int,
        tokens: int | None = None,
    ) -> Float[Array, "B N H D"]:
        if devices_along("time") > 1:
            raise ConfigError("blocks of kind 'window' need a mesh that does not shard time (context 1)")
        return window_attention(q, k, v, **self._settings(frame))

    def init_state(self, *, batch: int, frame: int, dtype: DTypeLike) -> WindowState:
        settings = self._settings(frame)
        return WindowState.zeros(
            batch,
            heads=self.heads,
            head_dim=self.head_dim,
            overlap=settings["overlap"],
            sink=settings["sink"],
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
    ) -> tuple[Float[Array, "B N H D"], WindowState]:
        return window_attention(q, k, v, **self._settings(frame), initial_state=state, return_state=True)

    def state_dimensions(self) -> WindowState:
        tokens: Any = ("batch", None, "stream heads", None)
        return WindowState(tokens, tokens, tokens, tokens, seen=())  # type: ignore[arg-type]

    def weights(
        self, q: Float[Array, "B N H D"], k: Float[Array, "B N H D"], *, queries: Int[Array, " Q"], frame: int
    ) -> Weights:
        chunk, overlap, sink = self._settings(frame).values()
        t, j = (queries // chunk)[:, None], jnp.arange(k.shape[1], dtype=queries.dtype)[None]
        seen = (j // chunk <= t) & ((t <= (j + overlap) // chunk) | (j < sink))
        scores = jnp.einsum("bihd,bjhd->bhij", q[:, queries].astype(jnp.float32), k.astype(jnp.float32))
        scores = jnp.where(seen[None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
        softmax = jnp.exp(scores - stop_gradient(scores.max(axis=-1, keepdims=True)))
        return Weights(softmax, jnp.zeros_like(softmax), seen, jnp.zeros_like(seen))

    def _settings(self, frame: int) -> dict[str, Any]:
        config = self.config
        return {
            "chunk": config.chunk_frames * frame,
            "overlap": config.overlap_frames * frame,
            "sink": config.sink_frames * frame,
        }


def window_pairs(chunk: int, overlap: int, sink: int, *, frames: int) -> int:
    """Pairs of frames, a query's and a key's, that softmax over the window has; all sizes in frames."""
    pairs = 0
    for start in range(0, frames, chunk):
        end = min(start + chunk, frames)
        first = max(start - overlap, 0)
        pairs += (end - start) * (end - first + min(sink, first))
    return pairs


class WindowState(NamedTuple):
    """The tokens that the next chunk's window begins with, and the stream's first ones. A pytree."""

    #: The last ``overlap`` tokens, the newest last.
    k: Float[Array, "B O H D"]
    v: Float[Array, "B O H D"]
    #: The first ``sink`` tokens, filled as they leave the window.
    sink_k: Float[Array, "B S H D"]
    sink_v: Float[Array, "B S H D"]
    #: Tokens seen so far, counted no further than overlap + sink.
    seen: Int[Array, ""]

    @classmethod
    def zeros(
        cls, batch: int, *, heads: int, head_dim: int, overlap: int, sink: int = 0, dtype: DTypeLike = jnp.float32
    ) -> WindowState:
        """Nothing seen yet: the same as ``initial_state=None``."""
        last, first = (jnp.zeros((batch, count, heads, head_dim), dtype) for count in (overlap, sink))
        return cls(last, last, first, first, jnp.zeros((), jnp.int32))


@overload
def window_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    overlap: int,
    sink: int = ...,
    initial_state: WindowState | None = ...,
    return_state: Literal[False] = ...,
) -> Float[Array, "B N H D"]: ...


@overload
def window_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    overlap: int,
    sink: int = ...,
    initial_state: WindowState | None = ...,
    return_state: Literal[True],
) -> tuple[Float[Array, "B N H D"], WindowState]: ...


def window_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    chunk: int,
    overlap: int,
    sink: int = 0,
    initial_state: WindowState | None = None,
    return_state: bool = False,
) -> Float[Array, "B N H D"] | tuple[Float[Array, "B N H D"], WindowState]:
    """Softmax over the query's chunk, the ``overlap`` tokens before it and the stream's first ``sink`` (LongLive,
    arXiv 2509.22622), those among them that are not after the chunk. Forgets the rest.

    Raises:
        ConfigError: an impossible setting.
        RehyatError: arrays or a state that do not fit one another.
    """
    for name, value, least in [("chunk", chunk, 1), ("overlap", overlap, 0), ("sink", sink, 0)]:
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")
    check_alike(q=q, k=k, v=v)
    places = (empty_places(k, overlap), empty_places(v, overlap), empty_places(k, sink), empty_places(v, sink))
    empty = WindowState(*places, seen=jnp.zeros((), jnp.int32))
    check_state(initial_state, empty)

    def step(state: WindowState, x: Any) -> tuple[WindowState, Array]:
        q, k, v = x
        new, left = q.shape[1], state.seen - overlap
        place = jnp.arange(sink, dtype=jnp.int32)
        keys, values = (jnp.concatenate(pair, axis=1) for pair in [(state.k, k), (state.v, v)])
        softmax = attend(
            q,
            jnp.concatenate([state.sink_k, keys], axis=1),
            jnp.concatenate([state.sink_v, values], axis=1),
            jnp.concatenate([place < left, window(state.seen, overlap, new)]),
        )
        # Of the tokens that leave the window now, place j of the sink takes number j of the stream.
        leaving = place - left
        takes = ((leaving >= 0) & (leaving < new))[None, :, None, None]
        taken = jnp.clip(leaving, 0, new - 1)
        after = WindowState(
            keys[:, new:],
            values[:, new:],
            jnp.where(takes, keys[:, taken], state.sink_k),
            jnp.where(takes, values[:, taken], state.sink_v),
            jnp.minimum(state.seen + new, overlap + sink),
        )
        return after, ratio(softmax.a, softmax.n).astype(v.dtype)

    state, out = over_chunks(step, empty if initial_state is None else initial_state, (q, k, v), chunk)
    return (out, state) if return_state else out
