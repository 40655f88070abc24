"""Sizes of the blocks that the TPU kernels work on: a table by device kind, and defaults for what is not in it."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from pallas_kernels.tuning import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Upper ends, in tokens: what is used is the even division of a chunk or window that needs the least padding."""

    #: Queries of a block, forward (in 16 bits; in 32 half as many) and backward. Forward all of Wan's chunk at 480p.
    queries: int = 4736
    queries_backward: int = 1280
    #: Keys whose scores are held at once.
    keys: int = 512
    keys_backward: int = 512
    #: Keys of the window that are held in VMEM while all queries of the chunk pass.
    resident: int = 8192
    #: Tokens that are added to the state at once.
    tokens: int = 1560
    #: Bytes of VMEM that a kernel may use.
    vmem: int = 48 << 20


TABLE = Table(pathlib.Path(__file__).with_name("tuning.json"), {Blocks: ("head_dim", "features")})


def tuned(device_kind: str, *, dtype: Any, head_dim: int, features: int) -> Blocks:
    """The table's for ``jax.Device.device_kind``, the dtype of queries and these widths, or the defaults."""
    return Blocks(**TABLE.blocks(Blocks, device_kind, dtype, head_dim=head_dim, features=features))


def divided(length: int, largest: int, multiple: int) -> int:
    """A size of blocks, one in ``multiple`` of at least half the largest and no more than is needed: that which covers
    the length with the least overhang."""
    largest = max(min(largest // multiple, -(-length // multiple)), 1)
    sizes = range(max(largest // 2, 1), largest + 1)
    return multiple * min(sizes, key=lambda size: (-(-length // (size * multiple)) * size, -size))
