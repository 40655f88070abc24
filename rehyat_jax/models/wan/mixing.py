"""The mixers of a model's blocks: blocks that are alike share one stacked module, and a scan goes over all.

Stacked modules, mixer states and training states are kept by group of equal mixers. Where there is one group, which is
every model of a `HybridConfig`, the thing itself stands in the place of a sequence of one: such a model's parameters,
streams and checkpoints have the names that they have always had.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.base import Mixer, MixerConfig
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.mixers.softmax import Softmax, SoftmaxMixer
from rehyat_jax.models.wan.config import WanConfig


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Each block's mixer. A group is the blocks of one mixer, in order; groups are in the order of their first block,
    and their modules, states and optimisers have a leading axis of their blocks."""

    mixers: tuple[MixerConfig, ...]

    @classmethod
    def of(cls, conversion: Conversion | None, num_layers: int) -> Mixing:
        """
        Raises:
            ConfigError: ``conversion`` is not of a model of this depth.
        """
        return cls((Softmax(),) * num_layers if conversion is None else conversion.mixers(num_layers))

    @property
    def groups(self) -> tuple[MixerConfig, ...]:
        """The distinct mixers, the teacher's among them."""
        return tuple(dict.fromkeys(self.mixers))

    @property
    def converted_groups(self) -> tuple[MixerConfig, ...]:
        """Those that a student adds: what is stored for it has these alone."""
        return tuple(mixer for mixer in self.groups if mixer.converts)

    @property
    def pattern(self) -> tuple[int, ...]:
        """The number of each block's group."""
        groups = self.groups
        return tuple(groups.index(mixer) for mixer in self.mixers)

    @property
    def converted(self) -> tuple[bool, ...]:
        """For each block: is it converted?"""
        return tuple(mixer.converts for mixer in self.mixers)

    @property
    def numbers(self) -> tuple[int | None, ...] | None:
        """The number of each block's converted group; None for a block that is the teacher's."""
        groups = self.converted_groups
        return tuple(groups.index(mixer) if mixer.converts else None for mixer in self.mixers)

    def blocks(self, mixer: MixerConfig) -> tuple[int, ...]:
        """The blocks of a group, by number."""
        return tuple(i for i, other in enumerate(self.mixers) if other == mixer)

    @property
    def chunk_frames(self) -> int:
        """Frames of a stream's chunk, which are equal in all blocks of a model that can stream."""
        return self.mixers[0].chunk_frames

    @property
    def whole_chunks(self) -> int:
        """Frames that are whole chunks of every block: the least of them."""
        return math.lcm(*(mixer.chunk_frames for mixer in self.mixers))

    def make(self, config: WanConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
        """The converted groups' modules, newly initialised; None where there is none."""

        def stacked(mixer: MixerConfig) -> Mixer:
            def make(keys: nnx.Rngs) -> Mixer:
                return mixer.make(
                    heads=config.num_attention_heads,
                    head_dim=config.attention_head_dim,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=keys,
                )

            return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(len(self.blocks(mixer))))

        made = [stacked(mixer) for mixer in self.converted_groups]
        return (made[0] if len(made) == 1 else nnx.List(made)) if made else None

    def modules(self, stored: Any) -> tuple[Mixer, ...]:
        """Every group's module: `make`'s, or the teacher's, which has no parameters."""
        of_student = iter(self.parted(stored))
        return tuple(next(of_student) if mixer.converts else SoftmaxMixer() for mixer in self.groups)

    def parted(self, stored: Any) -> tuple[Any, ...]:
        """What is stored by converted group, as a sequence of these."""
        count = len(self.converted_groups)
        return (stored,) if count == 1 else tuple(stored[i] for i in range(count))

    def joined(self, parts: Sequence[Any]) -> Any:
        """The inverse of `parted`."""
        return parts[0] if len(parts) == 1 else tuple(parts)

    def in_order(self, parts: Sequence[Any]) -> Any:
        """Trees by converted group, over an axis of its blocks, as one over all converted blocks in their order."""
        if len(parts) == 1:
            return parts[0]
        blocks = np.concatenate([self.blocks(mixer) for mixer in self.converted_groups])
        order = np.argsort(blocks)
        return jax.tree.map(lambda *each: jnp.concatenate(each)[order], *parts)

    def selected(self, stored: Any, of: Mixing) -> Any:
        """The modules of the blocks that ``of`` converts, each as here, out of all converted groups' modules."""
        modules = dict(zip(self.converted_groups, self.parted(stored), strict=True))

        def chosen(mixer: MixerConfig) -> Mixer:
            graph, state = nnx.split(modules[mixer])
            places = np.array([self.blocks(mixer).index(block) for block in of.blocks(mixer)])
            return nnx.merge(graph, jax.tree.map(lambda x: x[places], state))

        made = [chosen(mixer) for mixer in of.converted_groups]
        return made[0] if len(made) == 1 else nnx.List(made)

    def prefix(self, group: int) -> str:
        """What a path within the stored whole begins with, for the parameters of a converted group."""
        return "" if len(self.converted_groups) == 1 else f"{group}."

    def why_not_stream(self) -> str | None:
        """None, or one sentence that names the blocks that prevent a model from being run chunk by chunk."""
        depth = len(self.mixers)
        for mixer in sorted(self.groups, key=lambda mixer: mixer.converts):
            if (why := mixer.why_not_stream()) is not None:
                return f"the model cannot stream: {listed(self.blocks(mixer))} of {depth} {why}"
        if len({mixer.chunk_frames for mixer in self.groups}) > 1:
            found = ", ".join(f"{listed(self.blocks(mixer))} of {mixer.chunk_frames}" for mixer in self.groups)
            return f"the model cannot stream: its blocks have chunks of different lengths in frames ({found})"
        return None


def take_parameters(target: Any, source: Any) -> None:
    """The parameters of ``source`` into ``target``, which may attend in another way with them.

    Raises:
        ConfigError: they are of other blocks, or of another size.
    """
    theirs = nnx.to_flat_state(nnx.state(source))
    ours = {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(nnx.state(target))}
    if ours != {path: leaf.get_value().shape for path, leaf in theirs}:
        raise ConfigError("the parameters of the hybrid blocks do not fit their configuration: initialise them anew")
    nnx.update(target, nnx.from_flat_state(theirs))


def listed(blocks: Sequence[int]) -> str:
    """Blocks in few words: ``[0, 2, 3, 4]`` as ``blocks 0, 2-4``."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    names = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"block{'s' if len(blocks) > 1 else ''} {names}"


#: A layer: of x, its parameters and what its group has for it, to the new x and what the group is to have of it.
Step = Callable[[Array, tuple[Any, Any]], tuple[Array, Any]]


def scan_layers(
    steps: Sequence[Step],
    x: Array,
    layers: Any,
    own: Sequence[Any],
    *,
    pattern: tuple[int, ...],
    unroll: bool = False,
) -> tuple[Array, tuple[Any, ...]]:
    """``x`` through the layers in order, each by its group's step, and the steps' other results by group.

    A pattern that repeats (all alike, every third) is one scan over its repetitions, whose body holds a scan for each
    run of layers of a group: no parameter is copied, and a kind of layer is compiled once a run, not once a layer.

    Args:
        layers: a tree with a leading axis of all layers.
        own: for each group, a tree with a leading axis of its layers, as its results have.
        pattern: the group of each layer.
        unroll: no loop, but every layer in the program.
    """
    depth = len(pattern)
    period = next(p for p in range(1, depth + 1) if depth % p == 0 and pattern == pattern[:p] * (depth // p))
    if period == 1:
        x, given = _scan(steps[0], x, (layers, own[0]), depth, unroll=unroll)
        return x, (given,)

    def unit(x: Array, params: tuple[Any, Sequence[Any]]) -> tuple[Array, tuple[Any, ...]]:
        begin, starts = 0, [0] * len(steps)
        given: list[list[Any]] = [[] for _ in steps]
        for group, run in itertools.groupby(pattern[:period]):
            count = len(list(run))
            these = _part(params[0], begin, count), _part(params[1][group], starts[group], count)
            x, results = _scan(steps[group], x, these, count, unroll=unroll)
            given[group].append(results)
            begin, starts[group] = begin + count, starts[group] + count
        return x, tuple(jax.tree.map(lambda *parts: jnp.concatenate(parts), *results) for results in given)

    repeats = depth // period
    folded = jax.tree.map(lambda p: p.reshape(repeats, -1, *p.shape[1:]), (layers, tuple(own)))
    x, given = _scan(unit, x, folded, repeats, unroll=unroll)
    return x, jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), given)


def _part(params: Any, start: int, count: int) -> Any:
    return jax.tree.map(lambda p: p[start : start + count], params)


def _scan(step: Any, x: Array, params: Any, count: int, *, unroll: bool) -> tuple[Array, Any]:
    if count == 1:
        x, given = step(x, jax.tree.map(lambda p: p[0], params))
        return x, jax.tree.map(lambda y: y[None], given)
    return jax.lax.scan(step, x, params, unroll=unroll)
