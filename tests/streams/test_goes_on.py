"""Streams that go on from files: a clip, a picture; and how many steps a machine can take."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from shared.checkpoint import save_tiny_checkpoint

from rehyat_jax import HybridConfig, TextToVideo
from rehyat_jax.errors import RehyatError, RehyatWarning
from rehyat_jax.streams import pace
from rehyat_jax.video.beginning import read_beginning
from rehyat_jax.video.formats import write_video

SMALL = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0}
HYBRID = HybridConfig(chunk_frames=2, overlap_frames=1)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> TextToVideo:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    return TextToVideo.from_pretrained(folder, hybrid=HYBRID, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (15, 16, 16, 3), np.uint8)


def test_a_clip_of_any_length_and_size_is_gone_on_from(pipe, frames, tmp_path):
    """15 frames hold 13 that are whole chunks (8k - 3): the last."""
    write_video(tmp_path / "a.mp4", frames, codec="rgb")
    with pytest.warns(RehyatWarning, match="its last 13 frames of 15"):
        stream = pipe.open_stream("a cat", beginning=tmp_path / "a.mp4", **SMALL)
    given = pipe.open_stream("a cat", beginning=frames[2:], **SMALL)
    np.testing.assert_array_equal(stream.beginning, given.beginning)
    np.testing.assert_array_equal(next(stream), next(given))
    write_video(tmp_path / "short.mp4", frames[:4], codec="rgb")
    with pytest.raises(RehyatError, match="too short to go on from: 4 frames"):
        pipe.open_stream("a cat", beginning=tmp_path / "short.mp4", **SMALL)


def test_other_sizes_are_cropped_with_a_word(tmp_path):
    """Of 24x32 scaled to cover 16x16 (16x21.3) the middle: the outer eighths, of another colour, are cut off."""
    wide = np.zeros((5, 24, 32, 3), np.uint8)
    wide[:, :, 4:28] = 200
    write_video(tmp_path / "wide.mp4", wide, codec="rgb")
    with pytest.warns(RehyatWarning, match="32x24: scaled and cropped to 16x16"):
        read = read_beginning(tmp_path / "wide.mp4", fps=16, height=16, width=16, most=lambda frames: frames)
    # Bicubic interpolation overshoots beside an edge.
    assert np.abs(read[:, :, 1:-1].astype(int) - 200).max() <= 3


def test_a_picture_is_the_first_frame(pipe, frames, tmp_path):
    """The first frame is the picture as the autoencoder has it alone: encoding and decoding are causal in time."""
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    stream = pipe.open_stream("a cat", image=tmp_path / "a.png", **SMALL)
    with pytest.raises(RehyatError, match="once its first chunk is made"):
        stream.save(tmp_path)
    other = stream.fork(seed=5)
    first, second = next(stream), next(other)
    latent = pipe.vae.encode(jnp.asarray(frames[None, :1], jnp.float32) / 127.5 - 1)
    shown = np.asarray(pipe.vae.decode(latent))[0, 0]
    want = np.round(np.clip(shown * 0.5 + 0.5, 0, 1) * 255)
    # To one level: the stream encodes and decodes in compiled programs, this without.
    assert np.abs(first[0].astype(int) - want).max() <= 1
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1:] != second[1:]).any()
    assert stream.frames_done == 5
    stream.save(tmp_path)
    np.testing.assert_array_equal(next(pipe.resume_stream(tmp_path)), next(stream))


def test_pictures_that_do_not_fit_are_sentences(pipe, frames, tmp_path):
    with pytest.raises(RehyatError, match="not both"):
        pipe.open_stream("a cat", image=frames[0], beginning=frames[:13], **SMALL)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(RehyatError, match="no image that can be read"):
        pipe.open_stream("a cat", image=tmp_path / "a.png", **SMALL)


@pytest.mark.parametrize(
    ("fps", "steps", "real_time"),
    [(16, 4, True), (17, 2, True), (32, 2, True), (33, 1, True), (64, 1, True), (65, 1, False)],
)
def test_the_most_steps_that_are_fast_enough(monkeypatch, fps, steps, real_time):
    """A machine that makes 64 frames a second with one step, half as many with two, …; of 8, 4, 2, 1 steps offered."""
    monkeypatch.setattr(pace, "frames_per_second", lambda steps: 64 / steps)
    found = pace.most_steps(lambda steps: steps, [8, 2, 1, 4], fps=fps)
    assert (found.steps, found.real_time) == (steps, real_time)
    assert found.frames_per_second == 64 / steps


def test_steps_are_measured_on_the_model(pipe):
    """Whatever the machine's pace: its own steps, which are all that this model offers."""
    options = {name: value for name, value in SMALL.items() if name != "num_inference_steps"}
    pipe.defaults, before = pipe.defaults.from_dict({"offered_steps": [2]}, otherwise=pipe.defaults), pipe.defaults
    try:
        measured = pipe.real_time_steps("a cat", **options)
    finally:
        pipe.defaults = before
    assert measured.steps == 2
    assert measured.frames_per_second > 0
    assert measured.real_time == (measured.frames_per_second >= 16)
