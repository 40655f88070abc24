"""Numbers from one array into another in small blocks: cast, transposed and checked on the way, with no second copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from rehyat_jax.errors import CheckpointError

#: Small enough for a core's cache, where a transposition is cheap.
_BLOCK_BYTES = 1 << 18

#: Per item size and type: the bits of infinity (all exponent bits); whatever is not below it is not finite.
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


def blocks(source: np.ndarray, dtype: np.dtype, what: str) -> Iterator[np.ndarray]:
    """``source`` in ``dtype``, some rows at a time, each known to be finite.

    Raises:
        CheckpointError: a value is not finite in ``dtype``; ``what`` names the tensor.
    """
    source = source if source.shape else source.reshape(1)
    row = source[:1].nbytes or 1
    rows = max(_BLOCK_BYTES // row, 1)
    for start in range(0, source.shape[0], rows):
        # A float16 that overflows is found below, on the result.
        with np.errstate(over="ignore", invalid="ignore"):
            block = np.ascontiguousarray(source[start : start + rows]).astype(dtype, copy=False)
        if largest(block) >= _INFINITY[dtype.name]:
            raise CheckpointError(f"{what} holds NaN or infinity (as {dtype.name})")
        yield block


def largest(block: np.ndarray) -> int:
    """The largest magnitude, as bits: 0 for zeros alone, infinity's or more where there is NaN or infinity."""
    wide = block.dtype.itemsize == 4
    bits = np.ascontiguousarray(block).view(np.uint32 if wide else np.uint16)
    # Dropping the sign costs a copy of the block, and a block is small.
    return int(np.bitwise_and(bits, 0x7FFFFFFF if wide else 0x7FFF).max(initial=0))


def fill(target: np.ndarray, source: Iterable[np.ndarray]) -> None:
    """Lay blocks one after the other into ``target``, a view of the same shape."""
    start = 0
    if not target.shape:
        target = target.reshape(1)
    for block in source:
        target[start : start + len(block)] = block
        start += len(block)
