"""One forward pass of a teacher in which every block's self-attention is seen, and learned from, on the way.

A scan over the layers: its body computes a block's q, k, v and softmax output y, goes on with y, and hands them to a
visitor with what belongs to that block alone. So there is the memory of one block, and no gradient from one to another:
the pass itself is never differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from rehyat_jax.mixers.base import Mixer
from rehyat_jax.models.wan.transformer import WanTransformer, text_repeats
from rehyat_jax.runtime.mesh import constrain_sharding, frames_on_devices
from train.data.trajectories import Points
from train.engine.optimizer import OptimizerConfig, TrainState
from train.stages.attending import Attending, WholeVideo, taken
from train.stages.attention_loss import LossName, health, relative_error, score_loss

#: Queries of a video whose weights are looked at one by one.
_QUERIES = 256


class Seen(NamedTuple):
    """A block's self-attention: what goes in, after norm and positions, and what the teacher makes of it.

    On a mesh that cuts time the video may be padded at its end, where y is 0.
    """

    q: Float[Array, "R N H D"]
    k: Float[Array, "R N H D"]
    v: Float[Array, "R N H D"]
    y: Float[Array, "R N H D"]


_WHOLE = WholeVideo()
#: From what belongs to a block, what is seen of it, and the tokens of a frame: whatever the caller wants back.
Visit = Callable[[PyTree, Seen, int], PyTree]


def observe(
    teacher: WanTransformer,
    points: Points,
    visits: Sequence[Visit],
    own: Sequence[PyTree],
    *,
    numbers: Sequence[int | None] | None = None,
    chunk: int = 1,
    text_tokens: int | None = None,
    attending: Attending = _WHOLE,
) -> tuple[Float[Array, "R T h w z"], tuple[PyTree, ...]]:
    """The teacher's velocity, and each visit's results over an axis of the layers that it was to.

    One scan over all layers, whose body holds each visit once, however their layers alternate.

    Args:
        own: for each visit, what belongs to a layer, over the same axis.
        numbers: of the visit to each layer (`Mixing.numbers`), None where there is none. None itself: every visit is to
            every layer.
        chunk: latent frames that stay together where time is sharded.
        text_tokens: see `WanTransformer`'s call.
        attending: how its blocks attend.
    """
    frames = points.latents.shape[1]
    padding = frames_on_devices(frames, chunk) - frames
    inputs = teacher.embed(jnp.pad(points.latents, ((0, 0), (0, padding), *[(0, 0)] * 3)), points.timesteps)
    text = teacher.embed_text(points.text, text_tokens)
    how = {"text_repeats": text_repeats(text.shape[1], text_tokens), "image": teacher.embed_image(points.image)}
    tokens = inputs.x.shape[1] * frames // (frames + padding)
    frame = inputs.grid[1] * inputs.grid[2]
    graph, layers = nnx.split(teacher.blocks)
    depth = teacher.config.num_layers
    everywhere = numbers is None or all(number == 0 for number in numbers)
    numbers = [0] * depth if numbers is None else numbers
    places = [np.array([number == visit for number in numbers]) for visit in range(len(visits))]
    if not everywhere:
        # A layer of another visit has its neighbour's, and no use for it.
        own = [
            jax.tree.map(lambda x, here=here: x[np.maximum(np.cumsum(here) - 1, 0)], each)
            for here, each in zip(places, own, strict=True)
        ]
    # After the last visit, none.
    which = [len(visits) if number is None else number for number in numbers]

    def layer(x: Array, params: tuple[Any, Sequence[Any], Array]) -> tuple[Array, Any]:
        x, block = constrain_sharding(x, "batch", "time", None), nnx.merge(graph, params[0])

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            y = attending.teach(q, k, v, frame=frame, tokens=tokens)
            seen = Seen(q, k, v, y)
            makers = [
                functools.partial(visit, mine, seen, frame) for visit, mine in zip(visits, params[1], strict=True)
            ]
            if everywhere:
                return y, tuple(make() for make in makers)
            zeros = [jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), jax.eval_shape(make)) for make in makers]

            def branch(number: int) -> Callable[[], tuple[Any, ...]]:
                return lambda: tuple(make() if i == number else zeros[i] for i, make in enumerate(makers))

            return y, jax.lax.switch(params[2], [branch(i) for i in range(max(which) + 1)])

        return block.attending(x, text, inputs.modulation, inputs.rotary, attend, **how)

    x, given = jax.lax.scan(layer, inputs.x, (layers, tuple(own), jnp.array(which)))
    if not everywhere:
        given = tuple(
            jax.tree.map(lambda z, here=here: z[np.flatnonzero(here)], each)
            for here, each in zip(places, given, strict=True)
        )
    return teacher.unembed(x, inputs)[:, :frames], given


class Order(NamedTuple):
    """For every optimiser step on what was seen: its part of the rows, and the queries of the score loss."""

    rows: Int[Array, "steps P"]
    queries: Int[Array, "steps Q"]


def draw_order(key: Key[Array, ""], *, rows: int, tokens: int, passes: int, parts: int) -> Order:
    """``passes`` times all rows, each time divided again into ``parts``."""
    row_key, query_key = jax.random.split(key)
    passes_of_rows = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(row_key, passes))
    queries = jax.random.randint(query_key, (passes * parts, min(_QUERIES, tokens)), 0, tokens)
    return Order(passes_of_rows.reshape(passes * parts, rows // parts), queries)


def learn(
    block: TrainState,
    seen: Seen,
    order: Order,
    rate: Float[Array, ""],
    *,
    graph: Any,
    frame: int,
    loss: LossName,
    optimizer: OptimizerConfig,
    tokens: int | None = None,
    attending: Attending = _WHOLE,
) -> tuple[TrainState, Float[Array, ""]]:
    """One block after an optimiser step for each of ``order``'s, and the loss that the first of them saw.

    Args:
        graph: of the block's `Mixer`, whose parameters ``block`` has.
        tokens: how many there are; those after them are padding.
        attending: how mixers are applied to rows, and how many of these belong together: ``order`` numbers them as one.
    """
    rows = seen.q.shape[0] // attending.rows

    def objective(params: PyTree, part: Seen, queries: Array) -> Array:
        mixer: Mixer = nnx.merge(graph, params)
        if loss == "score":
            found = mixer.weights(part.q[:, :tokens], part.k[:, :tokens], queries=queries, frame=frame)
            assert found is not None, "a mixer that learns by its weights has some"
            return score_loss(found)
        return error(mixer, part, frame=frame, tokens=tokens, attending=attending)

    def step(block: TrainState, x: Order) -> tuple[TrainState, Array]:
        # The whole needs no copy.
        whole = x.rows.shape[0] == rows
        part = seen if whole else jax.tree.map(lambda a: taken(a, x.rows, together=attending.rows), seen)
        value, gradients = jax.value_and_grad(objective)(block.params, part, x.queries)
        return optimizer.apply(block, gradients, rate), value

    block, values = jax.lax.scan(step, block, order)
    return block, values[0]


class Figures(NamedTuple):
    """How well a block does: at a step of sampling, or over all of them."""

    #: Σ|ŷ − y| / Σ|y|.
    error: Float[Array | np.ndarray, "*shape"]
    #: n_L / (n_S + n_L), mean over queries.
    share: Float[Array | np.ndarray, "*shape"]
    #: The least n_S + n_L.
    normaliser: Float[Array | np.ndarray, "*shape"]


def measure(
    params: PyTree,
    seen: Seen,
    *,
    graph: Any,
    frame: int,
    tokens: int | None = None,
    attending: Attending = _WHOLE,
) -> Figures:
    """One block as it is; ``tokens`` and ``attending`` as in `learn`. Of rows that belong together, the weights are the
    last one's."""
    mixer = nnx.merge(graph, params)
    tokens = seen.q.shape[1] if tokens is None else tokens
    # Evenly spread, the last token among them.
    queries = jnp.asarray(np.linspace(0, tokens - 1, min(_QUERIES, tokens)).astype(np.int32))
    last = slice(attending.rows - 1, None, attending.rows)
    q, k = seen.q[last, :tokens], seen.k[last, :tokens]
    found = health(mixer.weights(q, k, queries=queries, frame=frame))
    apart = error(mixer, seen, frame=frame, tokens=tokens, attending=attending)
    return Figures(apart, found.share, found.normaliser)


def error(
    mixer: Mixer, seen: Seen, *, frame: int, tokens: int | None, attending: Attending = _WHOLE
) -> Float[Array, ""]:
    """`relative_error` of a mixer's output; ``tokens`` and ``attending`` as in `learn`."""
    guess = attending.apply(mixer, seen.q, seen.k, seen.v, frame=frame, tokens=tokens)
    if tokens is not None and tokens < guess.shape[1]:
        real = jnp.arange(guess.shape[1], dtype=jnp.int32) < tokens
        guess = jnp.where(real[None, :, None, None], guess, jnp.zeros((), guess.dtype))
    return relative_error(guess, seen.y)
