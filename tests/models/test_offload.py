"""Blocks that stay in the host's memory: where they lie, and that they make the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.checkpoint import save_tiny_checkpoint
from shared.videos import PROMPT

from rehyat_jax import HybridConfig, TextToVideo, load_text_encoder, load_transformer
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
