"""The programs of a distillation: a round of learning, and a measurement over whole trajectories."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
from train.data.trajectories import Sampling
from train.engine.optimizer import OptimizerConfig, TrainState
from train.parallel.devices import Devices
from train.stages.attention_loss import LossName
from train.stages.blockwise import Figures, Seen, Visit, draw_order, error, learn, measure, observe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """Everything that the programs are made of but the arrays; shapes do in their place."""

    config: WanConfig
    mixing: Mixing
    #: The graph of the teacher, and of each converted group's mixer.
    teacher: Any
    graphs: Sequence[Any]
    sampling: Sampling
    optimizer: OptimizerConfig
    loss: LossName
    updates_per_point: int
    minibatches: int
    devices: Devices

    @property
    def _chunk(self) -> int:
        """Latent frames that are whole chunks of every converted block."""
        return self.mixing.whole_chunks * self.config.patch_size[0]

    def _tokens(self, shape: tuple[int, ...]) -> int:
        return math.prod(side // patch for side, patch in zip(shape[:3], self.config.patch_size, strict=True))

    def lower(
        self, inputs: Inputs, blocks: PyTree, carried: PyTree, teacher: PyTree, *, shape: tuple[int, ...]
    ) -> jax.stages.Lowered:
        """A round: from the blocks, the inputs' state, the teacher, the inputs' frozen part, a turn, a key and the
        learning rate, to the blocks, the inputs' state after it, and the losses of all converted blocks in order.

        Args:
            blocks: every converted group's blocks that learn, as `Mixing.joined` has them; None for a group that has
                nothing to learn.
            shape: of the latents.
        """
        tokens, devices = self._tokens(shape), self.devices

        def learner(
            blocks: PyTree, carried: PyTree, teacher: PyTree, frozen: PyTree, turn: PyTree, key: Array, rate: Array
        ) -> tuple[PyTree, PyTree, Array]:
            carried, points = inputs.points(carried, turn, frozen)
            order = draw_order(
                key,
                rows=points.latents.shape[0],
                tokens=tokens,
                passes=self.updates_per_point,
                parts=self.minibatches,
            )

            def visit(graph: Any) -> Visit:
                def visit(block: TrainState | None, seen: Seen, frame: int) -> tuple[TrainState | None, Array]:
                    if block is None:
                        mixer = nnx.merge(graph, nnx.State({}))
                        return None, error(mixer, seen, frame=frame, tokens=tokens)
                    return learn(
                        block,
                        seen,
                        order,
                        rate,
                        graph=graph,
                        frame=frame,
                        loss=self.loss,
                        optimizer=self.optimizer,
                        tokens=tokens,
                    )

                return visit

            velocity, given = observe(
                nnx.merge(self.teacher, teacher),
                points,
                [visit(graph) for graph in self.graphs],
                self.mixing.parted(blocks),
                mixing=self.mixing,
                chunk=self._chunk,
                text_tokens=TEXT_LENGTH,
            )
            after, errors = self.mixing.joined([b for b, _ in given]), self.mixing.in_order([e for _, e in given])
            return after, inputs.after(carried, turn, frozen, velocity), errors

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
        """From the blocks' parameters (by group, `Mixing.joined`), the teacher, and prompts' embeddings, to `Figures`
        over [step, block], all converted blocks in order."""
        sampling, table, tokens = self.sampling, self.sampling.table, self._tokens(shape)

        def measurer(params: PyTree, teacher: PyTree, text: Array, negative: Array) -> Figures:
            model, count = nnx.merge(self.teacher, teacher), len(text)
            begun = sampling.begin(round_key(0, 0), jnp.arange(count, dtype=jnp.int32), text, shape=shape)

            def visit(graph: Any) -> Visit:
                def visit(params: PyTree, seen: Seen, frame: int) -> Figures:
                    return measure(params, seen, graph=graph, frame=frame, tokens=tokens)

                return visit

            def step(rollouts: PyTree, place: Array) -> tuple[PyTree, Figures]:
                steps = table.at(jnp.full(count, place))
                points = sampling.points(rollouts, steps, negative)
                velocity, figures = observe(
                    model,
                    points,
                    [visit(graph) for graph in self.graphs],
                    self.mixing.parted(params),
                    mixing=self.mixing,
                    chunk=self._chunk,
                    text_tokens=TEXT_LENGTH,
                )
                return sampling.advance(rollouts, steps, velocity), self.mixing.in_order(figures)

            return jax.lax.scan(step, begun, jnp.arange(sampling.num_steps, dtype=jnp.int32))[1]

        return self.devices.lower(measurer, params, teacher, text, negative, out=self.devices.whole)
