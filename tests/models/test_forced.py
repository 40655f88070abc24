"""Teacher forcing in one pass: against the calls that it stands for, and its gradients against finite differences."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.forced import forced
from rehyat_jax.models.wan.remat import Keeps
from rehyat_jax.models.wan.transformer import WanTransformer

TINY = WanConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=37,
    in_channels=4,
    out_channels=4,
    text_dim=19,
    freq_dim=34,
)
#: Two and a half chunks of two frames.
SHAPE = (2, 5, 4, 4, 4)


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    """No parameter where training starts, so that what lies in the states counts."""
    hybrid = HybridConfig(chunk_frames=2, overlap_frames=1, length_norm=True)
    shape = nnx.eval_shape(lambda: WanTransformer(TINY, hybrid=hybrid, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda p: jnp.asarray(0.2 * rng.standard_normal(p.shape, np.float32)), nnx.state(shape, nnx.Param)
    )
    nnx.update(shape, drawn)
    return shape


def inputs() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    noisy, past = jax.random.normal(keys[0], SHAPE), jax.random.normal(keys[1], SHAPE)
    times = jax.random.uniform(keys[2], SHAPE[:2], maxval=1000.0)
    return noisy, times, past, times / 20, jax.random.normal(keys[3], (2, 3, 19))


def compiled(call: Callable[[WanTransformer], jax.Array], model: WanTransformer) -> jax.Array:
    """As one program: operation by operation, each would be compiled by itself."""
    graph, weights = nnx.split(model)
    return jax.jit(lambda weights: call(nnx.merge(graph, weights)))(weights)


def velocity_of(model: WanTransformer, stop: int = 0, remat: Keeps | None = "nothing") -> jax.Array:
    noisy, times, past, past_times, text = inputs()
    return forced(
        model,
        noisy,
        times,
        model.precompute_text_kv(text),
        model.init_state(2, 4, 4),
        past=past,
        past_times=past_times,
        stop=stop,
        remat=remat,
    ).velocity


def by_two_calls(model: WanTransformer, *, detached: bool) -> jax.Array:
    """Chunk by chunk: the noisy one from the past's state, then the past's own."""
    noisy, times, past, past_times, text = inputs()
    read, state, parts = model.precompute_text_kv(text), model.init_state(2, 4, 4), []
    for first in range(0, SHAPE[1], 2):
        frames = slice(first, first + 2)
        if detached:
            state = jax.lax.stop_gradient(state)
        parts.append(model.stream(noisy[:, frames], times[:, frames], read, state, first_frame=first)[0])
        state = model.stream(past[:, frames], past_times[:, frames], read, state, first_frame=first)[1]
    return jnp.concatenate(parts, axis=1)


def largest(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


def test_it_is_two_calls_a_chunk(model: WanTransformer) -> None:
    # The same products in batches of another size.
    two_calls = compiled(lambda m: by_two_calls(m, detached=False), model)
    assert largest(compiled(velocity_of, model), two_calls) < 1e-5


def test_with_itself_as_its_past_it_is_the_whole_call(model: WanTransformer) -> None:
    noisy, times, _, _, text = inputs()

    def both(model: WanTransformer) -> tuple[jax.Array, jax.Array]:
        found = forced(
            model,
            noisy,
            times,
            model.precompute_text_kv(text),
            model.init_state(2, 4, 4),
            past=noisy,
            past_times=times,
        )
        return found.velocity, model(noisy, times, text)

    assert largest(*compiled(both, model)) < 1e-5


def test_it_goes_on_from_a_state(model: WanTransformer) -> None:
    noisy, times, past, past_times, text = inputs()

    def both(model: WanTransformer) -> tuple[jax.Array, jax.Array]:
        read, whole = model.precompute_text_kv(text), velocity_of(model)
        state, parts = model.init_state(2, 4, 4), []
        for frames in (slice(0, 2), slice(2, 5)):
            found = forced(
                model,
                noisy[:, frames],
                times[:, frames],
                read,
                state,
                past=past[:, frames],
                past_times=past_times[:, frames],
                first_frame=frames.start,
            )
            state = found.state
            parts.append(found.velocity)
        return jnp.concatenate(parts, axis=1), whole

    assert largest(*compiled(both, model)) < 1e-5


def losses(model: WanTransformer, velocity) -> tuple:
    """Of the last chunk alone, so that all that it knows of the others came through the state."""
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda params: jnp.mean(jnp.square(velocity(nnx.merge(graph, params))[:, 4:] - 0.3))


def norm(tree) -> float:
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))))


@pytest.fixture(scope="module")
def through(model: WanTransformer) -> nnx.State:
    """The gradient through the state, what is between computed again."""
    params, loss = losses(model, velocity_of)
    return jax.jit(jax.grad(loss))(params)


def test_the_gradient_through_the_state_is_that_of_finite_differences(
    model: WanTransformer, through: nnx.State
) -> None:
    params, loss = losses(model, velocity_of)
    gradient = through["hybrid_blocks"]["phi_k"]
    assert norm(gradient) > 1e-4
    # Along the gradient of φ_k, which reaches this loss through the state alone.
    unit = jax.tree.map(lambda g: g / norm(gradient), gradient)

    @jax.jit
    def moved(distance: jax.Array) -> jax.Array:
        there = jax.tree.map(lambda p: p, params)
        there["hybrid_blocks"]["phi_k"] = jax.tree.map(
            lambda p, u: p + distance * u, params["hybrid_blocks"]["phi_k"], unit
        )
        return loss(there)

    step = 0.02
    slope = (moved(jnp.float32(step)) - moved(jnp.float32(-step))) / (2 * step)
    # The model's norms are in float32 whatever its parameters: 1e-6 of a loss near 1, over this step.
    assert float(slope) == pytest.approx(norm(gradient), rel=0.02)


@pytest.fixture(scope="module")
def stopped(model: WanTransformer) -> nnx.State:
    """The gradient where nothing of it passes a chunk."""
    params, loss = losses(model, lambda m: velocity_of(m, stop=1))
    return jax.jit(jax.grad(loss))(params)


def test_stopped_at_each_chunk_the_keys_features_learn_nothing(stopped: nnx.State) -> None:
    assert norm(stopped["hybrid_blocks"]["phi_q"]) > 0
    assert norm(stopped["hybrid_blocks"]["phi_k"]) == 0


@pytest.mark.full
def test_stopped_at_each_chunk_it_is_detached(model: WanTransformer, stopped: nnx.State) -> None:
    params, loss = losses(model, lambda m: by_two_calls(m, detached=True))
    detached = jax.jit(jax.grad(loss))(params)
    difference = jax.tree.map(lambda a, b: a - b, stopped, detached)
    assert norm(difference) < 1e-4 * norm(detached)


@pytest.mark.full
def test_what_is_computed_again_is_the_same(model: WanTransformer, through: nnx.State) -> None:
    params, kept = losses(model, lambda m: velocity_of(m, remat=None))
    once = jax.jit(jax.grad(kept))(params)
    assert norm(jax.tree.map(lambda a, b: a - b, through, once)) < 1e-5 * norm(once)


def test_what_cannot_be_is_a_sentence(model: WanTransformer) -> None:
    noisy, times, past, past_times, text = inputs()
    read, state = model.precompute_text_kv(text), model.init_state(2, 4, 4)
    with pytest.raises(ConfigError, match="no stop, not -1"):
        forced(model, noisy, times, read, state, past=past, past_times=past_times, stop=-1)
    teacher = model.with_hybrid(None)
    with pytest.raises(RehyatError, match="cannot stream"):
        forced(teacher, noisy, times, read, state, past=past, past_times=past_times)
