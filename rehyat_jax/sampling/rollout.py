"""Two ways to walk a video through its denoising steps: all frames at each step, or all steps at each chunk of frames.

- **per step** (ReHyAt, arXiv 2601.04342): every step runs the transformer over the whole video. Any mixture of blocks.
- **per chunk**: a chunk goes through all steps before the next one starts. What the transformer carries from chunk to
  chunk is kept once for each step and guidance branch, because a chunk at one noise level follows the chunk before it
  at that same level. For a model whose blocks are all causal hybrids the two are the same function; this one needs
  memory for one chunk and the states, however long the video.

What a chunk is remembered as is a choice of the second sweep: at every step's own noise level, or once, when it is
finished (`Remember`).

Noise belongs to a latent frame: it is drawn from the video's key and the frame's number alone, so that neither the
length of a video nor its chunks change it, and both sweeps begin with the same.

The sweeps are to be called inside jit.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.wan.block import TextKV
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.sampling.guidance import Guidance, guided_velocity
from rehyat_jax.sampling.sample import Steps, sampling_step
from rehyat_jax.sampling.solvers import Solver

#: The transformer's stream states: every leaf is ``[steps, branches, layers, …]``, see `init_states`.
States: TypeAlias = PyTree[Array]

#: How the per-chunk sweep remembers a chunk. ``"steps"``: at every step's noise level, one state each, which makes the
#: video of a per-step sweep. A noise level from 0 to below 1: once, when it is finished, with so much noise (0: as it
#: is), one state for all steps. That needs a model that was trained so (Diffusion Forcing, arXiv 2407.01392;
#: Self-Forcing, arXiv 2506.08009): its states are as many times smaller as there are steps.
Remember: TypeAlias = Literal["steps"] | float

#: The same numbers on every device, whatever JAX is configured to draw by default.
RANDOM = "threefry2x32"
_LARGEST_SEED = (1 << 32) - 1
#: Of the noise that a chunk is remembered with: the number of no frame.
_AGAIN = (1 << 32) - 1


def video_keys(seed: int, *, count: int) -> Key[Array, " count"]:
    """Keys of the noise of ``count`` videos: the i-th has that of ``seed + i``.

    Raises:
        RehyatError: a seed is not in 0 to 2³² − 1.
    """
    if not isinstance(seed, int) or not 0 <= seed <= _LARGEST_SEED + 1 - count:
        raise RehyatError(f"the seed must be a whole number from 0 to {_LARGEST_SEED}, not {seed}")
    return jnp.stack([jax.random.key(seed + i, impl=RANDOM) for i in range(count)])


@partial(jax.jit, static_argnames="shape")
def frame_noise(
    keys: Key[Array, " B"], shape: tuple[int, int, int, int], *, first_frame: int | Int[Array, ""] = 0
) -> Float[Array, "B T h w z"]:
    """Standard normal noise, float32, of latent frames ``first_frame``, ``first_frame + 1``, … of each key's video.

    Args:
        keys: one for each video of the batch.
        shape: frames, height, width and channels of the latents.
    """
    numbers = jnp.asarray(first_frame, jnp.int32) + jnp.arange(shape[0], dtype=jnp.int32)

    def frame(key: Key[Array, ""], number: Int[Array, ""]) -> Float[Array, "h w z"]:
        return jax.random.normal(jax.random.fold_in(key, number), shape[1:], jnp.float32)

    return jax.vmap(jax.vmap(frame, (None, 0)), (0, None))(keys, numbers)


def check_remember(value: Any) -> Remember:
    """
    Raises:
        ConfigError: there is no such way to remember.
    """
    if value == "steps" or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1):
        return value
    raise ConfigError(f'remember must be "steps" or a noise level from 0 to below 1, not {str(value)[:80]!r}')


def memory_noise(
    keys: Key[Array, " B"], shape: tuple[int, int, int, int], *, first_frame: int | Int[Array, ""], remember: Remember
) -> Float[Array, "B T h w z"] | None:
    """As `frame_noise`, and independent of it: what finished frames are remembered with, where they are."""
    if remember == "steps":
        return None
    again = jax.vmap(lambda key: jax.random.fold_in(key, np.uint32(_AGAIN)))(keys)
    return frame_noise(again, shape, first_frame=first_frame)


def chunk_frames(model: WanTransformer) -> int:
    """Latent frames of a chunk.

    Raises:
        RehyatError: the model cannot stream.
    """
    why = model.why_not_stream()
    if why is not None or model.hybrid is None:
        raise RehyatError(why or "")
    return model.hybrid.chunk_frames * model.config.patch_size[0]


def init_states(model: WanTransformer, *, steps: int, branches: int, batch: int, height: int, width: int) -> States:
    """The states before a video's first chunk: the model's own under leading axes of steps and guidance branches.

    Args:
        steps: as many as `Remember` asks for: one a step, or 1.
        branches: 1 without guidance, 2 with: `Guidance.branches`.
        height, width: of the latents.

    Raises:
        RehyatError: the model cannot stream, or height or width is not a multiple of the patch.
    """
    state = model.init_stream(batch, height, width)
    return jax.tree.map(lambda x: jnp.zeros((steps, branches, *x.shape), x.dtype), state)


def read_text(model: WanTransformer, text: Float[Array, "branches B L D"], *, text_tokens: int | None = None) -> TextKV:
    """What every step of every chunk sees of the prompts: `WanTransformer.read_text`'s, stacked over the branches.

    Args:
        text: the prompts' embeddings and, with guidance, the negative prompts' after them.
        text_tokens: see `WanTransformer`'s call; the same for a chunk.
    """
    return jax.lax.map(partial(model.read_text, text_tokens=text_tokens), text)


def denoise_chunk(
    model: WanTransformer,
    noise: Float[Array, "B T h w z"],
    text: TextKV,
    states: States,
    *,
    first_frame: int | Int[Array, ""],
    steps: Steps,
    solver: Solver,
    guidance: Guidance,
    text_tokens: int | None = None,
    remember: Remember = "steps",
    again: Float[Array, "B T h w z"] | None = None,
) -> tuple[Float[Array, "B T h w z"], States]:
    """One chunk through all steps: its latents, and the states after it.

    The states are carried through the loop and each is replaced where it lies: beside them all, memory holds two
    versions of the one that is being replaced. A caller's jit should donate them.

    Args:
        noise: of the chunk; the solver starts afresh with it.
        text: `read_text`'s; other prompts' from chunk to chunk, if one likes.
        states: `init_states`', or those that came with the chunk before.
        first_frame: the chunk's first latent frame, counted from the video's beginning; may be traced.
        again: where the chunk is remembered with noise: `memory_noise`.

    Raises:
        RehyatError: the model cannot stream.
    """
    by_step, first = remember == "steps", jnp.zeros((), jnp.int32)
    forward = partial(_forward, model, text, first_frame=first_frame, text_tokens=text_tokens)

    def step(carry: tuple[Any, States], x: tuple[Int[Array, ""], Steps]) -> tuple[tuple[Any, States], None]:
        (state, states), (number, row) = carry, x
        states, velocities = forward(states, state.latents, row.timestep, number if by_step else first, keep=by_step)
        state = solver.step(state, guidance.combine(list(velocities)), coefficients=row.coefficients)
        return (state, states), None

    (state, states), _ = jax.lax.scan(step, (solver.init(noise), states), _numbered(steps))
    if remember != "steps":
        states, _ = forward(states, _noisy(state.latents, again, remember), 1000 * remember, first, keep=True)
    return state.latents, states


def read_chunk(
    model: WanTransformer,
    latents: Float[Array, "B T h w z"],
    noise: Float[Array, "B T h w z"],
    text: TextKV,
    states: States,
    *,
    first_frame: int | Int[Array, ""],
    steps: Steps,
    text_tokens: int | None = None,
    remember: Remember = "steps",
    again: Float[Array, "B T h w z"] | None = None,
) -> States:
    """The states after a chunk that is given and not made, as `denoise_chunk` would leave them: a video's beginning.

    With ``"steps"`` every step sees it on the straight line between its noise and its latents. Arguments and errors as
    of `denoise_chunk`.
    """
    forward = partial(_forward, model, text, first_frame=first_frame, text_tokens=text_tokens)
    if remember != "steps":
        seen = _noisy(latents, again, remember)
        return forward(states, seen, 1000 * remember, jnp.zeros((), jnp.int32), keep=True)[0]

    def step(states: States, x: tuple[Int[Array, ""], Steps]) -> tuple[States, None]:
        number, row = x
        level = jnp.asarray(row.timestep, jnp.float32) / 1000
        return forward(states, _noisy(latents, noise, level), row.timestep, number, keep=True)[0], None

    return jax.lax.scan(step, states, _numbered(steps))[0]


def _forward(
    model: WanTransformer,
    text: TextKV,
    states: States,
    latents: Array,
    time: Any,
    number: Any,
    *,
    first_frame: int | Int[Array, ""],
    text_tokens: int | None,
    keep: bool,
) -> tuple[States, Array]:
    """Every branch's velocity, from the states of a step's number; these are kept as they are, or replaced."""
    x = latents.astype(model.dtype)
    t = jnp.broadcast_to(jnp.asarray(time, jnp.float32), x.shape[:1])

    def branch(states: States, each: tuple[Int[Array, ""], TextKV]) -> tuple[States, Array]:
        place, prompt = each
        mine = jax.tree.map(lambda s: _at(s, number, place), states)
        velocity, mine = model.stream(x, t, prompt, mine, first_frame=first_frame, text_tokens=text_tokens)
        if keep:
            states = jax.tree.map(lambda s, new: _replaced(s, new, number, place), states, mine)
        return states, velocity.astype(latents.dtype)

    return jax.lax.scan(branch, states, (jnp.arange(text.k.shape[0], dtype=jnp.int32), text))


def _numbered(steps: Steps) -> tuple[Int[Array, " steps"], Steps]:
    rows = jax.tree.map(jnp.asarray, steps)
    return jnp.arange(rows.timestep.shape[0], dtype=jnp.int32), rows


def _noisy(latents: Array, noise: Array | None, level: Any) -> Array:
    return latents if noise is None else (1 - level) * latents + level * noise


def per_chunk(
    model: WanTransformer,
    keys: Key[Array, " B"],
    text: Float[Array, "branches B L D"],
    states: States,
    *,
    shape: tuple[int, int, int, int],
    first_frame: int | Int[Array, ""] = 0,
    steps: Steps,
    solver: Solver,
    guidance: Guidance,
    remember: Remember = "steps",
) -> tuple[Float[Array, "B T h w z"], States]:
    """The next latent frames of a video, a scan over chunks of a scan over steps, and the states after them.

    Args:
        keys: of the noise, see `frame_noise`.
        text: as for `read_text`.
        states: as for `denoise_chunk`.
        shape: frames, height, width and channels of the latents to make. Where the frames are no multiple of a
            chunk's, the last chunk is a shorter one, with which the video ends.
        first_frame: the first of them, counted from the video's beginning: a multiple of a chunk's.

    Raises:
        RehyatError: the model cannot stream.
    """
    chunk, read = chunk_frames(model), read_text(model, text)
    count, rest = divmod(shape[0], chunk)
    first_frame = jnp.asarray(first_frame, jnp.int32)

    def one(states: States, number: Int[Array, ""], frames: int) -> tuple[States, Float[Array, "B T h w z"]]:
        first = first_frame + number * chunk
        latents, states = denoise_chunk(
            model,
            frame_noise(keys, (frames, *shape[1:]), first_frame=first),
            read,
            states,
            first_frame=first,
            steps=steps,
            solver=solver,
            guidance=guidance,
            remember=remember,
            again=memory_noise(keys, (frames, *shape[1:]), first_frame=first, remember=remember),
        )
        return states, latents

    states, latents = jax.lax.scan(partial(one, frames=chunk), states, jnp.arange(count, dtype=jnp.int32))
    latents = jnp.moveaxis(latents, 0, 1).reshape(keys.shape[0], count * chunk, *shape[1:])
    if rest:
        states, end = one(states, jnp.asarray(count, jnp.int32), rest)
        latents = jnp.concatenate([latents, end], axis=1)
    return latents, states


def per_step(
    model: WanTransformer,
    keys: Key[Array, " B"],
    text: Float[Array, "branches B L D"],
    *,
    shape: tuple[int, int, int, int],
    steps: Steps,
    solver: Solver,
    guidance: Guidance,
) -> Float[Array, "B T h w z"]:
    """A whole video's latents, all frames at each step; any model. Arguments as for `per_chunk`."""
    negative = text[1] if guidance.needs_negative else None
    velocity = guided_velocity(model, text[0], negative=negative, guidance=guidance, dtype=model.dtype)

    def step(state: Any, row: Steps) -> tuple[Any, None]:
        return sampling_step(velocity, state, step=row, solver=solver), None

    state, _ = jax.lax.scan(step, solver.init(frame_noise(keys, shape)), jax.tree.map(jnp.asarray, steps))
    return state.latents


def _at(states: Array, step: Int[Array, ""], branch: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_slice(states, _corner(states, step, branch), (1, 1, *states.shape[2:]))[0, 0]


def _replaced(states: Array, new: Array, step: Int[Array, ""], branch: Int[Array, ""]) -> Array:
    """In place where XLA owns ``states``, as it does a loop's carry."""
    return jax.lax.dynamic_update_slice(states, new[None, None], _corner(states, step, branch))


def _corner(states: Array, step: Int[Array, ""], branch: Int[Array, ""]) -> tuple[Int[Array, ""], ...]:
    return (step, branch, *(jnp.zeros((), jnp.int32) for _ in states.shape[2:]))
