"""A mixer of another package: the page ``docs/extend/mixer.md``, followed literally."""

import importlib
import importlib.metadata
import json
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.training import WAN, write_teacher
from shared.wan import by_us, streamed

from rehyat_jax.cli import main
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers import base
from rehyat_jax.mixers.config import BlockMixers, read_conversion
from rehyat_jax.models.checkpoints import describe, load_transformer
from rehyat_jax.models.wan.transformer import WanTransformer
from train.engine.arithmetic import forward_flops

PAGE = (Path(__file__).parents[2] / "docs" / "extend" / "mixer.md").read_text(encoding="utf-8")
MIXER, DISTILL, FINETUNE, STREAM = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(COMMANDS,) = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The page's files beside a teacher, the folder that one works in, and on the path as an installed package is."""
    folder = tmp_path_factory.mktemp("place")
    write_teacher(folder / "teacher")
    for name, text in {"toy_mixer": MIXER, "toy_distill": DISTILL, "toy_finetune": FINETUNE}.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("toy_mixer", None)
    base._MIXERS.pop("mean", None)


@pytest.fixture(scope="module")
def toy(place):
    return importlib.import_module("toy_mixer")


def test_a_whole_video_and_its_chunks_agree_in_a_model(toy):
    """float32: sums of 40 values in another order; and a model of it is counted, and told on disk."""
    conversion = BlockMixers((toy.Mean(chunk_frames=2), toy.Mean(chunk_frames=2)))
    assert read_conversion(json.loads(json.dumps(conversion.to_dict()))) == conversion
    model = WanTransformer(WAN, hybrid=conversion, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) * 0.1, p.dtype), nnx.state(model))
    nnx.update(model, noise)
    latents, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 5, 8, 16, 4), (1, 5, 16)))
    times = jnp.full(1, 500.0)
    whole = by_us(model, latents, times, text)
    parts, _ = streamed(model, latents, times, text, [2, 2, 1])
    np.testing.assert_allclose(parts, whole, atol=1e-4 * np.abs(whole).max())
    fewer = forward_flops(WAN, None, shape=(5, 8, 16)) - forward_flops(WAN, conversion, shape=(5, 8, 16))
    assert fewer == 2 * (4 * 10**2 - 4 * 10) * WAN.dim


@pytest.mark.full
def test_followed_literally_the_page_distils_finetunes_streams_saves_and_loads(place, toy, capsys):
    for line in COMMANDS.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "rehyat"
        assert main(arguments) == 0, capsys.readouterr().err
    (start, *_, end) = [json.loads(line) for line in Path("distilled-train/blocks.jsonl").read_text().splitlines()]
    assert end["error"] != start["error"]
    exec(compile(STREAM, "mixer.md", "exec"), {})
    tuned, begun = (load_transformer(folder) for folder in ("finetuned", "distilled"))
    assert tuned.hybrid == begun.hybrid == BlockMixers((toy.Mean(), toy.Mean()))
    shares = [model.hybrid_blocks.share[...] for model in (begun, tuned)]
    assert np.abs(shares[0]).max() > 0 < np.abs(shares[1] - shares[0]).max()
    assert "mixer       mean in blocks 0-1: chunk_frames 1" in str(describe("finetuned"))


def test_a_program_that_does_not_import_it_finds_the_entry_point_or_says_what_is_missing(toy, monkeypatch):
    source = {"version": 2, "mixers": [{"mixer": "mean", "chunk_frames": 3}], "blocks": [0, 0]}
    monkeypatch.setattr(base, "_MIXERS", {})
    with pytest.raises(ConfigError, match="there is no mixer 'mean'"):
        read_conversion(source)

    class Entry:
        def load(self):
            base.register(toy.Mean)

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group, name: [Entry()] * (name == "mean"))
    assert read_conversion(source) == BlockMixers((toy.Mean(chunk_frames=3),) * 2)
    with pytest.raises(ConfigError, match="mixer 'mean' has no 'overlap'"):
        read_conversion(source | {"mixers": [{"mixer": "mean", "overlap": 3}]})
    with pytest.raises(ConfigError, match="chunk_frames must be a whole number from 1 to 1000"):
        read_conversion(source | {"mixers": [{"mixer": "mean", "chunk_frames": 0}]})
