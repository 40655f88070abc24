"""Transformers by noise level (Wan2.2's A14B has two): each is read when a step first asks for it.

A model of one transformer is the same with one member.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.memory import Need, Room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert:
    """One transformer, and the levels that it is for."""

    #: In words.
    name: str
    #: It takes the steps from this time on, in 0 to 1000, up to the one before it.
    least: float
    load: Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A transformer as compiled programs take it, and its number among the experts."""

    number: int
    graph: Any
    weights: Any


class Experts:
    """Several transformers in the place of one, for videos as a whole.

    Args:
        members: the highest noise level first; the last one's ``least`` is 0.
        config, dtype: what all of them have.
    """

    def __init__(self, *members: Expert, config: Any, dtype: Any) -> None:
        self.members, self.config, self.dtype = members, config, dtype
        self._held: dict[int, Split] = {}

    @classmethod
    def of_one(cls, transformer: Any) -> Experts:
        """One transformer for all levels, which is there already."""
        one = Expert(name="transformer", least=0.0, load=lambda: transformer)
        return cls(one, config=transformer.config, dtype=transformer.dtype)

    def at(self, timestep: float) -> Split:
        """The expert of a step. Where the device has no room for another beside those that are there, these go."""
        number = next(i for i, member in enumerate(self.members) if timestep >= member.least)
        if number not in self._held:
            if self._held and not self._room():
                self._held.clear()
            graph, weights = nnx.split(self.members[number].load())
            self._held[number] = Split(number=number, graph=graph, weights=weights)
        return self._held[number]

    def _room(self) -> bool:
        """For one as large as the largest that is there."""
        nbytes = max(sum(x.nbytes for x in jax.tree.leaves(held.weights)) for held in self._held.values())
        return Room.here().lacking(Need(device={"an expert": nbytes})) is None

    @property
    def held(self) -> tuple[str, ...]:
        """The names of those that are on the device."""
        return tuple(self.members[number].name for number in self._held)

    def why_not_stream(self) -> str:
        names = " and ".join(member.name for member in self.members)
        return (
            f"the model cannot stream: it has several transformers by noise level ({names}), and a stream carries one"
        )

    def chunk_frames(self) -> int:
        """
        Raises:
            RehyatError: always.
        """
        raise RehyatError(self.why_not_stream())
