"""The windows' backward by cuDNN: a batch of chunks, whose gradients to shared keys are added."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gpu.triton import TritonKernels
from pallas_kernels.gpu.windows import Windows

_cudnn: Any
try:
    from jax._src.cudnn import fused_attention_stablehlo as _cudnn
except ImportError:
    _cudnn = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudnnBackward:
    """cuDNN takes outputs and the logarithm of the normaliser as they are given. Where both are of windows and linear
    part together, what it returns are the windows' gradients under the joint normaliser.

    Chunks that see as many keys are one call, of no mask and no padding: the first, those after it, and the last where
    it is short; where an overlap is longer than a chunk, each that it does not fit before as well.
    """

    #: For what cuDNN lacks.
    otherwise: TritonKernels = TritonKernels()

    def unsupported(self, windows: Windows, q: Array | jax.ShapeDtypeStruct) -> str | None:
        """What it lacks for these windows; None where it can be used."""
        if not hasattr(_cudnn, "_dot_product_attention_bwd_p_wrapper"):
            return "JAX's primitive, which is not where it was"
        if windows.past:
            return "keys before the first query, of which some places may be empty"
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"arrays of {q.dtype}"
        if q.shape[3] > 128 or q.shape[3] % 8:
            return f"heads of {q.shape[3]}"
        return None

    def backward(
        self, windows: Windows, q: Array, k: Array, v: Array, seen: Array, y: Array, d_y: Array, rows: Array
    ) -> tuple[Array, Array, Array]:
        if self.unsupported(windows, q):
            return self.otherwise.backward(windows, q, k, v, seen, y, d_y, rows)
        rows = rows.swapaxes(1, 2) * math.log(2)
        dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for group in _groups(windows):
            queries, of_rows, of_y, of_d_y = (group.own(x) for x in (q, rows, y, d_y))
            of_chunks = attention_backward(queries, group.keys(k), group.keys(v), of_rows.swapaxes(1, 2), of_y, of_d_y)
            dq.append(of_chunks[0].reshape(q.shape[0], -1, *q.shape[2:]))
            dk, dv = (x + group.added_back(d, x.shape) for x, d in zip((dk, dv), of_chunks[1:], strict=True))
        return jnp.concatenate(dq, axis=1), dk.astype(k.dtype), dv.astype(v.dtype)


def attention_backward(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    rows: Float[Array, "B H N"],
    y: Float[Array, "B N H D"],
    d_y: Float[Array, "B N H D"],
) -> tuple[Array, Array, Array]:
    """Gradients to q, k and v: with p = exp(q·k/√D − row), of p·(d_y·v − d_y·y) to the scores.

    JAX has it as a primitive that is not public: its arguments are those of ``_dot_product_attention_bwd_rule``.
    """
    none = jnp.zeros(0, q.dtype)
    dq, dk, dv = _cudnn._dot_product_attention_bwd_p_wrapper.bind(
        q,
        k,
        v,
        *[none] * 7,
        rows,
        y,
        d_y,
        scale=q.shape[3] ** -0.5,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=_cudnn.MaskType.NO_MASK,
        layout=_cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )
    return dq, dk, dv


@dataclasses.dataclass(frozen=True)
class _Group:
    """Chunks one after another of as many queries each, that see as many keys."""

    windows: Windows
    first: int
    count: int

    def span(self, back: int = 0) -> tuple[int, int]:
        """First token, and the one after the last, of the chunks so many before these."""
        return (self.first - back) * self.windows.chunk, _end(self.windows, self.first + self.count - 1 - back)

    def own(self, x: Float[Array, "B N *rest"], back: int = 0) -> Float[Array, "BT C *rest"]:
        begin, end = self.span(back)
        return x[:, begin:end].reshape(x.shape[0] * self.count, -1, *x.shape[2:])

    @property
    def parts(self) -> list[tuple[int, int]]:
        """What each chunk sees, in order: of the chunk so many before it the last so many tokens."""
        chunk = self.windows.chunk
        before = min(self.windows.overlap, self.first * chunk)
        earlier = [(back, min(chunk, before - (back - 1) * chunk)) for back in range(-(-before // chunk), 0, -1)]
        return [*earlier, (0, _end(self.windows, self.first) - self.first * chunk)]

    def keys(self, x: Float[Array, "B N H D"]) -> Float[Array, "BT M H D"]:
        """Those that each chunk sees."""
        each = [(self.own(x, back), seen) for back, seen in self.parts]
        return jnp.concatenate([tokens[:, tokens.shape[1] - seen :] for tokens, seen in each], axis=1)

    def added_back(self, x: Float[Array, "BT M H D"], shape: tuple[int, ...]) -> Float[Array, "B N H D"]:
        """Of every token the sum over the chunks that see it, in float32."""
        total, at = jnp.zeros(shape, jnp.float32), 0
        for back, seen in self.parts:
            begin, end = self.span(back)
            part = x[:, at : at + seen].astype(jnp.float32)
            part = jnp.pad(part, ((0, 0), ((end - begin) // self.count - seen, 0), (0, 0), (0, 0)))
            part = part.reshape(shape[0], end - begin, *shape[2:])
            total += jnp.pad(part, ((0, 0), (begin, shape[1] - end), (0, 0), (0, 0)))
            at += seen
        return total


def _groups(windows: Windows) -> Iterator[_Group]:
    def alike(t: int) -> tuple[int, int]:
        begin = t * windows.chunk
        return _end(windows, t) - begin, min(begin, windows.overlap)

    for _, chunks in itertools.groupby(range(windows.chunks), alike):
        each = list(chunks)
        yield _Group(windows, each[0], len(each))


def _end(windows: Windows, t: int) -> int:
    """``Windows.end`` of a chunk that is known."""
    return min((t + 1) * windows.chunk, windows.length)
