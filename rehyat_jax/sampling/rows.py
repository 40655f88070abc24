"""Trees of arrays: of several streams as rows of one, inside compiled programs; and all of zeros, in one program."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def stacked(trees: tuple[Any, ...]) -> Any:
    """Arrays of trees of one kind under a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstacked(tree: Any, count: int) -> tuple[Any, ...]:
    """The reverse of `stacked`."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count))


def zeros(shapes: Any) -> Any:
    """Arrays of zeros for a tree of shapes and types: one program, where a call for each array compiles as many."""
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, _zeros(tuple((leaf.shape, leaf.dtype) for leaf in leaves)))


@partial(jax.jit, static_argnums=0)
def _zeros(shapes: tuple[tuple[tuple[int, ...], Any], ...]) -> list[jax.Array]:
    return [jnp.zeros(shape, dtype) for shape, dtype in shapes]
