"""The programs of a distillation: a round of learning, and a measurement over whole trajectories."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from train.data.clips import round_key
from train.data.sources import Inputs
from train.data.trajectories import Sampling
from train.engine.optimizer import OptimizerConfig, TrainState
from train.parallel.devices import Devices
from train.stages.blockwise import Figures, Seen, draw_order, learn, measure, observe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """Everything that the programs are made of but the arrays; shapes do in their place."""

    config: WanConfig
    hybrid: HybridConfig
    #: Of the teacher, and of the blocks' `HybridAttention`.
    teacher: Any
    graph: Any
    sampling: Sampling
    optimizer: OptimizerConfig
    loss: Literal["l1", "score"]
    updates_per_point: int
    minibatches: int
    devices: Devices

    @property
    def _converted(self) -> tuple[bool, ...]:
        return self.hybrid.converted(self.config.num_layers)

    @property
    def _chunk(self) -> int:
        return self.hybrid.chunk_frames * self.config.patch_size[0]

    def _tokens(self, shape: tuple[int, ...]) -> int:
        return math.prod(side // patch for side, patch in zip(shape[:3], self.config.patch_size, strict=True))

    def lower(
        self, inputs: Inputs, blocks: TrainState, carried: PyTree, teacher: PyTree, *, shape: tuple[int, ...]
    ) -> jax.stages.Lowered:
        """A round: from the blocks, what the inputs carry, the teacher, what the inputs do not change, a turn, a key
        and the learning rate, to the blocks, what is carried on, and the blocks' losses. ``shape``: of the latents."""
        tokens, devices = self._tokens(shape), self.devices

        def learner(
            blocks: TrainState, carried: PyTree, teacher: PyTree, frozen: PyTree, turn: PyTree, key: Array, rate: Array
        ) -> tuple[TrainState, PyTree, Array]:
            carried, points = inputs.points(carried, turn, frozen)
            order = draw_order(
                key,
                rows=points.latents.shape[0],
                tokens=tokens,
                passes=self.updates_per_point,
                parts=self.minibatches,
            )

            def visit(block: TrainState, seen: Seen, frame: int) -> tuple[TrainState, Array]:
                return learn(
                    block,
                    seen,
                    order,
                    rate,
                    graph=self.graph,
                    frame=frame,
                    loss=self.loss,
                    optimizer=self.optimizer,
                    tokens=tokens,
                )

            model = nnx.merge(self.teacher, teacher)
            velocity, (blocks, errors) = observe(
                model, points, visit, blocks, converted=self._converted, chunk=self._chunk, text_tokens=TEXT_LENGTH
            )
            return blocks, inputs.after(carried, turn, frozen, velocity), errors

        cut, carrying, turn = (
            devices.parameter_shardings(blocks),
            devices.batch_shardings(carried),
            inputs.turn_shapes(),
        )
        return devices.lower(
            learner,
            devices.described(blocks, cut),
            devices.described(carried, carrying),
            devices.described(teacher, devices.parameter_shardings(teacher)),
            devices.described(inputs.frozen, devices.whole),
            devices.described(turn, devices.batch_shardings(turn)),
            *devices.described((round_key(0, 0), jnp.float32(0)), devices.whole),
            donate=(0, 1),
            out=(cut, carrying, devices.whole),
        )

    def lower_measurer(
        self, params: PyTree, teacher: PyTree, text: Array, negative: Array, *, shape: tuple[int, ...]
    ) -> jax.stages.Lowered:
        """From the blocks' parameters, the teacher, and prompts' embeddings, to `Figures` over [step, block]."""
        sampling, table, tokens = self.sampling, self.sampling.table, self._tokens(shape)

        def measurer(params: PyTree, teacher: PyTree, text: Array, negative: Array) -> Figures:
            model, count = nnx.merge(self.teacher, teacher), len(text)
            begun = sampling.begin(round_key(0, 0), jnp.arange(count, dtype=jnp.int32), text, shape=shape)

            def visit(params: PyTree, seen: Seen, frame: int) -> Figures:
                return measure(params, seen, graph=self.graph, frame=frame, tokens=tokens)

            def step(rollouts: PyTree, place: Array) -> tuple[PyTree, Figures]:
                steps = table.at(jnp.full(count, place))
                points = sampling.points(rollouts, steps, negative)
                velocity, figures = observe(
                    model, points, visit, params, converted=self._converted, chunk=self._chunk, text_tokens=TEXT_LENGTH
                )
                return sampling.advance(rollouts, steps, velocity), figures

            return jax.lax.scan(step, begun, jnp.arange(sampling.num_steps, dtype=jnp.int32))[1]

        return self.devices.lower(measurer, params, teacher, text, negative, out=self.devices.whole)
