"""The programs of a distillation: a round of learning, and a measurement over whole trajectories."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.mixing import Mixing
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.clips import round_key
from train.data.sources import Inputs
from train.data.trajectories import Trajectories
from train.engine.optimizer import OptimizerConfig, TrainState
from train.engine.stage import Models, RoundFunction, State
from train.stages.attending import Attending, WholeVideo
from train.stages.attention_loss import LossName
from train.stages.blockwise import Figures, Seen, Visit, draw_order, error, learn, measure, observe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """Everything that the programs are made of but the networks."""

    config: WanConfig
    mixing: Mixing
    sampling: Trajectories
    optimizer: OptimizerConfig
    loss: LossName
    updates_per_point: int
    minibatches: int
    attending: Attending = WholeVideo()

    @property
    def roles(self) -> list[str]:
        """Of the converted groups' mixers, in the order of `Mixing.parted`."""
        return [f"mixers-{number}" for number in range(len(self.mixing.converted_groups))]

    @property
    def _chunk(self) -> int:
        """Latent frames that are whole chunks of every converted block."""
        return self.mixing.whole_chunks * self.config.patch_size[0]

    def _tokens(self, shape: tuple[int, ...]) -> int:
        return math.prod(side // patch for side, patch in zip(shape[:3], self.config.patch_size, strict=True))

    def round(self, inputs: Inputs, place: int, *, shape: tuple[int, ...]) -> RoundFunction:
        """The teacher's forward pass on the inputs' points, each block's optimiser steps on what it saw there, and what
        the inputs carry on; with the losses of all converted blocks in order.

        Args:
            place: of what they carry in the state.
            shape: of their latents.
        """
        tokens = self._tokens(shape)

        def function(
            state: State, models: Models, frozen: PyTree, host: PyTree, rates: Mapping[str, Array]
        ) -> tuple[State, dict[str, Array]]:
            host_batch, key = host
            carried, points = inputs.points(state.carried[place], host_batch, frozen, models["teacher"])
            order = draw_order(
                key,
                rows=points.latents.shape[0] // self.attending.rows,
                tokens=tokens,
                passes=self.updates_per_point,
                parts=self.minibatches,
            )

            def visit(role: str) -> Visit:
                graph = nnx.graphdef(models[role])

                def visit(block: TrainState | None, seen: Seen, frame: int) -> tuple[TrainState | None, Array]:
                    if block is None:
                        mixer = nnx.merge(graph, nnx.State({}))
                        return None, error(mixer, seen, frame=frame, tokens=tokens, attending=self.attending)
                    return learn(
                        block,
                        seen,
                        order,
                        rates[role],
                        graph=graph,
                        frame=frame,
                        loss=self.loss,
                        optimizer=self.optimizer,
                        tokens=tokens,
                        attending=self.attending,
                    )

                return visit

            velocity, given = observe(
                models["teacher"],
                points,
                [visit(role) for role in self.roles],
                [state.learners.get(role) for role in self.roles],
                numbers=self.mixing.numbers,
                chunk=self._chunk,
                text_tokens=TEXT_LENGTH,
                attending=self.attending,
            )
            learners = {role: block for role, (block, _) in zip(self.roles, given, strict=True) if block is not None}
            carried = inputs.after(carried, host_batch, frozen, velocity)
            everything = (*state.carried[:place], carried, *state.carried[place + 1 :])
            return State(state.step, learners, everything), {"loss": self.mixing.in_order([e for _, e in given])}

        return function

    def measure(self, *, shape: tuple[int, ...]) -> Callable[[Models, PyTree, PyTree], Figures]:
        """`Figures` over [step, block], all converted blocks in order, of whole trajectories of ``{"text",
        "negative", "given"}``'s prompts and clips."""
        sampling, tokens = self.sampling, self._tokens(shape)

        def function(models: Models, frozen: PyTree, _: PyTree) -> Figures:
            teacher, text = models["teacher"], frozen["text"]
            numbers = jnp.arange(len(text), dtype=jnp.int32)
            begun = sampling.begin(round_key(0, 0), numbers, text, shape=shape, given=frozen["given"])
            groups: list[tuple[Any, PyTree]] = [nnx.split(models[role]) for role in self.roles]

            def visit(graph: Any) -> Visit:
                def visit(params: PyTree, seen: Seen, frame: int) -> Figures:
                    return measure(params, seen, graph=graph, frame=frame, tokens=tokens, attending=self.attending)

                return visit

            def step(rollouts: PyTree, place: Array) -> tuple[PyTree, Figures]:
                points = sampling.points_at(rollouts, place, frozen["negative"], teacher, shape=shape)
                velocity, figures = observe(
                    teacher,
                    points,
                    [visit(graph) for graph, _ in groups],
                    [params for _, params in groups],
                    numbers=self.mixing.numbers,
                    chunk=self._chunk,
                    text_tokens=TEXT_LENGTH,
                    attending=self.attending,
                )
                return sampling.after(rollouts, place, velocity), self.mixing.in_order(figures)

            return jax.lax.scan(step, begun, jnp.arange(sampling.num_steps, dtype=jnp.int32))[1]

        return function
