"""A callback with latents, as diffusers' ``callback_on_step_end``, and of streams a chunk at a time."""

import numpy as np
import pytest
import torch
from shared.checkpoint import save_tiny_checkpoint
from shared.videos import PROMPT, noise_of

from rehyat_jax import HybridConfig, TextToVideo
from rehyat_jax.errors import RehyatError
from rehyat_jax.sampling.solvers import Renoise
from rehyat_jax.streams.together import advance_together

SMALL = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 1.0}
STREAM = {name: value for name, value in SMALL.items() if name != "num_frames"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs = save_tiny_checkpoint(folder)
    hybrid = HybridConfig(chunk_frames=2)
    return theirs, TextToVideo.from_pretrained(folder, hybrid=None), TextToVideo.from_pretrained(folder, hybrid=hybrid)


def test_a_call_shows_and_takes_what_diffusers_does(model):
    """Each step's latents are halved, or left: three steps of UniPC in float32, order one: 1e-4."""
    theirs, ours, _ = model
    noise, shown, seen = noise_of(2, 4, 4, 16), [], []

    def by_them(pipeline, step, time, given):
        shown.append(given["latents"].permute(0, 2, 3, 4, 1).numpy())
        return {"latents": given["latents"] / 2} if step == 1 else {}

    def by_us(given):
        seen.append(given)
        return given.latents / 2 if given.step == 2 else None

    latents = torch.from_numpy(noise).permute(0, 4, 1, 2, 3).contiguous()
    theirs(prompt=PROMPT, latents=latents, output_type="latent", callback_on_step_end=by_them, **SMALL)
    ours(PROMPT, noise=noise, on_latents=by_us, **SMALL)
    assert [(each.step, each.steps, each.first_frame) for each in seen] == [(1, 3, 0), (2, 3, 0), (3, 3, 0)]
    for mine, other in zip(seen, shown, strict=True):
        np.testing.assert_allclose(mine.latents, other, atol=1e-4, rtol=0)
    assert np.abs(seen[1].latents).max() > 0.5


def test_a_stream_shows_each_chunk_that_is_its_frames(model):
    pipe, seen = model[2], []
    stream = pipe.open_stream(PROMPT, seed=3, on_latents=seen.append, **STREAM)
    blocks = [next(stream), next(stream)]
    assert [(each.first_frame, each.step, each.latents.shape) for each in seen] == [
        (0, 3, (1, 2, 4, 4, 16)),
        (2, 3, (1, 2, 4, 4, 16)),
    ]
    whole = np.concatenate([each.latents for each in seen], axis=1)
    np.testing.assert_array_equal(pipe.decode(whole)[0], np.concatenate(blocks))
    fork = stream.fork(seed=4)
    assert fork.on_latents is None
    fork.on_latents = seen.append
    alone = stream.fork(seed=4)
    next(alone)
    advance_together([stream, fork])
    assert [each.first_frame for each in seen] == [0, 2, 4, 4]
    assert np.abs(seen[2].latents - seen[3].latents).max() > 0.1  # each row's own


def test_a_call_by_chunks_shows_chunks(model):
    seen = []
    settings = SMALL | {"num_frames": 13, "solver": Renoise()}
    video = model[2](PROMPT, seed=3, on_latents=seen.append, **settings)
    assert [each.first_frame for each in seen] == [0, 2]
    np.testing.assert_array_equal(model[2].decode(np.concatenate([x.latents for x in seen], axis=1))[0], video)


def test_mistakes_are_said(model):
    whole, pipe = model[1:]
    with pytest.raises(RehyatError, match=r"must return None or an array \[1, 2, 4, 4, 16\], not dict"):
        whole(PROMPT, on_latents=lambda seen: {}, **SMALL)
    with pytest.raises(RehyatError, match=r"or an array \[1, 2, 4, 4, 16\], not an array \[2, 4, 4, 16\]"):
        whole(PROMPT, on_latents=lambda seen: seen.latents[0], **SMALL)
    with pytest.raises(RehyatError, match="returned numbers that are not finite"):
        whole(PROMPT, on_latents=lambda seen: seen.latents * np.nan, **SMALL)
    with pytest.raises(RehyatError, match="must return None here: later chunks have seen this one as it is"):
        next(pipe.open_stream(PROMPT, on_latents=lambda seen: seen.latents, **STREAM))
