"""Two ways to take a video through its denoising steps: all frames at each step, or all steps at each chunk of frames.

- **per step** (ReHyAt, arXiv 2601.04342): every step runs the transformer over the whole video. Any mixture of blocks.
- **per chunk**: a chunk goes through all steps before the next one starts. What the transformer carries from chunk to
  chunk is kept once for each step and each of guidance's evaluations, because a chunk at one noise level follows the
  chunk before it at that same level. For a model whose blocks are all causal the two are the same function; this one
  needs memory for one chunk and the states, however long the video.

How a chunk is committed to the states is a choice of the second: at every step's own noise level, or once, when it is
finished, with context noise (`ContextNoise`).

All but `per_step`, which is a loop on the host so that progress can be shown, is to be called inside jit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.mesh import mesh_in_force
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.guidance import Guidance, Velocity
from rehyat_jax.sampling.noise import ChunkNoise, Shape
from rehyat_jax.sampling.rows import zeros
from rehyat_jax.sampling.schedule import SamplingSteps
from rehyat_jax.sampling.shown import LatentsSeen, OnLatents, check_finite, replacement
from rehyat_jax.sampling.solvers import Solver
from rehyat_jax.sampling.text import Padded

#: The transformer's stream states: every leaf is ``[steps, evaluations, …]``, see `init_state`.
States: TypeAlias = PyTree[Array]

#: The noise level at which later chunks see a chunk. ``"steps"``: every step's own, one state each, which makes the
#: video of a per-step sweep. A level from 0 to below 1: a chunk is committed once, when it is finished, with so much
#: noise (0: as it is), one state for all steps. That needs a model that was trained so (Diffusion Forcing, arXiv
#: 2407.01392; Self-Forcing, arXiv 2506.08009): its states are as many times smaller as there are steps.
ContextNoise: TypeAlias = Literal["steps"] | float


@runtime_checkable
class Transformer(Protocol):
    """What sampling asks of a transformer; `rehyat_jax.models.wan.transformer.WanTransformer` says what each means."""

    config: Any
    dtype: Any

    def __call__(self, latents: Array, timesteps: Array, text: Array, *, text_tokens: int | None) -> Array: ...

    def why_not_stream(self) -> str | None: ...

    def chunk_frames(self) -> int: ...

    def init_state(self, batch: int, height: int, width: int) -> Any: ...

    def state_specs(self, states: Any, *, leading: int) -> Any: ...

    def precompute_text_kv(self, text: Array, text_tokens: int | None, image: Array | None = None) -> Any: ...

    def stream(
        self,
        latents: Array,
        timesteps: Array,
        text: Any,
        state: Any,
        *,
        first_frame: int | Int[Array, ""],
        text_tokens: int | None,
    ) -> tuple[Array, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the steps are taken: what a program is compiled for, beside shapes."""

    solver: Solver
    guidance: Guidance
    context_noise: ContextNoise = "steps"
    #: `FlowSchedule.noise_scale`.
    noise_scale: float = 1.0

    def scaled(self, noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """What the solver begins with, from standard normal noise."""
        return noise if self.noise_scale == 1 else noise * self.noise_scale


class Recorded(NamedTuple):
    """A chunk that was made, and how."""

    latents: Float[Array, "B T h w z"]
    #: After it.
    states: States
    #: What each step began with.
    inputs: Float[Array, "steps B T h w z"]


def check_context_noise(value: Any) -> ContextNoise:
    """
    Raises:
        ConfigError: there is no such way to commit; users know it as ``remember``.
    """
    if value == "steps" or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1):
        return value
    raise ConfigError(f'remember must be "steps" or a noise level from 0 to below 1, not {str(value)[:80]!r}')


def sampling_step(
    velocity: Velocity, state: Any, *, step: SamplingSteps, solver: Solver, noise: ChunkNoise | None = None
) -> Any:
    """One denoising step: from the solver's state to its next one; ``step`` is a row of the sampling steps.

    Args:
        noise: the video's, of which a stochastic solver takes the step's.
    """
    latents = state.latents
    t = jnp.broadcast_to(jnp.asarray(step.timestep, jnp.float32), latents.shape[:1])
    fresh = noise.fresh(_shape(latents), step.number) if solver.stochastic and noise is not None else None
    return solver.step(state, velocity(latents, t), coefficients=step.coefficients, noise=fresh)


def per_step(
    advance: Callable[[Any, SamplingSteps], Any],
    noise: Float[Array, "B *shape"],
    *,
    steps: SamplingSteps,
    solver: Solver,
    on_step: Callable[[int], None] = lambda done: None,
    on_latents: OnLatents | None = None,
) -> Float[Array, "B *shape"]:
    """Latents from standard normal noise, all frames at each step: a loop on the host.

    Args:
        advance: from the solver's state and a row of the steps to its next one; a compiled `sampling_step`, to which
            the state is donated.
        on_step: called with the steps done, each when its result is there.
        on_latents: called after each step; what it returns takes the latents' place.

    Raises:
        NotFiniteError: what a step made is not finite.
        RehyatError: as `replacement`.
    """
    # Copies: the noise is the caller's, and a solver may begin with one buffer twice.
    state = jax.tree.map(jnp.copy, solver.init(noise))
    total = len(steps.timestep)
    for number in range(total):
        state = advance(state, steps.at(number))
        check_finite(state.latents, f"denoising step {number + 1} of {total}")
        if on_latents is not None:
            seen = LatentsSeen(np.array(state.latents), first_frame=0, step=number + 1, steps=total)
            state = state._replace(latents=replacement(on_latents(seen), state.latents))
        on_step(number + 1)
    return state.latents


def init_state(model: Transformer, sampler: Sampler, *, num_steps: int, batch: int, height: int, width: int) -> States:
    """The states before a video's first chunk: the model's own under leading axes of steps and guidance's evaluations.

    Args:
        num_steps: of a chunk; where chunks are committed once there is one state for all of them.
        height, width: of the latents.

    Raises:
        RehyatError: the model cannot stream, or height or width is not a multiple of the patch.
    """
    leading = num_steps if sampler.context_noise == "steps" else 1, sampler.guidance.evaluations
    state = jax.eval_shape(lambda: model.init_state(batch, height, width))
    return sharded(model, zeros(jax.tree.map(lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype), state)))


def sharded(model: Transformer, states: States) -> States:
    """The states under the sharding constraints of the mesh in force."""
    if mesh_in_force() is None:
        return states
    return jax.tree.map(jax.lax.with_sharding_constraint, states, model.state_specs(states, leading=2))


def precompute_text_kv(model: Transformer, text: Padded, image: Float[Array, "B L D"] | None = None) -> Padded:
    """What every step of every chunk sees of the prompts: the model's text keys and values for each evaluation; and of
    an image's features, for models that attend to them."""
    more = {} if image is None else {"image": image}
    return Padded(
        jax.lax.map(lambda row: model.precompute_text_kv(row, text_tokens=text.tokens, **more), text.values),
        text.tokens,
    )


def denoise_chunk(
    model: Transformer,
    states: States,
    noise: ChunkNoise,
    text_kv: Padded,
    *,
    shape: Shape,
    first_frame: int | Int[Array, ""],
    steps: SamplingSteps,
    sampler: Sampler,
    condition: Condition | None = None,
) -> tuple[Float[Array, "B T h w z"], States]:
    """One chunk through all steps: its latents, and the states after it.

    The states are carried through the loop and each is replaced where it lies: beside them all, memory holds two
    versions of the one that is being replaced. They should be donated by a caller's jit.

    Args:
        states: `init_state`', or those that came with the chunk before.
        noise: of the chunk's frames; the solver starts afresh with it.
        text_kv: `precompute_text_kv`'s; other prompts' from chunk to chunk, if one likes.
        shape: of the latents; a chunk shorter than the model's ends the video.
        first_frame: the chunk's first latent frame, counted from the video's beginning; may be traced.
        condition: of this chunk.

    Raises:
        RehyatError: the model cannot stream.
    """
    made = recorded_chunk(
        model,
        states,
        noise,
        text_kv,
        shape=shape,
        first_frame=first_frame,
        steps=steps,
        sampler=sampler,
        condition=condition,
    )
    return made.latents, made.states


def recorded_chunk(
    model: Transformer,
    states: States,
    noise: ChunkNoise,
    text_kv: Padded,
    *,
    shape: Shape,
    first_frame: int | Int[Array, ""],
    steps: SamplingSteps,
    sampler: Sampler,
    condition: Condition | None = None,
) -> Recorded:
    """`denoise_chunk`, and what each of its steps began with: for training on a model's own videos."""
    condition = Condition() if condition is None else condition
    how: Any = {"first_frame": first_frame, "sampler": sampler, "condition": condition}
    state, states, inputs = advance_chunk(
        model, states, sampler.solver.init(sampler.scaled(noise.initial(shape))), noise, text_kv, steps=steps, **how
    )
    latents = condition.finished(state.latents)
    if sampler.context_noise != "steps":
        chunk = _Chunk(model, text_kv, first_frame, condition)
        states = chunk.commit(states, latents, noise, level=sampler.context_noise)
    return Recorded(latents, states, inputs)


def advance_chunk(
    model: Transformer,
    states: States,
    state: Any,
    noise: ChunkNoise,
    text_kv: Padded,
    *,
    first_frame: int | Int[Array, ""],
    steps: SamplingSteps,
    sampler: Sampler,
    condition: Condition,
) -> tuple[Any, States, Float[Array, "steps B T h w z"]]:
    """A chunk through some of its steps in a row, all or those of one expert: the solver's state after them, the model
    states, and what each step began with. Where every step has a state of its own, ``states`` are of these steps.

    Args:
        state: the solver's, before them.
    """
    chunk, solver = _Chunk(model, text_kv, first_frame, condition), sampler.solver
    commits_once, shape = sampler.context_noise != "steps", _shape(state.latents)
    steps = jax.tree.map(jnp.asarray, steps)

    def step(carry: tuple[Any, States], row: SamplingSteps) -> tuple[tuple[Any, States], Array]:
        state, states = carry
        place = jnp.zeros((), jnp.int32) if commits_once else row.number - steps.number[0]
        states, velocities = chunk.forward(states, state.latents, row.timestep, place=place, commit=not commits_once)
        fresh = noise.fresh(shape, row.number) if solver.stochastic else None
        velocity = sampler.guidance.combine(list(velocities))
        after = solver.step(state, velocity, coefficients=row.coefficients, noise=fresh)
        return (after, states), state.latents

    (state, states), inputs = jax.lax.scan(step, (state, states), steps)
    return state, states, inputs


def commit_chunk(
    model: Transformer,
    states: States,
    latents: Float[Array, "B T h w z"],
    noise: ChunkNoise,
    text_kv: Padded,
    *,
    first_frame: int | Int[Array, ""],
    steps: SamplingSteps,
    context_noise: ContextNoise,
    condition: Condition | None = None,
) -> States:
    """The states after a chunk that is given and not made, as `denoise_chunk` would leave them: of a video's prefix.

    With ``"steps"`` every step sees it on the straight line between its noise and its latents. Other arguments and
    errors as of `denoise_chunk`.
    """
    chunk = _Chunk(model, text_kv, first_frame, Condition() if condition is None else condition)
    if context_noise != "steps":
        return chunk.commit(states, latents, noise, level=context_noise)
    initial, steps = noise.initial(_shape(latents)), jax.tree.map(jnp.asarray, steps)

    def step(states: States, row: SamplingSteps) -> tuple[States, None]:
        seen = _noisy(latents, initial, jnp.asarray(row.timestep, jnp.float32) / 1000)
        return chunk.forward(states, seen, row.timestep, place=row.number - steps.number[0], commit=True)[0], None

    return jax.lax.scan(step, states, steps)[0]


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A model at one chunk of a video, under its prompts."""

    model: Transformer
    text_kv: Padded
    first_frame: int | Int[Array, ""]
    condition: Condition = Condition()

    def forward(
        self, states: States, latents: Array, timestep: Any, *, place: Any, commit: bool
    ) -> tuple[States, Array]:
        """The velocity of each of guidance's evaluations, one after the other, from the states of a place (a number)
        among the steps; these stay as they are, or are replaced by those after the chunk."""
        x, t = self.condition.seen(latents, jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), latents.shape[:1]))
        x = x.astype(self.model.dtype)

        def evaluate(states: States, each: tuple[Int[Array, ""], Any]) -> tuple[States, Array]:
            evaluation, prompt = each
            mine = jax.tree.map(lambda s: _at(s, place, evaluation), states)
            velocity, mine = self.model.stream(
                x, t, prompt, mine, first_frame=self.first_frame, text_tokens=self.text_kv.tokens
            )
            if commit:
                states = jax.tree.map(lambda s, new: _replaced(s, new, place, evaluation), states, mine)
            return states, velocity.astype(latents.dtype)

        prompts = self.text_kv.values
        numbers = jnp.arange(len(jax.tree.leaves(prompts)[0]), dtype=jnp.int32)
        return jax.lax.scan(evaluate, states, (numbers, prompts))

    def commit(self, states: States, latents: Array, noise: ChunkNoise, *, level: Any) -> States:
        """The one state of all steps after the finished chunk, seen with so much context noise."""
        seen = _noisy(latents, noise.context(_shape(latents)), level)
        return self.forward(states, seen, 1000 * level, place=jnp.zeros((), jnp.int32), commit=True)[0]


def _shape(latents: Float[Array, "B T h w z"]) -> Shape:
    _, frames, height, width, channels = latents.shape
    return frames, height, width, channels


def _noisy(latents: Array, noise: Array, level: Any) -> Array:
    return (1 - level) * latents + level * noise


def _at(states: Array, step: Int[Array, ""], evaluation: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_slice(states, _corner(states, step, evaluation), (1, 1, *states.shape[2:]))[0, 0]


def _replaced(states: Array, new: Array, step: Int[Array, ""], evaluation: Int[Array, ""]) -> Array:
    """In place where XLA owns ``states``, as it does a loop's carry."""
    return jax.lax.dynamic_update_slice(states, new[None, None], _corner(states, step, evaluation))


def _corner(states: Array, step: Int[Array, ""], evaluation: Int[Array, ""]) -> tuple[Int[Array, ""], ...]:
    return (step, evaluation, *(jnp.zeros((), jnp.int32) for _ in states.shape[2:]))
