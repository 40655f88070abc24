"""Mixers that differ from block to block: each block against its own mixer, and what one model of them is."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.tiers import full
from shared.training import random_module
from shared.wan import STUDENT_CASE as CASE
from shared.wan import TINY, by_us, inputs, relative, streamed

from rehyat_jax.attention.sharded import softmax_over_devices
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers import BlockMixers, Hybrid, HybridConfig, Linear, Softmax, Window, read_conversion
from rehyat_jax.models.checkpoints import describe, load_transformer, save_transformer
from rehyat_jax.models.wan.mixing import Mixing
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.mesh import AXES, spec
from rehyat_jax.runtime.variables import MixerParam
from train.engine.arithmetic import forward_flops

FOUR = dataclasses.replace(TINY, num_layers=4)
#: Chunks, overlaps, degrees and mixers differ; one is the teacher's.
MIXED = BlockMixers((Hybrid(chunk_frames=2, degree=3), Softmax(), Window(sink_frames=1), Hybrid(chunk_frames=3)))
#: Of one chunk, so that they stream.
STREAMING = BlockMixers((Hybrid(), Window(sink_frames=1), Linear(decay=True), Hybrid()))


@functools.cache
def _model(hybrid) -> WanTransformer:
    """Random numbers everywhere, and mixers whose past counts."""
    model = random_module(lambda: WanTransformer(FOUR, hybrid=hybrid, rngs=nnx.Rngs(0)), 0)
    rng = np.random.default_rng(0)

    def heard(p: jax.Array) -> jax.Array:
        return jnp.asarray(np.asarray(p) + 0.3 * np.abs(rng.normal(size=p.shape)), p.dtype)

    nnx.update(model, jax.tree.map(heard, nnx.state(model, MixerParam)))
    return model


def _mixers(model: WanTransformer) -> list:
    """Each block's own module."""
    mixing = model.mixing
    modules = dict(zip(mixing.groups, mixing.modules(model.hybrid_blocks), strict=True))

    def own(block: int):
        mixer = mixing.mixers[block]
        graph, state = nnx.split(modules[mixer])
        return nnx.merge(graph, jax.tree.map(lambda x: x[mixing.blocks(mixer).index(block)], state))

    return [own(block) for block in range(len(mixing.mixers))]


@pytest.mark.parametrize("hybrid", [pytest.param(MIXED, id="mixed"), full(STREAMING, id="streaming")])
def test_every_block_attends_by_its_own_mixer_with_its_own_parameters(hybrid):
    """Against a walk through the blocks one by one, each with the module of its number: float32, 1e-5 relative."""
    model = _model(hybrid)

    @jax.jit
    def walk(latents, times, text):
        given, embedded = model.embed(latents, times), model.embed_text(text)
        graph, layers = nnx.split(model.blocks)
        x = given.x
        for block, mixer in enumerate(_mixers(model)):
            layer = nnx.merge(graph, jax.tree.map(lambda p, block=block: p[block], layers))
            x, _ = layer.attending(
                x,
                embedded,
                given.modulation,
                given.rotary,
                lambda q, k, v, mixer=mixer: (mixer(q, k, v, frame=6), None),
            )
        return model.unembed(x, given)

    walked = np.asarray(walk(*map(jnp.asarray, inputs(CASE))))
    assert relative(by_us(model, *inputs(CASE)), walked) < 1e-5
    assert relative(by_us(model.with_hybrid(None), *inputs(CASE)), walked) > 1e-3


def test_different_mixers_of_one_chunk_stream():
    """1e-5 relative to the whole call, as for one mixer; the last chunk is short."""
    model = _model(STREAMING)
    parts, programs = streamed(model, *map(jnp.asarray, inputs(CASE)), [3, 3, 1])
    assert relative(parts, by_us(model, *inputs(CASE))) < 1e-5
    assert programs == 2


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (MIXED.blocks, "block 1 of 4 attend to the whole video by softmax"),
        (
            (Hybrid(chunk_frames=2), Linear(), Linear(), Window()),
            "chunks of different lengths in frames (block 0 of 2, blocks 1-2 of 3, block 3 of 3)",
        ),
        ((Hybrid(), Hybrid(causal=False), Linear(causal=False), Window()), "block 1 of 4 are not causal"),
    ],
    ids=["softmax", "chunks", "causal"],
)
def test_what_keeps_a_mixed_model_from_streaming_is_said(blocks, words):
    model = nnx.eval_shape(lambda: WanTransformer(FOUR, hybrid=BlockMixers(blocks), rngs=nnx.Rngs(0)))
    assert words in model.why_not_stream()
    with pytest.raises(RehyatError, match="the model cannot stream"):
        model.init_state(1, 4, 6)


def test_saved_loaded_and_described(tmp_path):
    model = _model(MIXED)
    save_transformer(model, tmp_path / "mixed")
    assert json.loads((tmp_path / "mixed" / "rehyat" / "config.json").read_text())["version"] == 2
    again = load_transformer(tmp_path / "mixed")
    assert again.hybrid == MIXED
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, again))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf.get_value(), theirs[path].get_value(), err_msg=str(path))
    text = str(describe(tmp_path / "mixed"))
    assert "hybrid      blocks 0, 2-3 of 4" in text
    assert "mixer       hybrid in block 0: chunk_frames 2" in text
    assert "mixer       window in block 2: chunk_frames 3, overlap_frames 1, sink_frames 1" in text


def test_a_form_of_one_mixer_has_the_places_of_a_flat_configuration():
    """So that checkpoints and streams of either are the other's: parameters by name, mixer states by name."""
    flat, named = (_model(hybrid) for hybrid in (HybridConfig(decay=True), BlockMixers((Hybrid(decay=True),) * 4)))
    assert flat.mixing == named.mixing
    for trees in ([nnx.state(m) for m in (flat, named)], [m.init_state(1, 4, 6) for m in (flat, named)]):
        one, other = ([jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)] for tree in trees)
        assert one == other


@pytest.mark.full
def test_other_settings_with_the_same_parameters():
    model = _model(MIXED)
    wider = dataclasses.replace(MIXED.blocks[0], overlap_frames=2)
    other = model.with_hybrid(BlockMixers((wider, *MIXED.blocks[1:])))
    assert relative(by_us(other, *inputs(CASE)), by_us(model, *inputs(CASE))) > 1e-4
    for blocks in ((MIXED.blocks[3], *MIXED.blocks[1:]), (Hybrid(degree=1), *MIXED.blocks[1:])):
        with pytest.raises(ConfigError, match="anew"):
            model.with_hybrid(BlockMixers(blocks))


def test_arithmetic_is_the_sum_of_the_blocks_own():
    """Of n blocks of one mixer, n-th of what differs from the teacher's."""
    shape, teacher = (6, 4, 6), forward_flops(FOUR, None, shape=(6, 4, 6))
    each = [
        (forward_flops(FOUR, BlockMixers((mixer,) * 4), shape=shape) - teacher) / 4 if mixer.converts else 0
        for mixer in MIXED.blocks
    ]
    assert forward_flops(FOUR, MIXED, shape=shape) - teacher == sum(each)


def test_a_selection_of_blocks_keeps_their_parameters():
    model = _model(MIXED)
    fewer = MIXED.only((2, 3))
    assert fewer == BlockMixers((Softmax(), Softmax(), *MIXED.blocks[2:]))
    kept = model.with_hybrid(fewer, blocks=model.mixing.selected(model.hybrid_blocks, Mixing.of(fewer, 4)))
    for ours, theirs in zip(_mixers(kept)[2:], _mixers(model)[2:], strict=True):
        for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (ours, theirs)), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "of version 3 is not known here"),
        ({"version": "2"}, "of version 2 is not known here"),
        ({"blocks": [0, 1, 2]}, "BlockMixers is of 3 blocks, and the model has 4"),
        ({"blocks": [0, 1, 9, 0]}, "numbers of its 4 mixers"),
        ({"blocks": [1, 1, 1, 1]}, "converts no block"),
        ({"blocks": 3}, "must be lists"),
        ({"mixers": [{"mixer": "magic"}]}, "numbers of its 1 mixers"),
        ({"mixers": [{"mixer": "magic"}] * 4}, "there is no mixer 'magic'"),
        ({"mixers": [{"mixer": ["hybrid"]}] * 4}, "there is no mixer"),
        ({"mixers": [{"chunk_frames": 3}] * 4}, "its name under 'mixer'"),
        ({"mixers": [{"mixer": "hybrid", "chunk_frames": 0}] * 4}, "chunk_frames"),
        ({"mixers": [{"mixer": "window", "degree": 2}] * 4}, "has no 'degree'"),
        ({"mixers": [{"mixer": "hybrid", "implementation": "scan"}] * 4}, "has no 'implementation'"),
        ({"surprise": 1}, "nothing else"),
    ],
    ids=str,
)
def test_hostile_files_are_refused_in_one_sentence(change, words):
    source = json.loads(json.dumps(MIXED.to_dict())) | change
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as raised:
        read_conversion(source).mixers(4)
    assert "\n" not in str(raised.value)


def test_mixer_states_are_sharded_by_batch_and_heads():
    """Constraints of a program on a mesh: sums, kept tokens and sinks."""
    mesh = jax.sharding.AbstractMesh((2, 1, 1, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    model = nnx.eval_shape(lambda: WanTransformer(FOUR, hybrid=STREAMING, rngs=nnx.Rngs(0)))
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(lambda: model.init_state(2, 4, 6))()
    found = {str(eqn.params["sharding"].spec) for eqn in program.eqns if eqn.primitive.name == "sharding_constraint"}
    assert str(spec("batch", "stream heads", None, None)) in found
    assert str(spec("batch", None, "stream heads", None)) in found


def test_softmax_is_the_teachers():
    q, k, v = (jnp.asarray(np.random.default_rng(i).normal(size=(1, 6, 2, 12)), jnp.float32) for i in range(3))
    np.testing.assert_array_equal(Softmax().make()(q, k, v, frame=3), softmax_over_devices(q, k, v))
