"""Streams as rows of one batch: what each makes is what it makes alone, wherever the others stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared.checkpoint import save_tiny_checkpoint

from rehyat_jax import HybridConfig, TextToVideo
from rehyat_jax.errors import NotFiniteError
from rehyat_jax.streams.together import Together, advance_together

SMALL = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}
HYBRID = HybridConfig(chunk_frames=2, overlap_frames=1)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> TextToVideo:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    return TextToVideo.from_pretrained(folder, hybrid=HYBRID, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def streams(pipe):
    """Two streams of other sentences and seeds, one a chunk ahead of the other."""
    ahead, behind = (pipe.open_stream(p, seed=s, **SMALL) for p, s in (("a cat", 0), ("a dog", 5)))
    next(ahead), next(ahead), next(behind)
    return ahead, behind


def test_a_row_makes_what_the_stream_makes_alone(streams):
    """Float32, two steps of two blocks: products of another shape sum in another order, some 1e-6 of numbers of order
    one (2e-5 is the operator's bound); a pixel on the edge between two levels may fall to the other."""
    alone = [stream.fork() for stream in streams]
    blocks = advance_together(streams)
    for stream, block, other in zip(streams, blocks, alone, strict=True):
        want = next(other)
        assert block.shape == want.shape
        assert np.abs(block.astype(int) - want).max() <= 1
        assert stream.frames_done == other.frames_done
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), stream.state.states, other.state.states
        )
    assert (blocks[0] != blocks[1]).any()


def test_a_row_that_fails_fails_alone(streams):
    broken, sound = streams
    alone = sound.fork()
    states = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), broken.state.states)
    broken.state = broken.state._replace(states=states)
    failed, block = advance_together(streams)
    assert isinstance(failed, NotFiniteError)
    assert np.abs(block.astype(int) - next(alone)).max() <= 1


@pytest.mark.full
def test_batches_are_powers_of_two_that_are_compiled_beside(pipe, streams):
    together = Together(most=3)
    first = pipe.open_stream("a cat", **SMALL)
    other = pipe.open_stream("a cat", **(SMALL | {"guidance_scale": 1.0}))
    next(other)
    several = pipe.open_stream(["a cat", "a dog"], **SMALL)
    next(several)
    three = [streams[0], streams[1], streams[0].fork()]
    rows = [*three, first, other, several]
    alone = [[number] for number in range(6)]
    assert sorted(together.batches(rows)) == alone  # nothing is compiled yet: nobody waits
    together.close()
    # The largest power of two up to three; a first chunk, other settings and several videos are for themselves.
    assert sorted(together.batches(rows)) == [[0, 1], [2], [3], [4], [5]]
    assert len(together.advance([streams[0], streams[1]])) == 2
    assert sorted(Together(most=1).batches(three)) == [[0], [1], [2]]
