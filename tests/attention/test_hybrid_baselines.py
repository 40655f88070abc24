"""The baselines of hybrid attention against their equations in numpy, whole and in successive calls."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import tiers
from shared.tiers import examples

from rehyat_jax import hybrid_attention
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.linear import linear_attention
from rehyat_jax.mixers.window import WindowState, window_attention


def drawn(tokens: int, *widths: int, batch: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Two heads; positive, so that they serve as features too, and of order one."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.05, 2.0, size=(batch, tokens, 2, width)) for width in widths]


def dense_window(q, k, v, *, chunk: int, overlap: int, sink: int) -> np.ndarray:
    """Softmax over the pairs of an N × N mask."""
    i, j = np.ogrid[: q.shape[1], : q.shape[1]]
    first, end = i // chunk * chunk, (i // chunk + 1) * chunk
    visible = ((j >= first - overlap) | (j < sink)) & (j < end)
    scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(visible, np.exp(scores - scores.max()), 0)
    return np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)


def dense_linear(features_q, features_k, v, *, chunk: int, causal: bool, decay: np.ndarray) -> np.ndarray:
    """φ_q·φ_k as the weights of an N × N matrix; a token's fades by γ with each chunk between it and the query."""
    t = np.arange(v.shape[1]) // chunk
    ago = t[:, None] - t[None]
    fade = decay[:, None, None] ** np.maximum(ago, 0) * (ago >= 0) if causal else np.ones((1, 1, 1))
    weights = np.einsum("bihf,bjhf->bhij", features_q, features_k) * fade
    return np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)


def in_calls(attention, arrays, length: int):
    """Successive calls over ``length`` tokens, the state handed on."""
    outs, state = [], None
    for begin in range(0, arrays[0].shape[1], length):
        out, state = attention(*(a[:, begin : begin + length] for a in arrays), initial_state=state, return_state=True)
        outs.append(out)
    return jnp.concatenate(outs, axis=1), state


@functools.cache
def compiled(baseline, tokens: int, calls: int, **options):
    """Whole, and cut into calls of so many chunks, in one program."""

    def run(*arrays, **traced):
        attention = functools.partial(baseline, **options, **traced)
        return attention(*arrays, return_state=True), in_calls(attention, arrays, calls * options["chunk"])

    return jax.jit(run)


def assert_cuts_agree(whole, cut) -> None:
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-13, rtol=1e-13)


@dataclasses.dataclass(frozen=True)
class Window:
    tokens: int
    chunk: int
    overlap: int
    sink: int
    calls: int = 1


#: Last chunks short, one chunk only; overlaps none to more than the video; sinks of a part of a chunk, of several
#: chunks, beside a window that still holds them, and longer than the video.
WINDOWS = [
    Window(11, 3, 0, 0),
    Window(11, 3, 2, 0, 2),
    Window(13, 2, 5, 3),
    Window(14, 4, 1, 6),
    Window(10, 1, 2, 1, 3),
    Window(9, 3, 12, 2),
    Window(8, 3, 1, 11),
    Window(5, 7, 2, 3),
]


@settings(max_examples=examples(60), deadline=None, derandomize=True, database=None)
@given(sizes=st.sampled_from(tiers.chosen(WINDOWS, test=4)), seed=st.integers(0, 2**32 - 1))
def test_window_with_sink_is_its_equation(sizes, seed):
    """float64: 1e-13, of outputs of order one after some tens of operations with rounding of 1e-16; cut and continued
    as well."""
    arrays = drawn(sizes.tokens, 3, 3, 3, seed=seed)
    options = {"chunk": sizes.chunk, "overlap": sizes.overlap, "sink": sizes.sink}
    with jax.enable_x64(True):
        whole, cut = compiled(window_attention, sizes.tokens, sizes.calls, **options)(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(whole[0], dense_window(*arrays, **options), atol=1e-13, rtol=0)
    assert_cuts_agree(whole, cut)


@settings(max_examples=examples(60), deadline=None, derandomize=True, database=None)
@given(
    sizes=st.sampled_from(tiers.chosen([(11, 3, 1), (12, 4, 2), (7, 1, 3), (5, 9, 1)], test=2)),
    decay=st.sampled_from([(1.0, 1.0), (0.9, 0.5)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_linear_is_its_equation(sizes, decay, seed):
    """float64: 1e-13, as above. ``decay`` is an array of the program, so that 1 and less than 1 are one program."""
    tokens, chunk, calls = sizes
    arrays = drawn(tokens, 5, 5, 3, seed=seed)
    with jax.enable_x64(True):
        whole, cut = compiled(linear_attention, tokens, calls, chunk=chunk)(
            *map(jnp.asarray, arrays), decay=jnp.asarray(decay)
        )
    expected = dense_linear(*arrays, chunk=chunk, causal=True, decay=np.array(decay))
    np.testing.assert_allclose(whole[0], expected, atol=1e-13, rtol=0)
    assert_cuts_agree(whole, cut)


def test_linear_of_everything(x64):
    """Not causal: every token sees all, whatever the chunk; and without decay γ is 1."""
    arrays = drawn(7, 5, 5, 3)
    ours = linear_attention(*map(jnp.asarray, arrays), chunk=3, causal=False)
    np.testing.assert_allclose(ours, dense_linear(*arrays, chunk=3, causal=False, decay=np.ones(2)), atol=1e-13)
    causal = linear_attention(*map(jnp.asarray, arrays), chunk=3)
    np.testing.assert_allclose(causal, dense_linear(*arrays, chunk=3, causal=True, decay=np.ones(2)), atol=1e-13)


def test_one_chunk_is_torchs_softmax():
    """A window that holds the video; float32 rounding."""
    arrays = [np.float32(a) for a in drawn(17, 8, 8, 8)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*(torch.tensor(a).transpose(1, 2) for a in arrays))
    for chunk, overlap in [(17, 0), (40, 5)]:
        ours = window_attention(*map(jnp.asarray, arrays), chunk=chunk, overlap=overlap, sink=3)
        np.testing.assert_allclose(ours, theirs.transpose(1, 2), atol=2e-6)


def test_window_is_the_hybrid_without_its_past(x64):
    """Features of zero: n_L = 0. float64 rounding."""
    q, k, v = map(jnp.asarray, drawn(14, 3, 3, 3))
    nothing = jnp.zeros((2, 14, 2, 4))
    expected = hybrid_attention(q, k, v, nothing, nothing, chunk=4, overlap=3)
    np.testing.assert_allclose(window_attention(q, k, v, chunk=4, overlap=3), expected, atol=1e-14)


def test_gradients_of_calls_are_those_of_the_whole(x64):
    """Through the states, the sink among them; float64 against the dense equation's slope along one direction, central
    differences of step 1e-6 with an error of 1e-9."""
    arrays = drawn(10, 3, 3, 3, batch=1)
    rng = np.random.default_rng(1)
    directions = [rng.normal(size=a.shape) for a in arrays]
    baselines = [
        (
            functools.partial(window_attention, chunk=2, overlap=1, sink=3),
            functools.partial(dense_window, chunk=2, overlap=1, sink=3),
        ),
        (
            functools.partial(linear_attention, chunk=2, decay=jnp.array([0.9, 0.5])),
            functools.partial(dense_linear, chunk=2, causal=True, decay=np.array([0.9, 0.5])),
        ),
    ]
    for ours, dense in baselines:

        def slope(sign, dense=dense):
            moved = [a + sign * 1e-6 * d for a, d in zip(arrays, directions, strict=True)]
            return np.sin(dense(*moved)).sum()

        def loss(*arrays, ours=ours):
            return jnp.sum(jnp.sin(in_calls(ours, arrays, 2)[0]))

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*map(jnp.asarray, arrays))
        along = sum(np.sum(g * d) for g, d in zip(gradients, directions, strict=True))
        np.testing.assert_allclose(along, (slope(1) - slope(-1)) / 2e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 1e-2)])
def test_precision(dtype, tolerance):
    """The hybrid's own bounds, of the root mean square; sums and scores in float32 whatever the inputs."""
    arrays = [jnp.asarray(a, dtype) for a in drawn(200, 32, 32, 32)]
    arrays[2] = arrays[2] - jnp.asarray(1, dtype)
    wide = [np.asarray(a, np.float64) for a in arrays]
    out, state = linear_attention(*arrays, chunk=40, return_state=True)
    assert state.s.dtype == state.z.dtype == jnp.float32
    for ours, exact in [
        (window_attention(*arrays, chunk=40, overlap=24, sink=8), dense_window(*wide, chunk=40, overlap=24, sink=8)),
        (out, dense_linear(*wide, chunk=40, causal=True, decay=np.ones(2))),
    ]:
        assert ours.dtype == dtype
        error = np.sqrt(np.mean(np.square(np.asarray(ours, np.float64) - exact)) / np.mean(np.square(exact)))
        assert error < tolerance


def test_state_does_not_grow():
    """From ``WindowState.zeros``, which is no initial state: one program for every chunk, with a window and a sink that
    fill up over several."""
    arrays = [jnp.asarray(a, jnp.float32) for a in drawn(24, 3, 3, 3)]
    options = {"chunk": 2, "overlap": 7, "sink": 5}
    whole = window_attention(*arrays, **options)
    step = jax.jit(functools.partial(window_attention, **options, return_state=True))
    state = WindowState.zeros(2, heads=2, head_dim=3, overlap=7, sink=5)
    for begin in range(0, 24, 2):
        out, state = step(*(a[:, begin : begin + 2] for a in arrays), initial_state=state)
        np.testing.assert_allclose(out, whole[:, begin : begin + 2], atol=1e-6)
    assert step._cache_size() == 1
    assert int(state.seen) == 12
    np.testing.assert_array_equal(state.sink_k, arrays[1][:, :5])


SUMS = linear_attention(*(jnp.ones((1, 4, 2, 3)),) * 3, chunk=2, return_state=True)[1]
WINDOW = WindowState.zeros(1, heads=2, head_dim=3, overlap=1)


@pytest.mark.parametrize(
    ("baseline", "wrong", "error", "message"),
    [
        ("window", {"chunk": 0}, ConfigError, "chunk"),
        ("window", {"overlap": -1}, ConfigError, "overlap"),
        ("window", {"sink": -1}, ConfigError, "sink"),
        ("window", {"k": jnp.ones((1, 5, 2, 3))}, RehyatError, "k is"),
        ("window", {"q": jnp.ones((4, 2, 3))}, RehyatError, "q must be"),
        ("window", {"overlap": 2, "initial_state": WINDOW}, RehyatError, r"state's k is float32\[1, 1, 2, 3\]"),
        ("window", {"sink": 2, "initial_state": WINDOW}, RehyatError, "state's sink_k"),
        ("linear", {"chunk": 0}, ConfigError, "chunk"),
        ("linear", {"causal": False, "initial_state": SUMS}, ConfigError, "causal=True"),
        ("linear", {"causal": False, "return_state": True}, ConfigError, "causal=True"),
        ("linear", {"causal": False, "decay": jnp.ones(2)}, ConfigError, "causal=True"),
        ("linear", {"decay": jnp.ones(3)}, RehyatError, "decay"),
        ("linear", {"v": jnp.ones((1, 5, 2, 3))}, RehyatError, "v is"),
        ("linear", {"features_k": jnp.ones((1, 4, 2, 5))}, RehyatError, "features_k is"),
        ("linear", {"initial_state": SUMS._replace(s=SUMS.s[..., :2])}, RehyatError, "state's s"),
    ],
)
def test_mistakes_are_named(baseline, wrong, error, message, monkeypatch):
    # As in a user's program, where nothing checks the annotations first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    attention, names, options = {
        "window": (window_attention, ("q", "k", "v"), {"chunk": 2, "overlap": 1}),
        "linear": (linear_attention, ("features_q", "features_k", "v"), {"chunk": 2}),
    }[baseline]
    arrays = dict(zip(names, itertools.repeat(jnp.ones((1, 4, 2, 3))), strict=False))
    with pytest.raises(error, match=message):
        attention(**{**arrays, **options, **wrong})
