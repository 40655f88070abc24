"""One pass over a teacher's blocks: gradients against the naive loss, weights against the operator."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.tiers import breadth
from shared.training import random_module

from rehyat_jax.attention.api import hybrid_attention
from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.mixers.base import Mixer
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.mixing import Mixing
from rehyat_jax.models.wan.transformer import WanTransformer
from train.data.trajectories import Points
from train.engine.optimizer import OptimizerConfig
from train.stages.attention_loss import health, score_loss
from train.stages.blockwise import Seen, draw_order, learn, measure, observe

WAN = WanConfig(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=32,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    patch_size=(1, 2, 2),
)


# Weights and losses --------------------------------------------------------------------------------------------------


def _attention(hybrid: HybridConfig, seed: int = 0) -> Mixer:
    """A block of random numbers whose past weighs as much as its window."""
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    attention = hybrid.mixer.make(heads=2, head_dim=12, **kinds, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    state = nnx.state(attention)
    nnx.update(attention, jax.tree.map(lambda x: x + jnp.asarray(rng.uniform(0.1, 0.4, x.shape), x.dtype), state))
    return attention


def _seen(frames: int, frame: int, rows: int = 2, seed: int = 0) -> Seen:
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, frames * frame, 2, 12)), jnp.float32) for _ in range(3))
    return Seen(q, k, v, softmax_attention(q, k, v))


@pytest.mark.parametrize(
    "hybrid",
    breadth(
        [
            HybridConfig(chunk_frames=1, overlap_frames=2, stabilizer="lse", decay=True),
            HybridConfig(chunk_frames=2, kind="linear", decay=True),
            HybridConfig(chunk_frames=1, kind="window", sink_frames=1),
            HybridConfig(chunk_frames=2, overlap_frames=1),
            HybridConfig(chunk_frames=2, overlap_frames=0, stabilizer="none", length_norm=True),
            HybridConfig(chunk_frames=2, overlap_frames=1, causal=False),
            HybridConfig(chunk_frames=2, kind="linear", causal=False),
        ],
        test=3,
    ),
    ids=lambda h: f"{h.kind}-{h.chunk_frames}-{h.overlap_frames}-{h.stabilizer}-{'causal' if h.causal else 'all'}",
)
def test_weights_are_those_of_the_operator(hybrid):
    """Applied to v and divided by their sum they are the block's output: float32 sums of 15 tokens."""
    attention, seen, frame = _attention(hybrid), _seen(5, 3), 3
    queries = jnp.array([0, 4, 8, 14])
    found, whole = jax.jit(
        lambda seen: (
            attention.weights(seen.q, seen.k, queries=queries, frame=frame),
            attention(seen.q, seen.k, seen.v, frame=frame),
        )
    )(seen)
    parts = [
        jnp.where(where[None, None], x, 0)
        for x, where in [(found.softmax, found.softmax_set), (found.linear, found.linear_set)]
    ]
    total = parts[0] + parts[1]
    out = jnp.einsum("bhij,bjhd->bihd", total / total.sum(-1, keepdims=True), seen.v)
    np.testing.assert_allclose(out, whole[:, queries], atol=1e-5)
    figures = health(found)
    np.testing.assert_allclose(figures.share, (parts[1].sum(-1) / total.sum(-1)).mean(), rtol=1e-6)
    np.testing.assert_allclose(figures.normaliser, total.sum(-1).min(), rtol=1e-6)
    if hybrid.kind == "linear":
        assert figures.share == 1


def test_the_score_loss_is_the_published_one():
    attention, seen = _attention(HybridConfig(chunk_frames=1, overlap_frames=0, stabilizer="none")), _seen(3, 2, rows=1)
    found = attention.weights(seen.q, seen.k, queries=jnp.arange(6), frame=2)
    phi_q, phi_k = (np.asarray(f(x), np.float64)[0] for f, x in [(attention.phi_q, seen.q), (attention.phi_k, seen.k)])
    q, k = (np.asarray(x, np.float64)[0] for x in (seen.q, seen.k))
    expected = [
        np.log(
            1
            + sum((np.exp(q[i, h] @ k[j, h] / np.sqrt(12)) - phi_q[i, h] @ phi_k[j, h]) ** 2 for j in range(i // 2 * 2))
        )
        for i, h in itertools.product(range(6), range(2))
    ]
    np.testing.assert_allclose(score_loss(found), np.mean(expected), rtol=1e-5)


# One pass over the blocks --------------------------------------------------------------------------------------------

HYBRID = HybridConfig(chunk_frames=1, overlap_frames=1)
#: Moments and parameters after one step tell the gradient: nothing is clipped, decayed or warmed up.
PLAIN = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, clip_norm=1e9)


@pytest.fixture(scope="module")
def teacher() -> WanTransformer:
    return random_module(lambda: WanTransformer(WAN, rngs=nnx.Rngs(0)), 1)


@pytest.fixture(scope="module")
def points() -> Points:
    rng = np.random.default_rng(2)
    latents, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 4, 4, 4, 4), (4, 5, 16)))
    return Points(latents, jnp.array([900.0, 600.0, 300.0, 20.0]), text)


def _blocks(count: int) -> list[Mixer]:
    return [_attention(HYBRID, seed) for seed in range(count)]


def _stacked(blocks: list[Mixer]):
    return jax.tree.map(lambda *x: jnp.stack(x), *(nnx.state(block) for block in blocks))


def _pass(teacher, points, converted, *, optimizer=PLAIN, loss="l1", passes=1, parts=1):
    """Of every converted block, by the real thing: its state afterwards and its loss. Also the velocity."""
    graph = nnx.graphdef(_attention(HYBRID))
    numbers = tuple(i for i, here in enumerate(converted) if here)
    mixing = Mixing.of(dataclasses.replace(HYBRID, blocks=numbers), len(converted))

    @jax.jit
    def run(blocks, order):
        def visit(block, seen, frame):
            return learn(
                block, seen, order, jnp.float32(1e-2), graph=graph, frame=frame, loss=loss, optimizer=optimizer
            )

        velocity, (given,) = observe(teacher, points, [visit], [blocks], numbers=mixing.numbers)
        return velocity, given

    def apply(blocks):
        order = draw_order(jax.random.key(0), rows=4, tokens=16, passes=passes, parts=parts)
        blocks = jax.vmap(optimizer.init)(blocks)
        return run(blocks, order)

    return apply


@pytest.fixture(scope="module")
def passed(teacher, points):
    return _pass(teacher, points, (True, True, True))


def test_gradients_are_those_of_the_naive_loss(teacher, points, passed):
    """Of the sum of all blocks' losses, each on what a walk through the teacher gives it, by the dense reference."""
    blocks = _blocks(3)
    graph, layers = nnx.split(teacher.blocks)

    def attend(q, k, v):
        y = softmax_attention(q, k, v)
        return y, Seen(q, k, v, y)

    def naive(states):
        inputs, text = teacher.embed(points.latents, points.timesteps), teacher.embed_text(points.text)
        x, total = inputs.x, 0.0
        for i, state in enumerate(states):
            layer = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], layers))
            x, seen = layer.attending(x, text, inputs.modulation, inputs.rotary, attend)
            block = nnx.merge(nnx.graphdef(blocks[0]), state)
            guess = hybrid_attention(
                seen.q,
                seen.k,
                seen.v,
                block.phi_q(seen.q),
                block.phi_k(seen.k),
                chunk=4,
                overlap=4,
                implementation="reference",
            )
            total += jnp.mean(jnp.abs(guess - seen.y)) / jnp.mean(jnp.abs(seen.y))
        return total, teacher.unembed(x, inputs)

    states = [nnx.state(block) for block in blocks]
    (value, answer), expected = jax.jit(jax.value_and_grad(naive, has_aux=True))(states)
    velocity, (after, losses) = passed(_stacked(blocks))
    np.testing.assert_allclose(losses.sum(), value, rtol=1e-5)
    # The pass goes on with the teacher's own output.
    np.testing.assert_allclose(velocity, answer, atol=1e-5)
    # Adam's first moment after one step is a tenth of the gradient.
    moments = next(x for x in jax.tree.leaves(after.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    for i, gradient in enumerate(expected):
        for ours, theirs in zip(jax.tree.leaves(moments.mu), jax.tree.leaves(gradient), strict=True):
            scale = float(jnp.abs(theirs).max())
            assert scale > 0
            np.testing.assert_allclose(10 * ours[i], theirs, atol=1e-4 * scale)


def test_no_block_learns_from_another(passed):
    blocks = _blocks(3)
    _, (before, losses) = passed(_stacked(blocks))
    _, (after, others) = passed(_stacked([_attention(HYBRID, 7), *blocks[1:]]))
    assert losses[0] != others[0]
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x[1:], y[1:])


def test_only_converted_blocks_learn(teacher, points, passed):
    blocks = _blocks(3)
    velocity, (every, losses) = passed(_stacked(blocks))
    partly, (some, fewer) = _pass(teacher, points, (True, False, True))(_stacked([blocks[0], blocks[2]]))
    np.testing.assert_allclose(partly, velocity, atol=1e-5)
    np.testing.assert_allclose(fewer, losses[np.array([0, 2])], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(some.params), jax.tree.leaves(every.params), strict=True):
        # Adam's first step is a sign: where the gradient is a rounding error, its sign is too.
        assert np.mean(np.abs(x - y[np.array([0, 2])]) > 1e-5) < 1e-2


@pytest.mark.parametrize("loss", ["l1", "score"])
def test_several_updates_of_parts_lower_the_loss(loss):
    seen, optimizer = _seen(4, 3, rows=4), dataclasses.replace(PLAIN, clip_norm=1.0)
    attention = _attention(HYBRID)
    graph, params = nnx.split(attention)
    order = draw_order(jax.random.key(1), rows=4, tokens=12, passes=8, parts=2)
    assert order.rows.shape == (16, 2)
    # Every pass takes every row once.
    np.testing.assert_array_equal(np.sort(np.asarray(order.rows).reshape(8, 4)), np.tile(np.arange(4), (8, 1)))

    @jax.jit
    def run(block, order):
        return learn(block, seen, order, jnp.float32(1e-2), graph=graph, frame=3, loss=loss, optimizer=optimizer)

    block, first = run(optimizer.init(params), order)
    assert int(block.step) == 16
    _, last = run(block, order)
    assert last < 0.9 * first


@pytest.mark.full
def test_a_chunk_of_the_whole_video_is_the_teacher(teacher, points):
    """On texts of 5 tokens and 35 of zeros."""
    hybrid = HybridConfig(chunk_frames=4)
    blocks = [_attention(hybrid, seed) for seed in range(3)]

    def visit(params, seen, frame):
        return measure(params, seen, graph=nnx.graphdef(blocks[0]), frame=frame)

    velocity, (figures,) = jax.jit(lambda own: observe(teacher, points, [visit], [own], text_tokens=40))(
        _stacked(blocks)
    )
    padded = jnp.pad(points.text, ((0, 0), (0, 35), (0, 0)))
    np.testing.assert_allclose(velocity, jax.jit(teacher)(points.latents, points.timesteps, padded), atol=1e-5)
    assert figures.error.shape == (3,)
    assert figures.error.max() < 1e-5
    np.testing.assert_array_equal(figures.share, 0)
    assert figures.normaliser.min() >= 1
