"""Which mixer each block gets: candidates are measured, in error and in milliseconds, and chosen within a budget.

Attention Surgery (arXiv 2509.24899): every pass of the teacher trains every candidate in every block; each one's
held-out error and its time on the device at hand make a knapsack, which `train.stages.block_choice` solves exactly.
The teacher's softmax is always a candidate, of error 0.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.mixers import BlockMixers, Hybrid, MixerConfig, Softmax
from rehyat_jax.mixers.base import read_mixer
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.mixing import Mixing
from rehyat_jax.runtime.files import whole_file
from train.stages.block_choice import choose_candidates

#: Runs of a mixer that are timed, after one that is not.
_RUNS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How blocks get their mixers, in place of one that is named for all."""

    #: Beside the teacher's softmax. Chunks, overlaps, degrees and mixers may differ.
    candidates: tyro.conf.Fixed[tuple[MixerConfig, ...]] = (Hybrid(), Hybrid(chunk_frames=5), Hybrid(chunk_frames=1))
    #: Time of all blocks' self-attention in one pass, as a share of what softmax in every block takes.
    budget: float = 0.5
    #: Optimiser steps of every candidate before it is measured.
    steps: int = 500

    def __post_init__(self) -> None:
        if not self.candidates or not all(isinstance(x, MixerConfig) and x.converts for x in self.candidates):
            raise ConfigError("a choice is among mixers that convert a block; softmax is always there")
        if len(set(self.candidates)) < len(self.candidates):
            raise ConfigError("a choice names a candidate twice")
        if not self.budget > 0 or self.steps < 1:
            raise ConfigError("a choice needs a budget above 0 and at least one step")

    @property
    def all(self) -> tuple[MixerConfig, ...]:
        """The candidates, and softmax before them."""
        return Softmax(), *self.candidates


@dataclasses.dataclass(frozen=True)
class Everywhere(Mixing):
    """Several mixers in every block, side by side: as many groups, each of all blocks."""

    depth: int

    @property
    def numbers(self) -> None:
        return None

    @property
    def converted(self) -> tuple[bool, ...]:
        return (True,) * self.depth

    def blocks(self, mixer: MixerConfig) -> tuple[int, ...]:
        return tuple(range(self.depth))

    def in_order(self, parts: Sequence[Any]) -> Any:
        """Over blocks, and over the mixers last."""
        return jax.tree.map(lambda *each: jnp.stack(each, axis=-1), *parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """A choice that was made, with what it was made from."""

    candidates: tuple[MixerConfig, ...]
    #: Of one block as each candidate, on one video.
    milliseconds: tuple[float, ...]
    #: Of each block as each candidate: Σ|ŷ − y| / Σ|y| on held-out prompts.
    errors: Float[np.ndarray, "blocks candidates"]
    #: `Choice.budget`.
    share: float
    #: The candidate of each block.
    numbers: tuple[int, ...]

    @property
    def mixers(self) -> BlockMixers:
        return BlockMixers(tuple(self.candidates[number] for number in self.numbers))

    def write(self, file: Path) -> None:
        content = {
            "candidates": [mixer.to_dict() for mixer in self.candidates],
            "milliseconds": list(self.milliseconds),
            "share": self.share,
            "errors": self.errors.tolist(),
            "blocks": list(self.numbers),
        }
        with whole_file(file) as partial:
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Chosen:
        """
        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                candidates=tuple(read_mixer(mixer) for mixer in content["candidates"]),
                milliseconds=tuple(map(float, content["milliseconds"])),
                share=float(content["share"]),
                errors=np.array(content["errors"], float),
                numbers=tuple(map(int, content["blocks"])),
            )
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{file} is damaged: remove it, and the choice is made again") from error

    def __str__(self) -> str:
        whole = len(self.numbers) * self.milliseconds[0]
        spent = sum(self.milliseconds[number] for number in self.numbers)
        lines = [f"chosen: {spent:.3f} ms of {self.share * whole:.3f} ms; by softmax it were {whole:.3f} ms"]
        for number, (mixer, each) in enumerate(zip(self.candidates, self.milliseconds, strict=True)):
            blocks = [block for block, chosen in enumerate(self.numbers) if chosen == number]
            options = ", ".join(f"{key} {value}" for key, value in mixer.to_dict().items() if key != "mixer")
            lines.append(f"{mixer.name} ({options}): {each:.3f} ms, blocks {blocks}")
        return "\n".join(lines)


def choose(choice: Choice, errors: Float[np.ndarray, "blocks candidates"], milliseconds: list[float]) -> Chosen:
    """The choice of least summed error within the budget.

    Args:
        errors, milliseconds: of `Choice.all`, softmax first.

    Raises:
        ConfigError: nothing is within the budget, or softmax in every block is.
    """
    blocks, budget = len(errors), choice.budget * len(errors) * milliseconds[0]
    numbers = choose_candidates(errors, np.tile(np.array(milliseconds), (blocks, 1)), budget=budget)
    if not any(numbers):
        raise ConfigError(
            f"within {budget:.3f} ms every block can keep softmax, which takes {milliseconds[0]:.3f} ms: only a budget "
            "below 1 leaves something to choose"
        )
    return Chosen(
        candidates=choice.all, milliseconds=tuple(milliseconds), errors=errors, share=choice.budget, numbers=numbers
    )


def mixer_milliseconds(mixer: MixerConfig, model: WanConfig, *, shape: tuple[int, int, int], dtype: DTypeLike) -> float:
    """What one block's attention on one video takes on one device of this machine: the median of some runs.

    Args:
        shape: the latents' frames, rows and columns.
    """
    frames, rows, columns = (side // patch for side, patch in zip(shape, model.patch_size, strict=True))
    heads, head_dim = model.num_attention_heads, model.attention_head_dim
    kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    graph, params = nnx.split(mixer.make(heads=heads, head_dim=head_dim, **kinds))
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [jax.random.normal(key, (1, frames * rows * columns, heads, head_dim), dtype) for key in keys]
    program = jax.jit(lambda params, *qkv: nnx.merge(graph, params)(*qkv, frame=rows * columns))
    jax.block_until_ready(program(params, *qkv))
    seconds = []
    for _ in range(_RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(program(params, *qkv))
        seconds.append(time.perf_counter() - begin)
    return 1000 * statistics.median(seconds)
