"""Trees of several streams as rows of one, inside compiled programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def stacked(trees: tuple[Any, ...]) -> Any:
    """Arrays of trees of one kind under a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstacked(tree: Any, count: int) -> tuple[Any, ...]:
    """The reverse of `stacked`."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count))
