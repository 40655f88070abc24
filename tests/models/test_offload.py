"""Blocks that stay in the host's memory: where they lie, and that they make the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from shared.checkpoint import save_tiny_checkpoint
from shared.videos import PROMPT

from benchmarks.tpu_compiled import device
from rehyat_jax import HybridConfig, TextToVideo, load_text_encoder, load_transformer
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.offload import bytes_on_device
from rehyat_jax.text.tokenizer import Tokenizer, embed_tokens

SIZE = {"height": 16, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(path)
    return path


def _matrices(blocks):
    """Their bytes; they alone are on the host."""
    leaves = jax.tree.leaves(nnx.state(blocks))
    assert all((x.ndim > 2) == (x.sharding.memory_kind == "pinned_host") for x in leaves)
    return sum(x.nbytes for x in leaves if x.ndim > 2)


@pytest.mark.parametrize("quantize", [None, pytest.param("fp8", marks=pytest.mark.full)])
def test_blocks_lie_in_the_hosts_memory(folder, quantize):
    """A loop fetches one block at a time: the compiled program holds less of them at once than all."""
    how = {"quantize": quantize, "hybrid": HybridConfig(chunk_frames=1)}
    model, plain = (load_transformer(folder, offload=offload, **how) for offload in (True, False))
    everything = sum(x.nbytes for x in jax.tree.leaves(nnx.state(plain)))
    assert bytes_on_device(nnx.state(plain)) == everything
    assert bytes_on_device(nnx.state(model)) == everything - _matrices(model.blocks)
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 2, 4, 4, 16), (1, 3, 32))]

    def velocity(model):
        graph, weights = nnx.split(model)
        return jax.jit(lambda w, x, text: nnx.merge(graph, w)(x, jnp.array([500.0]), text))(weights, *inputs)

    np.testing.assert_array_equal(velocity(model), velocity(plain))


def test_the_text_encoders_blocks_too(folder):
    encoder, plain = (load_text_encoder(folder, offload=offload) for offload in (True, False))
    everything = sum(x.nbytes for x in jax.tree.leaves(nnx.state(plain)))
    assert bytes_on_device(nnx.state(encoder)) == everything - _matrices(encoder.block)
    tokens = Tokenizer.from_folder(folder).encode(PROMPT, 512)
    np.testing.assert_array_equal(embed_tokens(encoder, tokens), embed_tokens(plain, tokens))


@pytest.mark.full
def test_a_video_and_a_stream_are_the_same(folder, tmp_path):
    hybrid = HybridConfig(chunk_frames=2)
    small, plain = (
        TextToVideo.from_pretrained(folder, hybrid=hybrid, offload=offload, cache_dir=tmp_path / str(offload))
        for offload in (True, False)
    )
    videos = [pipe(PROMPT, num_frames=5, seed=3, **SIZE) for pipe in (small, plain)]
    np.testing.assert_array_equal(*videos)
    streams = [pipe.open_stream(PROMPT, seed=3, **SIZE) for pipe in (small, plain)]
    np.testing.assert_array_equal(*map(next, streams))
    # The text encoder has left; a cached prompt does not bring it back.
    assert "encoder" not in vars(small.text)
    assert "encoder" in vars(plain.text)


def _compiled(module, *inputs):
    """For a TPU of 16 GiB that need not be there, the parameters where an offloaded module has them."""
    chip = device("v5e:2x2x1")
    module.keep_blocks_on_host()
    graph, state = nnx.split(module)

    def placed(x):
        kind = getattr(getattr(x, "sharding", None), "memory_kind", None)
        kind = "pinned_host" if kind == "pinned_host" else "device"
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(chip, memory_kind=kind))

    program = jax.jit(lambda weights, *args: nnx.merge(graph, weights)(*args))
    traced = program.trace(*jax.tree.map(placed, (state, *inputs)))
    return traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()


KINDS = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


@pytest.mark.full
def test_of_the_text_encoder_a_tpu_holds_the_table_and_two_blocks():
    """UMT5-XXL's 11.4 GB in bfloat16: 2.1 of the embeddings, and of blocks of 0.39 the one that is computed and the
    next, as far as they are matrices."""
    encoder = nnx.eval_shape(lambda: UMT5Encoder(TextEncoderConfig(), **KINDS, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    memory = _compiled(encoder, ids, ids)
    assert memory.argument_size_in_bytes < 2.2e9
    assert memory.host_argument_size_in_bytes > 9e9
    assert memory.temp_size_in_bytes < 2 * 0.39e9


@pytest.mark.full
def test_of_a_transformer_a_tpu_holds_two_blocks():
    """Of 1.3B's, 0.09 GB each; one latent frame of 832x480, 1,560 tokens, takes less."""
    model = nnx.eval_shape(lambda: WanTransformer(WanConfig.t2v_1_3b(), **KINDS, rngs=nnx.Rngs(0)))
    shapes = (((1, 1, 60, 104, 16), jnp.bfloat16), ((1,), jnp.float32), ((1, 64, 4096), jnp.bfloat16))
    memory = _compiled(model, *(jax.ShapeDtypeStruct(*each) for each in shapes))
    assert memory.argument_size_in_bytes < 0.2e9
    assert memory.temp_size_in_bytes < 0.4e9
