"""Sizes of the blocks that the TPU kernels work on: a table by device kind, and defaults for what is not in it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Upper ends, in tokens: what is used is the even division of a chunk or window that needs the least padding."""

    #: Queries of a block, forward and backward.
    queries: int = 1280
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


@functools.cache
def _table() -> list[dict]:
    return json.loads((pathlib.Path(__file__).parent / "tuning.json").read_text())


def tuned(device_kind: str, *, head_dim: int, features: int) -> Blocks:
    """The table's entry for ``jax.Device.device_kind`` and these widths, or the defaults."""
    for entry in _table():
        if (entry["device_kind"], entry["head_dim"], entry["features"]) == (device_kind, head_dim, features):
            return Blocks(**entry["blocks"])
    return Blocks()


def divided(length: int, largest: int, multiple: int) -> int:
    """A size of blocks, one in ``multiple`` of at least half the largest and no more than is needed: that which covers
    the length with the least overhang."""
    largest = max(min(largest // multiple, -(-length // multiple)), 1)
    sizes = range(max(largest // 2, 1), largest + 1)
    return multiple * min(sizes, key=lambda size: (-(-length // (size * multiple)) * size, -size))
