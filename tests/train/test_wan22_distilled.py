"""Wan2.2's 5B from end to end at tiny sizes: distilled from its own trajectories, saved, streamed from an image."""

import json

import numpy as np
import pytest
from shared.families import tiny_ti2v
from shared.training import distillation
from shared.videos import PROMPT, image_of

from rehyat_jax import TextToVideo
from rehyat_jax.mixers.config import HybridConfig
from train.data.sources import Source


@pytest.mark.full
def test_a_5b_is_distilled_and_streams_from_an_image(tmp_path):
    tiny_ti2v(tmp_path / "teacher")
    hybrid = HybridConfig(chunk_frames=1, overlap_frames=1)
    training = distillation(
        tmp_path / "teacher",
        tmp_path / "student",
        hybrid=hybrid,
        sources=(Source(frames=13, height=64, width=64, batch=2),),
        steps=64,
        measure_rounds=16,
    )
    training.run()
    measured = [json.loads(line) for line in (training.train_folder / "blocks.jsonl").read_text().splitlines()]
    for first, last in zip(measured[0]["error"], measured[-1]["error"], strict=True):
        assert last < 0.98 * first
    pipe = TextToVideo.from_pretrained(training.out, cache_dir=tmp_path / "cache")
    assert (pipe.transformer.hybrid, pipe.traits.clean_first_frame, pipe.fps) == (hybrid, True, 24)
    stream = pipe.open_stream(PROMPT, image=image_of(64, 64), height=64, width=64, num_inference_steps=2, seed=3)
    blocks = [next(stream), next(stream)]
    assert [len(block) for block in blocks] == [1, 4]
    stream.save(tmp_path / "kept")
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path / "kept")), next(stream))
