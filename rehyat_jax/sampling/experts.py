"""Transformers by noise level (Wan2.2's A14B has two): each is read when a step first asks for it.

A model of one transformer is the same with one member.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.memory import Need, Room
from rehyat_jax.runtime.offload import bytes_on_device, bytes_on_host
from rehyat_jax.sampling.schedule import SamplingSteps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert:
    """One transformer, and the levels that it is for."""

    #: In words.
    name: str
    #: It takes the steps from this time on, in 0 to 1000, up to the one before it.
    least: float
    load: Callable[[], Any]
    #: The transformer without memory, shapes only.
    outline: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A transformer as compiled programs take it, and its number among the experts."""

    number: int
    graph: Any
    weights: Any


class Experts:
    """Several transformers in the place of one. In a stream each has states of its own, of the steps that it takes.

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
        one = Expert(name="transformer", least=0.0, load=lambda: transformer, outline=transformer)
        return cls(one, config=transformer.config, dtype=transformer.dtype)

    def number_at(self, timestep: float) -> int:
        """Whose step it is."""
        return next(i for i, member in enumerate(self.members) if timestep >= member.least)

    def at(self, timestep: float) -> Split:
        """The expert of a step. Where the device has no room for another beside those that are there, these go."""
        return self.held_as(self.number_at(timestep))

    def held_as(self, number: int) -> Split:
        """An expert by its number, as `at`."""
        if number not in self._held:
            if self._held and not self._room():
                self._held.clear()
            graph, weights = nnx.split(self.members[number].load())
            self._held[number] = Split(number=number, graph=graph, weights=weights)
        return self._held[number]

    def _room(self) -> bool:
        """For one as large as the largest that is there."""
        weights = [held.weights for held in self._held.values()]
        device = max(bytes_on_device(each) for each in weights)
        host = max(bytes_on_host(each) for each in weights)
        return Room.here().lacking(Need(device={"an expert": device}, host=host)) is None

    @property
    def held(self) -> tuple[str, ...]:
        """The names of those that are on the device."""
        return tuple(self.members[number].name for number in self._held)

    def modules(self) -> Iterator[Any]:
        """Each transformer in turn, as `at` has it."""
        for number in range(len(self.members)):
            split = self.held_as(number)
            yield nnx.merge(split.graph, split.weights)

    def split(self, steps: SamplingSteps) -> dict[int, SamplingSteps]:
        """The steps of each expert that takes some, by its number, in the order in which they take them."""
        numbers = np.array([self.number_at(float(t)) for t in np.asarray(steps.timestep)])
        places = {int(number): np.flatnonzero(numbers == number) for number in dict.fromkeys(numbers.tolist())}
        return {
            number: jax.tree.map(lambda x, own=own: x[own[0] : own[-1] + 1], steps) for number, own in places.items()
        }

    def why_not_stream(self) -> str | None:
        """None for transformers that all can stream, in chunks of one length."""
        for member in self.members:
            if why := member.outline.why_not_stream():
                return f"{member.name}: {why}" if len(self.members) > 1 else str(why)
        chunks = {member.name: member.outline.chunk_frames() for member in self.members}
        if len(set(chunks.values())) > 1:
            found = ", ".join(f"{name} of {frames}" for name, frames in chunks.items())
            return f"the model cannot stream: its transformers have chunks of different lengths in frames ({found})"
        return None

    def chunk_frames(self) -> int:
        """Latent frames of a stream's chunk.

        Raises:
            RehyatError: the model cannot stream.
        """
        if why := self.why_not_stream():
            raise RehyatError(why)
        frames: int = self.members[0].outline.chunk_frames()
        return frames
