"""The next chunk begun before this one's frames are decoded: sooner, and the same stream in every way."""

import numpy as np
import pytest
from shared.streams import SMALL

from rehyat_jax.errors import NotFiniteError


def steered(stream, folder, resume):
    """All that can happen to a stream between two chunks, on one that has begun the next."""
    made = [next(stream) for _ in range(3)]
    fork = stream.fork()
    stream.change_prompt("a dog")
    made += [next(stream), next(stream)]
    stream.save(folder)
    return [*made, next(stream), next(fork), next(resume(folder))]


def test_the_same_blocks_whatever_happens_between_them(pipe, tmp_path):
    ahead, alone = (pipe.open_stream("a cat", seed=3, **SMALL) for _ in range(2))
    ahead.ahead = True
    pairs = zip(
        steered(ahead, tmp_path / "ahead", pipe.resume_stream),
        steered(alone, tmp_path / "alone", pipe.resume_stream),
        strict=True,
    )
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


def test_no_chunk_is_begun_that_nobody_takes(pipe, monkeypatch):
    """Blocks of 5, 8 and 8 frames, of which 20 are wanted: three chunks, the third begun while the second is decoded.
    The first waits for nothing that the second compiles."""
    stream, begun = pipe.open_stream("a cat", seed=3, **SMALL), []
    denoise = type(stream._session).denoise_chunk

    def counted(self, *given):
        begun.append(int(given[3]))
        return denoise(self, *given)

    monkeypatch.setattr(type(stream._session), "denoise_chunk", counted)
    stream.ahead, stream.until = True, 20
    asked = []
    for _ in range(3):
        next(stream)
        if stream._ahead is not None:
            stream._ahead[1].result()
        asked.append(list(begun))
    assert asked == [[0], [0, 2, 4], [0, 2, 4]]


def test_what_was_begun_and_fails_is_told_when_it_is_asked_for(pipe, monkeypatch):
    stream = pipe.open_stream("a cat", seed=3, **SMALL)
    stream.ahead = True
    next(stream)
    denoise = type(stream._session).denoise_chunk

    def broken(self, *given):
        latents, states = denoise(self, *given)
        return latents * (np.nan if int(given[3]) == 4 else 1), states

    monkeypatch.setattr(type(stream._session), "denoise_chunk", broken)
    next(stream)
    with pytest.raises(NotFiniteError, match="chunk 3, from latent frame 4 on"):
        next(stream)
