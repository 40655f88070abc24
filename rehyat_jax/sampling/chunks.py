"""A video's chunks through the transformers that take their steps: one as a rule, several by noise level.

Each transformer carries states of its own from chunk to chunk: of every step that it takes, or one of the finished
chunks, which each of them is then shown. The solver's history goes through all of a chunk's steps. What belongs to one
transformer is that alone; what belongs to several is a tuple in the order in which they take their steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, Int, Key

from rehyat_jax.errors import RehyatWarning
from rehyat_jax.sampling import programs, rollout
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.experts import Experts, Split
from rehyat_jax.sampling.noise import Shape
from rehyat_jax.sampling.rollout import Sampler, States
from rehyat_jax.sampling.schedule import SamplingSteps
from rehyat_jax.sampling.text import Padded


class Chunks:
    """
    Args:
        samplers: of each expert.
        steps, first_steps: of every chunk but the first, and of that.
    """

    def __init__(
        self, experts: Experts, samplers: Sequence[Sampler], *, steps: SamplingSteps, first_steps: SamplingSteps
    ) -> None:
        self._experts, self._samplers, self._steps = experts, samplers, len(steps.timestep)
        #: By their number in all: the steps of each expert.
        self._own = {len(each.timestep): experts.split(each) for each in (first_steps, steps)}
        #: The experts that take steps, the highest noise level first.
        self.numbers = tuple(sorted({number for own in self._own.values() for number in own}))
        self._warned = False

    @property
    def alone(self) -> bool:
        """Whether one transformer takes all steps."""
        return len(self.numbers) == 1

    def init_state(self, batch: int, *, height: int, width: int) -> Any:
        """Before the first chunk; the latents' height and width.

        Raises:
            RehyatError: a transformer cannot stream.
        """
        own = self._own[self._steps]

        def of(number: int) -> States:
            return rollout.init_state(
                self._experts.members[number].outline,
                self._samplers[number],
                num_steps=len(own[number].timestep) if number in own else 1,
                batch=batch,
                height=height,
                width=width,
            )

        return self._joined([of(number) for number in self.numbers])

    def state_specs(self, states: Any) -> Any:
        """How states are sharded over the mesh in force."""
        parts = zip(self.numbers, self._parted(states), strict=True)
        return self._joined([self._experts.members[n].outline.state_specs(part, leading=2) for n, part in parts])

    def precompute_text_kv(self, text: Padded, image: Array | None) -> Any:
        """The prompts, and an image's features, as `denoise` takes them."""

        def of(number: int) -> Padded:
            split, used = self._split(number), self._samplers[number].guidance.evaluations
            mine = Padded(text.values[:used], text.tokens)
            return programs.precompute_text_kv(split.weights, mine, image, graph=split.graph)

        return self._joined([of(number) for number in self.numbers])

    def denoise(
        self,
        states: Any,
        keys: Key[Array, " B"],
        text_kv: Any,
        first_frame: Int[Array, ""],
        steps: SamplingSteps,
        condition: Condition,
        *,
        shape: Shape,
    ) -> tuple[Float[Array, "B T h w z"], Any]:
        """The next chunk and the states after it; ``states`` are donated."""
        if self.alone:
            split, sampler = self._split(self.numbers[0]), self._samplers[self.numbers[0]]
            return programs.denoise_chunk(
                split.weights,
                states,
                keys,
                text_kv,
                first_frame,
                steps,
                condition,
                graph=split.graph,
                shape=shape,
                sampler=sampler,
            )
        after, texts = dict(zip(self.numbers, states, strict=True)), dict(zip(self.numbers, text_kv, strict=True))
        state = programs.begin_chunk(keys, first_frame, shape=shape, sampler=self._samplers[0])
        for number, own in self._own[len(steps.timestep)].items():
            split = self._split(number)
            state, after[number] = programs.advance_chunk(
                split.weights,
                after[number],
                state,
                keys,
                texts[number],
                first_frame,
                own,
                condition,
                graph=split.graph,
                sampler=self._samplers[number],
            )
        latents, states = condition.finished(state.latents), tuple(after[number] for number in self.numbers)
        if self._samplers[0].context_noise != "steps":
            states = self.commit(states, latents, keys, text_kv, first_frame, steps, condition)
        self._warn_of_reading()
        return latents, states

    def commit(
        self,
        states: Any,
        latents: Float[Array, "B T h w z"],
        keys: Key[Array, " B"],
        text_kv: Any,
        first_frame: Int[Array, ""],
        steps: SamplingSteps,
        condition: Condition,
    ) -> Any:
        """The states after a chunk that is given or finished; ``states`` are donated."""
        own, made = self._own[len(steps.timestep)], []
        # The transformer that took the last steps is on the device; so it comes first.
        order = list(zip(self.numbers, self._parted(states), self._parted(text_kv), strict=True))[::-1]
        for number, state, text in order:
            split = self._split(number)
            made.append(
                programs.commit_chunk(
                    split.weights,
                    state,
                    latents,
                    keys,
                    text,
                    first_frame,
                    own.get(number, steps),  # which counts only where every step has its states
                    condition,
                    graph=split.graph,
                    context_noise=self._samplers[number].context_noise,
                )
            )
        return self._joined(made[::-1])

    def _split(self, number: int) -> Split:
        return self._experts.held_as(number)

    def _joined(self, parts: Sequence[Any]) -> Any:
        return parts[0] if self.alone else tuple(parts)

    def _parted(self, of: Any) -> Sequence[Any]:
        return (of,) if self.alone else of

    def _warn_of_reading(self) -> None:
        if len(self._experts.held) < len(self.numbers) and not self._warned:
            self._warned = True
            names = " and ".join(self._experts.members[number].name for number in self.numbers)
            warnings.warn(
                f"the device has no room for {names} together: each chunk reads them from the disk again",
                RehyatWarning,
                stacklevel=6,
            )
