"""Products in int8 by Pallas and Mosaic GPU, for Hopper: both scales, bias and GELU while sums leave the registers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jaxtyping import Array, Float, Int8

from pallas_kernels.gpu.hopper import _TILE, _transposed

#: Warpgroups that compute; one more copies.
_COMPUTE = 2
#: Bytes of K at a step: the widest that the copy engine swizzles.
_STEP = 128
#: Rows and columns that leave a warpgroup's registers at a time.
_PIECE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Product:
    """Sizes of a program's block: its two warpgroups lie side by side along the outputs.

    Programs stay and take one block after the other, in an order that keeps neighbours' factors in the cache.
    """

    rows: int = 128
    #: Of one warpgroup.
    columns: int = 128
    #: Steps along K that are copied ahead.
    stages: int = 4
    #: Blocks of rows that are gone through before the next columns.
    width: int = 8
    multiprocessors: int = 132

    def lacking(self, rows: int, inputs: int, outputs: int) -> str | None:
        """What it lacks for products of this size; None where it can be used."""
        if rows % _TILE:
            return f"{rows} rows: they must be a multiple of {_TILE}"
        if inputs % _STEP:
            return f"{inputs} inputs: they must be a multiple of {_STEP}"
        if outputs % (self.columns * _COMPUTE):
            return f"{outputs} outputs: they must be a multiple of {self.columns * _COMPUTE}"
        return None

    def __call__(
        self,
        x: Int8[Array, "M K"],
        x_scale: Float[Array, " M"],
        kernel: Int8[Array, "N K"],
        scale: Float[Array, " N"],
        bias: Float[Array, " N"],
        *,
        gelu: bool,
        dtype: Any,
    ) -> Float[Array, "M N"]:
        """``x @ kernel.T * x_scale[:, None] * scale + bias``, and GELU by tanh's approximation; sums in int32.

        Raises:
            NotImplementedError: as `lacking` says.
        """
        (length, inputs), outputs = x.shape, kernel.shape[0]
        if lack := self.lacking(length, inputs, outputs):
            raise NotImplementedError(f"Hopper's int8 product lacks {lack}")
        blocks = pl.cdiv(length, self.rows)
        # The copy engine leaves out rows beyond the last; scales are read by the threads themselves.
        x_scale = jnp.pad(x_scale, (0, blocks * self.rows - length))
        run: Any = mgpu.kernel(
            functools.partial(_product, sizes=self, gelu=gelu),
            out_type=jax.ShapeDtypeStruct((length, outputs), dtype),
            grid=(self.multiprocessors,),
            grid_names=("program",),
            num_threads=_COMPUTE + 1,
            thread_name="wg",
            compiler_params=mgpu.CompilerParams(approx_math=True),
        )
        return run(x, x_scale, kernel, scale, bias)


def _product(x_ref, x_scale_ref, kernel_ref, scale_ref, bias_ref, out_ref, *, sizes, gelu):
    rows, columns = sizes.rows, sizes.columns
    grid = pl.cdiv(x_ref.shape[0], rows), kernel_ref.shape[0] // (columns * _COMPUTE)

    def tiled(count: int) -> Any:
        return mgpu.TilingTransform((8, count)), mgpu.SwizzleTransform(128)

    def along_k(body: Any, context: Any) -> Any:
        def block(count: int) -> Any:
            return mgpu.BlockSpec((count, _STEP), lambda k: (0, k), transforms=tiled(_STEP), memory_space=mgpu.SMEM)

        return mgpu.emit_pipeline_warp_specialized(
            body,
            grid=(x_ref.shape[1] // _STEP,),
            in_specs=[block(rows), block(columns * _COMPUTE)],
            memory_registers=40,
            wg_axis="wg",
            num_compute_wgs=_COMPUTE,
            max_concurrent_steps=sizes.stages,
            compute_context=context,
        )

    def nothing(*_: Any) -> None:
        pass

    @functools.partial(
        pl.run_scoped,
        memory=along_k(nothing, nothing).get_allocations(x_ref, kernel_ref),
        out_memory=mgpu.SMEM(
            (_COMPUTE, 2, _PIECE, _PIECE), out_ref.dtype, transforms=tiled(128 // out_ref.dtype.itemsize)
        ),
        collective_axes="wg",
    )
    def _(memory: Any, out_memory: Any) -> None:
        group = jax.lax.axis_index("wg")

        @mgpu.nd_loop((grid[0] * grid[1],), collective_axes="program")
        def _(here: Any) -> None:
            row, column = mgpu.planar_snake(here.index[0], grid, 1, sizes.width)
            first_row, first_column = row * rows, column * (columns * _COMPUTE)
            own_column = first_column + group * columns

            def leave(total: Array) -> None:
                mgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pieces = [(r, c) for r in range(0, rows, _PIECE) for c in range(0, columns, _PIECE)]
                for number, (r, c) in enumerate(pieces):
                    at = pl.ds(first_row + r, _PIECE), pl.ds(own_column + c, _PIECE)
                    sums = total[r : r + _PIECE, c : c + _PIECE].astype(jnp.float32)
                    y = sums * _spread(x_scale_ref, at[0], 0) * _spread(scale_ref, at[1], 1)
                    y = y + _spread(bias_ref, at[1], 1)
                    if gelu:
                        half = 0.5 * y
                        y = half + half * jnp.tanh(y * (0.7978845608 + 0.0356774081 * y * y))
                    piece = out_memory.at[group, number % 2]
                    mgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    piece[...] = y.astype(out_ref.dtype)
                    mgpu.commit_smem()
                    mgpu.copy_smem_to_gmem(piece, out_ref.at[at])

            def compute(steps: Any) -> None:
                def summed(total: Any) -> None:
                    steps(total)
                    leave(total[...])

                pl.run_scoped(summed, mgpu.ACC((rows, columns), jnp.int32))

            def step(_: Any, x: Any, kernel: Any, total: Any) -> Any:
                mgpu.wgmma(total, x, _transposed(kernel.at[pl.ds(group * columns, columns)]))
                mgpu.wgmma_wait(0)
                return total

            x_here = x_ref.at[pl.ds(first_row, rows), :]
            kernel_here = kernel_ref.at[pl.ds(first_column, columns * _COMPUTE), :]
            along_k(step, compute)(x_here, kernel_here, allocations=memory)

    mgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _spread(ref: Any, at: Any, axis: int) -> Array:
    """Numbers of rows (axis 0) or columns (1), as a piece has them."""
    numbers = mgpu.load(ref, at, layout=mgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)
    return jax.lax.broadcast_in_dim(numbers, (_PIECE, _PIECE), [axis])
