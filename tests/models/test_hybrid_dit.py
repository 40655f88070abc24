"""The transformer with converted blocks: against the equation in torch between diffusers' own projections, then against
the teacher, itself in a stream, and its own promises."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import diffusers.models.transformers.transformer_wan as diffusers_wan
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from shared import tiers
from shared.wan import STUDENT as TINY
from shared.wan import STUDENT_CASE as CASE
from shared.wan import (
    Case,
    abstract,
    by_diffusers,
    by_us,
    compiled_for_speed,
    inputs,
    ported,
    reference,
    relative,
    scans,
    streamed,
)

from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.variables import MixerParam

FRAME = 6


def randomised(model: WanTransformer, seed: int = 0) -> WanTransformer:
    """Hybrid blocks far from their start, so that what is outside the window counts; decays between 0.6 and 1,
    powers of the length between 0 and 1."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, MixerParam)

    def far(p: jax.Array) -> jax.Array:
        # Biases [L, H, O] anew: those at the start are for a past that is hardly heard.
        return jnp.asarray((p if p.ndim == 4 else -2) + 0.3 * rng.standard_normal(p.shape, np.float32))

    noise = jax.tree.map(far, state)
    if model.hybrid.decay:
        rate = noise["hybrid_blocks"]["decay_rate"]
        rate.set_value(jnp.asarray(rng.uniform(0, 0.5, rate.get_value().shape), jnp.float32))
    if model.hybrid.length_norm:
        power = noise["hybrid_blocks"]["length_power"]
        power.set_value(jnp.asarray(rng.uniform(0, 1, power.get_value().shape), jnp.float32))
    nnx.update(model, noise)
    return model


def student(hybrid: HybridConfig, case: Case = CASE, *, folder: Path, seed: int = 0) -> WanTransformer:
    model = ported(reference(case.config, seed), folder)
    return randomised(model.with_hybrid(hybrid, rngs=nnx.Rngs(seed)), seed)


def phi(x: torch.Tensor, parameters: nnx.State, block: int, hybrid: HybridConfig) -> torch.Tensor:
    """method.md §1: per head an MLP, its output's i-th part to the power i. x is [B, N, H, D]."""
    activation = {
        "gelu": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
    }[hybrid.activation]
    positive = {"softplus": torch.nn.functional.softplus, "exp": torch.exp}[hybrid.positive]
    for i in range(hybrid.layers):
        kernel, bias = (
            torch.from_numpy(np.array(parameters["layers"][i][name][...][block], np.float64))
            for name in ("kernel", "bias")
        )
        x = torch.einsum("bnhi,hio->bnho", x, kernel) + bias
        x = activation(x) if i < hybrid.layers - 1 else positive(x)
    return torch.cat([part ** (i + 1) for i, part in enumerate(x.chunk(hybrid.degree, dim=-1))], dim=-1)


def equation(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, model: WanTransformer, block: int) -> torch.Tensor:
    """method.md §1 and §2 (with §5's decay, and the past's weight by its length) in float64, a chunk at a time;
    ``block`` counts converted blocks."""
    hybrid, dtype = model.hybrid, q.dtype
    q, k, v = (x.double() for x in (q, k, v))
    state = nnx.state(model.hybrid_blocks)
    if hybrid.kind == "window":
        features_q = features_k = torch.zeros(*q.shape[:3], 1, dtype=torch.float64)
    else:
        features_q = phi(q, state["phi_q"], block, hybrid)
        features_k = phi(k, state["phi_k"], block, hybrid)
    gamma = torch.ones(q.shape[2], dtype=torch.float64)
    if hybrid.decay:
        gamma = torch.exp(-torch.from_numpy(np.array(state["decay_rate"][...][block], np.float64)))
    power = torch.zeros_like(gamma)
    if hybrid.length_norm:
        power = torch.from_numpy(np.array(state["length_power"][...][block], np.float64))
    frames, out = q.shape[1] // FRAME, torch.zeros_like(v)
    frame_of = torch.arange(q.shape[1]) // FRAME

    def start(t: int) -> int:
        return max(t * hybrid.chunk_frames - hybrid.overlap_frames, 0)

    s = torch.zeros(q.shape[0], q.shape[2], features_k.shape[-1], q.shape[3], dtype=torch.float64)
    z = s[..., 0].clone()
    for t in range(-(-frames // hybrid.chunk_frames)):
        mine = frame_of // hybrid.chunk_frames == t
        near = (frame_of >= start(t)) & (frame_of < (t + 1) * hybrid.chunk_frames)
        if hybrid.kind == "window":
            near |= (frame_of < hybrid.sink_frames) & (frame_of < (t + 1) * hybrid.chunk_frames)
        scores = torch.einsum("bihd,bjhd->bhij", q[:, mine], k[:, near]) * q.shape[-1] ** -0.5
        c = {
            "row_max": scores.amax(-1, keepdim=True),
            "lse": scores.logsumexp(-1, keepdim=True),
            "none": torch.zeros_like(scores[..., :1]),
        }[hybrid.stabilizer]
        weights = torch.exp(scores - c)
        if hybrid.causal:
            less = (1 + start(t) / hybrid.chunk_frames) ** -power
            past_s, past_z = s * less[None, :, None, None], z * less[None, :, None]
        else:
            past_s = torch.einsum("bjhf,bjhd->bhfd", features_k[:, ~near], v[:, ~near])
            past_z = features_k[:, ~near].sum(1)
        a = torch.einsum("bhij,bjhd->bihd", weights, v[:, near])
        n = weights.sum(-1).transpose(1, 2)
        if hybrid.kind == "linear":
            # No window: what a chunk adds is itself, before it reads.
            left = mine if hybrid.causal else frame_of >= 0
            past_s = gamma[None, :, None, None] * s + torch.einsum("bjhf,bjhd->bhfd", features_k[:, left], v[:, left])
            past_z = gamma[None, :, None] * z + features_k[:, left].sum(1)
            s, z = (past_s, past_z) if hybrid.causal else (s, z)
            a, n = torch.zeros_like(a), torch.zeros_like(n)
        a = a + torch.einsum("bihf,bhfd->bihd", features_q[:, mine], past_s)
        n = n + torch.einsum("bihf,bhf->bih", features_q[:, mine], past_z)
        out[:, mine] = a / n[..., None]
        if hybrid.kind == "linear":
            continue
        left = (frame_of >= start(t)) & (frame_of < start(t + 1))
        s = gamma[None, :, None, None] * s + torch.einsum("bjhf,bjhd->bhfd", features_k[:, left], v[:, left])
        z = gamma[None, :, None] * z + features_k[:, left].sum(1)
    return out.to(dtype)


SETTINGS = {
    "published": HybridConfig(),
    "some_blocks_overlap_above_chunk": HybridConfig(
        blocks=(0, 2), chunk_frames=2, overlap_frames=3, stabilizer="lse", layers=3, degree=3, activation="silu"
    ),
    "not_causal": HybridConfig(causal=False, chunk_frames=2, stabilizer="none", positive="exp", layers=1),
    "window": HybridConfig(kind="window"),
    "window_with_sinks": HybridConfig(kind="window", chunk_frames=1, sink_frames=3, blocks=(0, 2)),
    "linear": HybridConfig(kind="linear", chunk_frames=2),
    "linear_not_causal": HybridConfig(kind="linear", causal=False),
    "linear_decay": HybridConfig(kind="linear", chunk_frames=2, decay=True, blocks=(1,)),
    "decay": HybridConfig(blocks=(1, 2), chunk_frames=1, overlap_frames=0, decay=True, activation="relu", degree=1),
    "length_norm": HybridConfig(chunk_frames=2, overlap_frames=1, length_norm=True, blocks=(0, 2)),
}


@pytest.mark.parametrize("name", tiers.breadth(SETTINGS))
def test_agrees_with_the_equation_between_diffusers_projections(name, tmp_path, monkeypatch):
    """diffusers' model, whose attention function is the equation wherever a block is converted: 1e-4 absolute on
    activations of order one, as for the teacher."""
    ours = student(SETTINGS[name], folder=tmp_path)
    model = reference(TINY, seed=0)
    # Self- and cross-attention of each block, in turn.
    block = itertools.count()
    softmax = diffusers_wan.dispatch_attention_fn

    def attend(q, k, v, **options):
        which, cross = divmod(next(block), 2)
        if cross or not ours.converted[which]:
            return softmax(q, k, v, **options)
        return equation(q, k, v, ours, sum(ours.converted[:which]))

    teachers = by_diffusers(model, *inputs(CASE))
    monkeypatch.setattr(diffusers_wan, "dispatch_attention_fn", attend)
    theirs = by_diffusers(model, *inputs(CASE))
    assert relative(theirs, teachers) > 0.02
    np.testing.assert_allclose(by_us(ours, *inputs(CASE)), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [7, tiers.full(1000)])
@pytest.mark.parametrize(
    "options", tiers.breadth([{}, {"blocks": (1,)}, {"causal": False}, {"overlap_frames": 0}]), ids=str
)
def test_a_chunk_of_the_whole_video_is_the_teacher(options, chunk, tmp_path):
    """1e-6 relative: the same numbers, summed in another order."""
    model = student(HybridConfig(chunk_frames=chunk, **options), folder=tmp_path)
    teacher = model.with_hybrid(None)
    assert relative(by_us(model, *inputs(CASE)), by_us(teacher, *inputs(CASE))) < 1e-6


STREAMS = {
    "published": HybridConfig(),
    "several_chunks": HybridConfig(),
    "overlap_above_chunk": HybridConfig(chunk_frames=2, overlap_frames=5),
    "no_overlap": HybridConfig(chunk_frames=2, overlap_frames=0, decay=True, stabilizer="lse"),
    "window": HybridConfig(kind="window", chunk_frames=2, sink_frames=2),
    "linear": HybridConfig(kind="linear", decay=True),
    "length_norm": HybridConfig(chunk_frames=2, length_norm=True, decay=True),
}


@pytest.mark.parametrize("name", tiers.breadth(STREAMS))
def test_chunk_by_chunk_is_the_whole_call(name, tmp_path):
    """1e-5 relative in float32; pieces of one chunk, of several, and a last that is short."""
    model = student(STREAMS[name], folder=tmp_path)
    chunk = STREAMS[name].chunk_frames
    pieces = [6, 1] if name == "several_chunks" else [chunk] * (7 // chunk) + [1]
    parts, _ = streamed(model, *map(jnp.asarray, inputs(CASE)), pieces)
    assert relative(parts, by_us(model, *inputs(CASE))) < 1e-5


def test_patches_in_time_stream(tmp_path):
    """Chunks count frames of the grid: two latent frames each here; with zeros after the text's 5 tokens; 1e-5."""
    case = Case(dataclasses.replace(TINY, patch_size=(2, 2, 2)), (10, 4, 6), 5, (500.0, 31.5))
    model = student(HybridConfig(chunk_frames=2, length_norm=True), case, folder=tmp_path)
    arguments = inputs(case)
    parts, _ = streamed(model, *map(jnp.asarray, arguments), [4, 4, 2], text_tokens=40)
    padded = np.pad(arguments[2], ((0, 0), (0, 35), (0, 0)))
    assert relative(parts, by_us(model, *arguments[:2], padded)) < 1e-5


def test_one_program_serves_every_chunk(tmp_path):
    """The first chunk, the second and the sixth; positions and the overlap's filling are data, not shapes."""
    case = dataclasses.replace(CASE, sizes=(18, 4, 6))
    model = student(HybridConfig(), case, folder=tmp_path)
    parts, programs = streamed(model, *map(jnp.asarray, inputs(case)), [3] * 6)
    assert programs == 1
    assert relative(parts, by_us(model, *inputs(case))) < 1e-5


def test_a_state_does_not_know_how_long_the_video_is():
    """At 1.3B, 480 × 832: s and z 1.585 MB a block, as published for float32 at 12 × 256 × 129; no memory needed."""
    model = nnx.eval_shape(
        lambda: WanTransformer(WanConfig(), hybrid=HybridConfig(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    state = jax.eval_shape(lambda: model.init_state(1, 60, 104))
    assert state.s.shape == (30, 1, 12, 256, 128)
    assert (state.s.size + state.z.size) * 4 / 30 == pytest.approx(1.585e6, rel=1e-3)
    assert state.k.shape == (30, 1, 1560, 12, 128)
    assert state.k.dtype == state.features_k.dtype == jnp.bfloat16
    assert (state.k.size + state.v.size) * 2 / 30 == pytest.approx(9.6e6, rel=2e-3)


def test_positions_far_into_a_stream(tmp_path):
    """Softmax sees differences of positions alone: far frames shifted by as much again see the same, and not what the
    first frames would. 1e-4 of the output: float32 rounding of cos and sin, some 1e-6 a pair, across three blocks."""
    model = student(HybridConfig(chunk_frames=7), folder=tmp_path)
    latents, times, text = map(jnp.asarray, inputs(CASE))
    state, read = model.init_state(2, 4, 6), model.precompute_text_kv(text)
    graph, weights = nnx.split(model)
    call = jax.jit(lambda w, first: nnx.merge(graph, w).stream(latents, times, read, state, first_frame=first)[0])
    near = np.asarray(call(weights, 0))
    for first in (5000, 10_000_000):
        assert relative(np.asarray(call(weights, first)), near) < 1e-4


@pytest.mark.parametrize(
    ("hybrid", "named"),
    [
        (None, "blocks 0-2 of 3"),
        (HybridConfig(blocks=(1,)), "blocks 0, 2 of 3"),
        (HybridConfig(blocks=(0, 1)), "block 2 of 3"),
        (HybridConfig(causal=False), "blocks 0-2 of 3 are not causal"),
    ],
    ids=str,
)
def test_a_model_that_cannot_stream_says_which_blocks_prevent_it(hybrid, named):
    model = nnx.eval_shape(lambda: WanTransformer(TINY, hybrid=hybrid, rngs=nnx.Rngs(0)))
    assert named in model.why_not_stream()
    with pytest.raises(RehyatError, match=named):
        model.init_state(1, 4, 6)


def test_pieces_that_cut_a_chunk_are_refused(tmp_path):
    model = student(HybridConfig(), folder=tmp_path)
    latents, times, text = map(jnp.asarray, inputs(CASE))
    with pytest.raises(RehyatError, match="7 frames are not a whole number of chunks of 3"):
        model.stream(latents, times, model.precompute_text_kv(text), model.init_state(2, 4, 6), first_frame=0)


def test_uniform_is_attention_surgerys():
    hybrid = HybridConfig.uniform(every=3, num_layers=10, chunk_frames=2)
    assert hybrid.converted(10) == tuple(i % 3 != 0 for i in range(10))
    assert hybrid.chunk_frames == 2


@pytest.mark.parametrize(
    ("depth", "blocks", "expected"),
    [(12, "all", [12]), (12, tuple(i for i in range(12) if i % 3), [4, 2]), (5, (0, 1, 4), [2, 2]), (4, (1, 3), [2])],
    ids=str,
)
def test_a_repeating_pattern_is_one_scan(depth, blocks, expected):
    """Scans over layers: of all; of the period, with the run of two within; of runs where nothing repeats."""
    config = dataclasses.replace(TINY, num_layers=depth)
    hybrid = HybridConfig(blocks=blocks, implementation="reference")
    model = nnx.eval_shape(lambda: WanTransformer(config, hybrid=hybrid, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    program = jax.make_jaxpr(lambda p, *x: nnx.merge(graph, p)(*x))(state, *inputs(CASE)).jaxpr
    assert scans(program) == expected


def test_gradients_reach_what_is_asked_for_alone_and_rematerialised_are_the_same(tmp_path):
    """Of the hybrid blocks alone by their filter, of every parameter without; blocks computed anew in the backward
    pass, or in no loop, change nothing but rounding: 1e-5 relative."""
    model = student(HybridConfig(decay=True, length_norm=True), folder=tmp_path)
    arguments = [jnp.asarray(x) for x in inputs(CASE)]

    def gradient(wanted: nnx.filterlib.Filter, **how: Any) -> dict:
        graph, own, rest = nnx.split(model, wanted, ...)

        @jax.jit
        @jax.grad
        def slope(own: nnx.State, rest: nnx.State) -> jax.Array:
            return jnp.sum(jnp.square(nnx.merge(graph, own, rest)(*arguments, **how)))

        return dict(nnx.to_flat_state(slope(own, rest)))

    alone, every = gradient(MixerParam, unroll=True), gradient(nnx.Param, remat="products")
    own = nnx.to_flat_state(nnx.state(model.hybrid_blocks))
    assert set(alone) == {("hybrid_blocks", *path) for path, _ in own}
    assert every.keys() == dict(nnx.to_flat_state(nnx.state(model))).keys()
    assert np.abs(every["blocks", "attn1", "to_q", "kernel"].get_value()).max() > 0
    for path, leaf in alone.items():
        assert np.abs(leaf.get_value()).max() > 0
        assert relative(np.asarray(every[path].get_value()), np.asarray(leaf.get_value())) < 1e-5


def test_decay_starts_at_one_and_never_passes_it(tmp_path):
    """At its start a model with decay is the one without, bit for bit; there a gradient step moves γ down, never up."""
    case = CASE
    teacher = ported(reference(TINY, seed=0), tmp_path)
    plain, fading = (teacher.with_hybrid(HybridConfig(decay=decay), rngs=nnx.Rngs(0)) for decay in (False, True))
    np.testing.assert_array_equal(by_us(fading, *inputs(case)), by_us(plain, *inputs(case)))

    def gamma(rate: float) -> jax.Array:
        graph, params = nnx.split(fading.hybrid_blocks)
        block = nnx.merge(graph, jax.tree.map(lambda p: p[0], params))
        block.decay_rate.set_value(jnp.full(2, rate))
        return block.decay

    def slope(sign: float, rate: float) -> float:
        return float(jax.grad(lambda r: sign * gamma(r).sum())(rate))

    # Minimising γ: the rate grows. Minimising −γ at γ = 1: it stays.
    assert slope(1.0, 0.0) == -2
    assert slope(-1.0, 0.0) == 0
    assert slope(-1.0, 0.1) == pytest.approx(2 * np.exp(-0.1), rel=1e-6)
    np.testing.assert_array_equal(gamma(-0.3), np.ones(2))


@pytest.mark.full
def test_a_model_with_a_weight_of_the_past_starts_as_the_one_without(tmp_path):
    """Bit for bit, as users compile."""
    teacher = ported(reference(TINY, seed=0), tmp_path)
    with_it, without = (
        by_us(
            teacher.with_hybrid(HybridConfig(length_norm=norm, **BY_LENGTH), rngs=nnx.Rngs(0)),
            *inputs(CASE),
            program=compiled_for_speed,
        )
        for norm in (True, False)
    )
    np.testing.assert_array_equal(with_it, without)


BY_LENGTH = {"chunk_frames": 2, "overlap_frames": 1}


def test_the_pasts_weight_falls_by_a_power_of_its_length_that_starts_at_zero():
    """At its start it is one, bit for bit; there descent makes the past weigh less, never more. Frames before a window
    of two and one: 0 0, 1 1, 3 3, 5 5, …; 2⁻¹ at one chunk's length of them."""
    hybrid = HybridConfig(length_norm=True, **BY_LENGTH)
    normed = nnx.jit(lambda: WanTransformer(TINY, hybrid=hybrid, rngs=nnx.Rngs(0)))()
    graph, params = nnx.split(normed.hybrid_blocks)
    assert not np.any(params["length_power"].get_value())

    def weight(power: jax.Array) -> jax.Array:
        block = nnx.merge(graph, jax.tree.map(lambda p: p[0], params))
        block.length_power.set_value(power)
        return block.past_weight(8 * FRAME, frame=FRAME, first=2)

    expected = np.outer(1 + np.repeat([1, 3, 5, 7], 2 * FRAME) / 2, np.ones(2)) ** -np.array([1.0, 0.5])
    np.testing.assert_allclose(weight(jnp.array([1.0, 0.5])), expected, rtol=1e-6)
    np.testing.assert_array_equal(weight(jnp.zeros(2)), np.ones_like(expected))
    for sign, slope in ((1.0, -np.log(4.5)), (-1.0, 0.0)):
        gradient = jax.grad(lambda p, sign=sign: sign * weight(p)[-1].sum())(jnp.zeros(2))
        np.testing.assert_allclose(gradient, slope, rtol=1e-6)


def test_a_block_hands_out_what_distillation_needs(tmp_path):
    """q, k, v and the softmax output of every block in one pass, and the teacher's own result: 1e-6."""
    teacher = ported(reference(TINY, seed=0), tmp_path)
    latents, times, text = (jnp.asarray(x) for x in inputs(CASE))
    given, text = teacher.embed(latents, times), teacher.embed_text(text)
    graph, layers = nnx.split(teacher.blocks)

    def attend(q, k, v):
        y = softmax_attention(q, k, v)
        return y, (q, k, v, y)

    def step(x, layer):
        block = nnx.merge(graph, layer)
        return block.attending(x, block.precompute_text_kv(text), given.modulation, given.rotary, attend)

    x, (q, k, v, y) = jax.lax.scan(step, given.x, layers)
    assert q.shape == k.shape == v.shape == y.shape == (3, 2, 7 * FRAME, 2, 12)
    assert relative(np.asarray(teacher.unembed(x, given)), by_us(teacher, *inputs(CASE))) < 1e-6
    np.testing.assert_allclose(softmax_attention(q[1], k[1], v[1]), y[1], atol=1e-6)


@pytest.mark.full
def test_the_computation_in_bf16(tmp_path):
    """As near to float32 as the teacher in bf16 is, within a factor of two; the state's sums stay float32."""
    case = CASE
    reference(TINY, seed=0).save_pretrained(tmp_path / "theirs")
    exact = student(HybridConfig(), folder=tmp_path / "exact")
    cast = jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(exact.hybrid_blocks))
    teacher = ported(reference(TINY, seed=0), tmp_path, dtype=jnp.bfloat16)
    half = teacher.with_hybrid(HybridConfig(), rngs=nnx.Rngs(0))
    nnx.update(half.hybrid_blocks, cast)
    error = relative(by_us(half, *inputs(case)), by_us(exact, *inputs(case)))
    teachers = relative(by_us(teacher, *inputs(case)), by_us(exact.with_hybrid(None), *inputs(case)))
    assert error < 2 * teachers
    state = half.init_state(2, 4, 6)
    parts, _ = streamed(half, *map(jnp.asarray, inputs(case)), [3, 3, 1])
    assert state.s.dtype == state.z.dtype == jnp.float32
    assert relative(parts, by_us(exact, *inputs(case))) < 2 * teachers


@pytest.mark.full
def test_the_teachers_parameters_do_not_move(tmp_path):
    """Converted with a seed, and made with one: the softmax part is the teacher's, name by name and bit by bit."""
    teacher = nnx.jit(lambda: WanTransformer(TINY, rngs=nnx.Rngs(0)))()
    made = nnx.jit(lambda: WanTransformer(TINY, hybrid=HybridConfig(blocks=(1,)), rngs=nnx.Rngs(0)))()
    for model in (made, teacher.with_hybrid(HybridConfig(), rngs=nnx.Rngs(7))):
        state = nnx.state(model)
        assert state.pop("hybrid_blocks")
        assert nnx.to_flat_state(state).paths == nnx.to_flat_state(nnx.state(teacher)).paths
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(nnx.state(teacher)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_student_attends_in_another_way_with_the_same_parameters(tmp_path):
    """Other chunks and another implementation keep φ; other blocks or another φ need new parameters."""
    model = student(HybridConfig(), folder=tmp_path)
    other = model.with_hybrid(HybridConfig(chunk_frames=2, implementation="reference"))
    assert other.hybrid_blocks.phi_q.layers[0].kernel[...] is model.hybrid_blocks.phi_q.layers[0].kernel[...]
    assert relative(by_us(other, *inputs(CASE)), by_us(model, *inputs(CASE))) > 1e-3
    for hybrid in (HybridConfig(degree=3), HybridConfig(decay=True), HybridConfig(blocks=(0, 1))):
        with pytest.raises(ConfigError, match="anew"):
            model.with_hybrid(hybrid)
    with pytest.raises(ConfigError, match="block 3 of a model of 3"):
        abstract(TINY).with_hybrid(HybridConfig(blocks=(0, 3)), rngs=nnx.Rngs(0))


def test_parameters_of_the_published_size():
    """2.37 M a block at 12 heads of 128, of which no memory is taken."""
    model = nnx.eval_shape(lambda: WanTransformer(WanConfig(), hybrid=HybridConfig(blocks=(0, 5)), rngs=nnx.Rngs(0)))
    state = nnx.state(model.hybrid_blocks)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) / 2 == pytest.approx(2.37e6, rel=2e-3)
