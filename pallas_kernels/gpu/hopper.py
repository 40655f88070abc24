"""Softmax over windows by Pallas and Mosaic GPU: for Hopper's matrix units and copy engine."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jaxtyping import Array

from pallas_kernels.gpu.cudnn import CudnnBackward
from pallas_kernels.gpu.triton import TritonKernels
from pallas_kernels.gpu.windows import Windows

#: Warpgroups that compute, each on its own queries; one more copies.
_COMPUTE = 2

#: Rows of a tile of shared memory: the copy engine begins at a multiple of them.
_TILE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperKernels:
    """Sizes of blocks, in tokens; queries are of one warpgroup. After FlashAttention-3 (arXiv 2407.08608): copies run
    ahead, and one warpgroup's softmax hides behind the other's matrix products.

    Nothing is padded or masked at a chunk's end: its last block of queries begins earlier and repeats some, its last
    block of keys begins earlier and leaves out those that were there before.
    """

    queries: int = 64
    keys: int = 128
    #: Blocks of keys that are copied ahead.
    stages: int = 2
    backward_kernels: CudnnBackward | TritonKernels = CudnnBackward()

    def unsupported(self, q: Array | jax.ShapeDtypeStruct, *, chunk: int, overlap: int) -> str | None:
        """What they lack for windows of these chunks; None where they can be used."""
        length, shortest = q.shape[1], (q.shape[1] - 1) % chunk + 1
        least = max(self.keys * self.stages, self.queries * _COMPUTE)
        tokens = {"tokens": length, "tokens a chunk": chunk, "tokens of overlap": overlap}
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"arrays of {q.dtype}"
        if q.shape[3] not in (64, 128):
            return f"heads of {q.shape[3]}"
        if shortest < least:
            return f"chunks of {shortest} tokens: they must be of at least {least}"
        for name, count in tokens.items():
            if count % _TILE:
                return f"{count} {name}: they must be a multiple of {_TILE}"
        return None

    def forward(self, windows: Windows, q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
        batch, length, heads, width = q.shape
        if lack := self.unsupported(q, chunk=windows.chunk, overlap=windows.overlap):
            raise NotImplementedError(f"Hopper's kernels lack {lack}")
        rows = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
        queries = self.queries * _COMPUTE
        whole, rest = divmod(length, windows.chunk)
        tiled = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))

        def entry(*refs: Any) -> None:
            pl.run_scoped(
                functools.partial(_forward, *refs, kernels=self, windows=windows),
                [
                    mgpu.SMEM((_COMPUTE, self.queries, width), q.dtype, transforms=tiled),
                    *(mgpu.SMEM((self.stages, self.keys, width), q.dtype, transforms=tiled) for _ in range(2)),
                    *(mgpu.SMEM((_COMPUTE, self.queries), jnp.float32) for _ in range(2)),
                ],
                [
                    mgpu.Barrier(num_barriers=_COMPUTE),
                    *(mgpu.Barrier(num_barriers=self.stages) for _ in range(2)),
                    *(mgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=self.stages) for _ in range(2)),
                    mgpu.Barrier(num_arrivals=_COMPUTE),
                ],
                collective_axes="wg",
            )

        out, total, largest = mgpu.kernel(
            entry,
            out_type=[jax.ShapeDtypeStruct(q.shape, v.dtype), rows, rows],
            grid=(whole * pl.cdiv(windows.chunk, queries) + pl.cdiv(rest, queries), heads, batch),
            grid_names=("block", "head", "sample"),
            num_threads=_COMPUTE + 1,
            thread_name="wg",
            compiler_params=mgpu.CompilerParams(approx_math=True),
        )(q, k, v, seen[None])
        return out, total, largest

    def backward(
        self, windows: Windows, q: Array, k: Array, v: Array, seen: Array, y: Array, d_y: Array, rows: Array
    ) -> tuple[Array, Array, Array]:
        return self.backward_kernels.backward(windows, q, k, v, seen, y, d_y, rows)


def _forward(q_ref, k_ref, v_ref, seen_ref, out_ref, total_ref, largest_ref, memory, barriers, *, kernels, windows):
    q_memory, k_memory, v_memory, total_memory, largest_memory = memory
    q_here, k_here, v_here, k_used, v_used, turn = barriers
    head, sample, group = (jax.lax.axis_index(name) for name in ("head", "sample", "wg"))
    size, keys, stages, width = kernels.queries, kernels.keys, kernels.stages, q_ref.shape[3]

    t, block = _divided(jax.lax.axis_index("block"), pl.cdiv(windows.chunk, size * _COMPUTE))
    last = windows.end(t) - size * _COMPUTE
    first = pl.multiple_of(jnp.minimum(t * windows.chunk + block * (size * _COMPUTE), last) + group * size, _TILE)
    visible, end = windows.keys(t, seen_ref[0] if windows.past else 0)
    begin = _divided(visible, _TILE)[0] * _TILE
    steps, _ = _divided(end - begin + (keys - 1), keys)

    def place(step: Any) -> Any:
        return pl.multiple_of(jnp.minimum(begin + step * keys, end - keys), _TILE)

    def compute() -> None:
        mgpu.set_max_registers(232, action="increase")
        q = q_memory.at[group]
        here = (sample, pl.ds(first, size), head)
        mgpu.copy_gmem_to_smem(q_ref.at[here], q, q_here.at[group])
        mgpu.barrier_wait(q_here.at[group])

        def rows(x: float) -> Array:
            return mgpu.layout_cast(jnp.full((size,), x, jnp.float32), mgpu.Layout.WGMMA.reduce(1))

        def take_turns() -> None:
            mgpu.barrier_arrive(turn)
            mgpu.barrier_wait(turn)

        def step(j: Any, carry: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
            out, total, largest = carry
            _, slot = _divided(j, stages)

            def scores(sums: Any) -> Array:
                mgpu.wgmma(sums, q, _transposed(k_memory.at[slot]))
                take_turns()
                return sums[...]

            exponents = pl.run_scoped(scores, mgpu.ACC((size, keys), jnp.float32))
            mgpu.barrier_arrive(k_used.at[slot])
            # How many tokens were seen is known only now: empty places may lie in the first block.
            if masked or windows.past:
                column = mgpu.broadcasted_iota(jnp.int32, (size, keys), 1, layout=mgpu.Layout.WGMMA)
                least = jnp.maximum(begin + j * keys, visible) - place(j)
                exponents = jnp.where(column >= least, exponents, -jnp.inf)
            factor = width**-0.5 * math.log2(math.e)
            above = jnp.maximum(largest, exponents.max(axis=1) * factor)
            rescale = jnp.exp2(largest - above)
            weights = jnp.exp2(exponents * factor - jax.lax.broadcast_in_dim(above, exponents.shape, [0]))
            out = out * jax.lax.broadcast_in_dim(rescale, out.shape, [0])
            total = total * rescale + weights.sum(axis=1)
            coarse = weights.astype(v_ref.dtype)
            out, total, above, coarse = jax.lax.optimization_barrier((out, total, above, coarse))
            # The softmax is done: the matrix units are the other's until it is its turn again.
            mgpu.barrier_arrive(turn)
            mgpu.barrier_wait(v_here.at[slot])
            mgpu.barrier_wait(turn)

            def values(sums: Any) -> None:
                mgpu.wgmma(sums, coarse, v_memory.at[slot])
                _, following = _divided(j + 1, stages)
                pl.when(j + 1 < steps)(lambda: mgpu.barrier_wait(k_here.at[following]))

            out = _added(out, values)
            mgpu.barrier_arrive(v_used.at[slot])
            return out, total, above

        mgpu.barrier_wait(k_here.at[0])
        pl.when(group == 1)(take_turns)
        none = mgpu.layout_cast(jnp.full((size, width), 0, jnp.float32), mgpu.Layout.WGMMA)
        carry = (none, rows(0.0), rows(-jnp.inf))
        carry = jax.lax.fori_loop(0, steps - 1, functools.partial(step, masked=False), carry)
        out, total, largest = step(steps - 1, carry, True)
        pl.when(group == 0)(take_turns)

        q[...] = (out / jax.lax.broadcast_in_dim(total, out.shape, [0])).astype(out_ref.dtype)
        total_memory[group] = largest + jnp.log(total) * math.log2(math.e)
        largest_memory[group] = largest
        mgpu.commit_smem()
        mgpu.copy_smem_to_gmem(q, out_ref.at[here])
        of_rows = (sample, head, pl.ds(first, size))
        mgpu.copy_smem_to_gmem(total_memory.at[group], total_ref.at[of_rows])
        mgpu.copy_smem_to_gmem(largest_memory.at[group], largest_ref.at[of_rows])
        mgpu.wait_smem_to_gmem(0)

    def copy_ahead() -> None:
        mgpu.set_max_registers(40, action="decrease")

        def copy(ref: Any, memory: Any, arrived: Any, j: Any, slot: Any) -> None:
            mgpu.copy_gmem_to_smem(ref.at[sample, pl.ds(place(j), keys), head], memory.at[slot], arrived.at[slot])

        for j in range(stages):
            copy(k_ref, k_memory, k_here, j, j)
            copy(v_ref, v_memory, v_here, j, j)

        @pl.loop(0, steps)
        def _(j: Any) -> None:
            _, slot = _divided(j, stages)
            for ref, memory, arrived, used in ((k_ref, k_memory, k_here, k_used), (v_ref, v_memory, v_here, v_used)):
                mgpu.barrier_wait(used.at[slot])
                pl.when(j + stages < steps)(functools.partial(copy, ref, memory, arrived, j + stages, slot))

    pl.when(group < _COMPUTE)(compute)
    pl.when(group == _COMPUTE)(copy_ahead)


def _added(sums: Array, product: Any) -> Array:
    """Sums in registers and a matrix product."""
    return pl.run_state(product)(mgpu.ACC.init(sums))


def _transposed(ref: Any) -> Any:
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else mgpu.transpose_ref(ref, (1, 0))


def _divided(x: Any, by: int) -> tuple[Any, Any]:
    divisor = jnp.asarray(by, x.dtype)
    return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)
