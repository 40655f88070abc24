"""The compiled programs of a transformer: a denoising step, text keys and values, a chunk made, a chunk given.

Each takes a module as its graph and its weights (``nnx.split``), so that one compilation serves any weights. What a
program hands on to its next call is donated: its buffers are reused.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Int, Key

from rehyat_jax.runtime.mesh import mesh_in_force, replicated
from rehyat_jax.runtime.platform import inference_jit
from rehyat_jax.sampling import rollout
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.guidance import guided_velocity
from rehyat_jax.sampling.noise import ChunkNoise, Shape
from rehyat_jax.sampling.rollout import ContextNoise, Sampler, States
from rehyat_jax.sampling.rows import stacked, unstacked
from rehyat_jax.sampling.schedule import SamplingSteps
from rehyat_jax.sampling.text import Padded


@inference_jit(static_argnames=("graph", "sampler"), donate_argnames="state")
def denoise_step(
    weights: Any,
    state: Any,
    step: SamplingSteps,
    text: Padded,
    condition: Condition | None = None,
    keys: Key[Array, " B"] | None = None,
    *,
    graph: Any,
    sampler: Sampler,
) -> Any:
    """A whole video from one noise level to the next; ``keys`` are of the noise that a stochastic solver takes."""
    model = nnx.merge(graph, weights)
    padded = partial(model, text_tokens=text.tokens)
    velocity = guided_velocity(padded, text.values, guidance=sampler.guidance, dtype=model.dtype, condition=condition)
    noise = None if keys is None else ChunkNoise(keys)
    # Latents are small; all that is large is sharded within the model.
    return replicated(rollout.sampling_step(velocity, state, step=step, solver=sampler.solver, noise=noise))


@inference_jit(static_argnames="graph")
def precompute_text_kv(weights: Any, text: Padded, image: Array | None = None, *, graph: Any) -> Padded:
    """The prompts as a chunk takes them, and an image's features: once a prompt, not once a chunk."""
    return rollout.precompute_text_kv(nnx.merge(graph, weights), text, image)


@inference_jit(static_argnames=("graph", "shape", "sampler"), donate_argnames="states")
def denoise_chunk(
    weights: Any,
    states: States,
    keys: Key[Array, " B"],
    text_kv: Padded,
    first_frame: Int[Array, ""],
    steps: SamplingSteps,
    condition: Condition | None = None,
    *,
    graph: Any,
    shape: Shape,
    sampler: Sampler,
) -> tuple[Array, States]:
    """A chunk from its noise to its latents: one program for every chunk of a video."""
    model = nnx.merge(graph, weights)
    latents, states = rollout.denoise_chunk(
        model,
        states,
        ChunkNoise(keys, first_frame),
        text_kv,
        shape=shape,
        first_frame=first_frame,
        steps=steps,
        sampler=sampler,
        condition=condition,
    )
    return replicated(latents), rollout.sharded(model, states)


@inference_jit(static_argnames=("shape", "sampler"))
def begin_chunk(keys: Key[Array, " B"], first_frame: Int[Array, ""], *, shape: Shape, sampler: Sampler) -> Any:
    """The solver's state before a chunk."""
    return replicated(sampler.solver.init(sampler.scaled(ChunkNoise(keys, first_frame).initial(shape))))


@inference_jit(static_argnames=("graph", "sampler"), donate_argnames=("states", "state"))
def advance_chunk(
    weights: Any,
    states: States,
    state: Any,
    keys: Key[Array, " B"],
    text_kv: Padded,
    first_frame: Int[Array, ""],
    steps: SamplingSteps,
    condition: Condition,
    *,
    graph: Any,
    sampler: Sampler,
) -> tuple[Any, States]:
    """A chunk through the steps of one of several transformers: the solver's state, and the transformer's."""
    model = nnx.merge(graph, weights)
    state, states, _ = rollout.advance_chunk(
        model,
        states,
        state,
        ChunkNoise(keys, first_frame),
        text_kv,
        first_frame=first_frame,
        steps=steps,
        sampler=sampler,
        condition=condition,
    )
    return replicated(state), rollout.sharded(model, states)


class Row(NamedTuple):
    """What a chunk of one of several streams is made of, beside its states."""

    keys: Key[Array, " B"]
    text_kv: Padded
    first_frame: Int[Array, ""]


@inference_jit(static_argnames=("graph", "shape", "sampler"), donate_argnames="states")
def denoise_chunks(
    weights: Any,
    states: tuple[States, ...],
    rows: tuple[Row, ...],
    steps: SamplingSteps,
    *,
    graph: Any,
    shape: Shape,
    sampler: Sampler,
) -> tuple[Array, tuple[States, ...]]:
    """As `denoise_chunk`, a chunk of each of several streams that stand at different frames: latents [rows, B, …]."""
    model = nnx.merge(graph, weights)

    def one(states: States, row: Row) -> tuple[Array, States]:
        noise = ChunkNoise(row.keys, row.first_frame)
        how: dict[str, Any] = {"shape": shape, "first_frame": row.first_frame, "steps": steps, "sampler": sampler}
        return rollout.denoise_chunk(model, states, noise, row.text_kv, **how)

    # Over data each device has some of the streams.
    latents, after = jax.vmap(one, spmd_axis_name=_axis_of(len(states)))(stacked(states), stacked(rows))
    return replicated(latents), tuple(rollout.sharded(model, each) for each in unstacked(after, len(states)))


def _axis_of(streams: int) -> str | None:
    mesh = mesh_in_force()
    return "data" if mesh is not None and mesh.shape["data"] > 1 and streams % mesh.shape["data"] == 0 else None


@inference_jit(static_argnames=("graph", "context_noise"), donate_argnames="states")
def commit_chunk(
    weights: Any,
    states: States,
    latents: Array,
    keys: Key[Array, " B"],
    text_kv: Padded,
    first_frame: Int[Array, ""],
    steps: SamplingSteps,
    condition: Condition | None = None,
    *,
    graph: Any,
    context_noise: ContextNoise,
) -> States:
    """The states after a chunk of a video's prefix, which is given."""
    model = nnx.merge(graph, weights)
    states = rollout.commit_chunk(
        model,
        states,
        latents,
        ChunkNoise(keys, first_frame),
        text_kv,
        first_frame=first_frame,
        steps=steps,
        context_noise=context_noise,
        condition=condition,
    )
    return rollout.sharded(model, states)
