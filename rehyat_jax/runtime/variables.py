"""What a parameter is, said where it is made: by its variable type and by the metadata ``axes``.

A path says where a parameter lies and nothing of what it is. Groups (a learning rate, what is frozen) are filters by
type, as ``nnx.state``, ``nnx.DiffState`` and optimisers take them; how an array is sharded, and whether it is a matrix
to an optimiser, follow from its `Axes`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from rehyat_jax.runtime.mesh import Dimension


class MixerParam(nnx.Param):
    """What a transformer block's mixer has beside the teacher's parameters: a student's own part."""


class GateParam(MixerParam):
    """A number for every head that starts at 0, where it changes nothing, and has far to go from there."""


class AdapterParam(nnx.Param):
    """Of a low-rank adapter beside a frozen kernel: what a training of adapters learns."""


class ScaleParam(nnx.Param):
    """What the outputs of a kernel in eight bits are multiplied by."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a parameter of one layer; an array of several layers has theirs before these."""

    #: By which a mesh shards each axis; None: it is replicated.
    dimensions: tuple[Dimension | None, ...]
    #: Of a matrix product: so many axes before the last are its input, and the last its output. 0: no matrix.
    inputs: int = 0
    #: Whether weight decay draws it to 0: matrices and tables, not norms and biases.
    decays: bool = False


def kernel(*dimensions: Dimension | None, inputs: int | None = None) -> dict[str, Any]:
    """Metadata of a matrix from all axes but the last, or from so many of them, to the last."""
    return {"axes": Axes(dimensions, len(dimensions) - 1 if inputs is None else inputs, decays=True)}


def table(width: Dimension | None = None) -> dict[str, Any]:
    """Metadata of a table whose rows, of this dimension, are looked up."""
    return {"axes": Axes((None, width), decays=True)}


def sharded(*dimensions: Dimension | None) -> dict[str, Any]:
    """Metadata of a parameter that is no matrix and that a mesh shards."""
    return {"axes": Axes(dimensions)}


def axes_of(variable: Any) -> Axes | None:
    """None: replicated, no matrix and without decay, as norms and biases are."""
    return variable.get_metadata("axes", None) if isinstance(variable, nnx.Variable) else None


def map_variables(function: Callable[[Any, Any], Any], tree: PyTree) -> PyTree:
    """A tree of the same structure: ``function`` of each array's variable (or of itself) and of the array."""

    def of(node: Any) -> Any:
        return jax.tree.map(lambda x: function(node, x), node)

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def described(module: nnx.Module, what: str) -> str:
    """A network in one line: what it is, and how many parameters it has, in millions."""
    count = sum(
        math.prod(variable.shape) for variable in jax.tree.leaves(nnx.state(module)) if hasattr(variable, "shape")
    )
    return f"{type(module).__name__}({what}, {count / 1e6:.1f} M parameters)"


def abstract_module(make: Callable[..., nnx.Module], *arguments: Hashable, **options: Hashable) -> Any:
    """A module without memory, shapes only, as ``nnx.eval_shape`` of ``make(*arguments, **options, rngs=…)`` gives it.

    Tracing a constructor takes tenths of a second, and a process asks for the same few modules again and again: the
    trace is kept, and each caller has a copy of its own.
    """
    return nnx.clone(_traced(make, arguments, tuple(options.items())))


@functools.lru_cache(maxsize=64)
def _traced(make: Callable[..., nnx.Module], arguments: tuple[Hashable, ...], options: tuple[Any, ...]) -> Any:
    return nnx.eval_shape(lambda: make(*arguments, **dict(options), rngs=nnx.Rngs(0)))
