"""A student that streams, and a stream of it that was kept: once for every file here."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.checkpoint import save_tiny_checkpoint
from shared.streams import HYBRID, SMALL

from rehyat_jax import TextToVideo, load_transformer
from rehyat_jax.models.checkpoints import save_transformer
from rehyat_jax.runtime.variables import MixerParam


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A student on disk, its feature maps far from their start, so that what has left the window counts."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    student = load_transformer(folder, hybrid=HYBRID)
    rng = np.random.default_rng(0)
    state = nnx.state(student, MixerParam)
    nnx.update(student, jax.tree.map(lambda p: jnp.asarray(p + 0.3 * rng.standard_normal(p.shape, np.float32)), state))
    shutil.rmtree(folder / "transformer")
    save_transformer(student, folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def pipe(checkpoint, cache) -> TextToVideo:
    return TextToVideo.from_pretrained(checkpoint, cache_dir=cache)


@pytest.fixture(scope="session")
def saved(pipe, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A stream kept after two chunks, and the third."""
    stream = pipe.open_stream("a cat", seed=3, **SMALL)
    next(stream), next(stream)
    folder = tmp_path_factory.mktemp("saved")
    stream.save(folder)
    return folder, next(stream)
