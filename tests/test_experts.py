"""Wan2.2's two experts against diffusers' ``WanPipeline``; which of them is read, and what is said of a missing one."""

import json
import shutil

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from shared.families import tiny_a14b
from shared.lora import everywhere, random_lora, written
from shared.videos import PROMPT, SIZE, latents_by_diffusers, latents_by_us, noise_of
from shared.wan import Case, by_diffusers, by_us, inputs, relative

from rehyat_jax import TextToVideo
from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.models.checkpoints import convert, describe, load_transformer
from rehyat_jax.models.folder import read_defaults, read_traits
from rehyat_jax.models.wan.rows import TRANSFORMER
from rehyat_jax.weights.rows import renamed


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a14b")
    return folder, tiny_a14b(folder)


@pytest.fixture(scope="module")
def ours(a14b, tmp_path_factory):
    return TextToVideo.from_pretrained(a14b[0], cache_dir=tmp_path_factory.mktemp("cache"))


def test_two_experts_are_diffusers(a14b, ours):
    """At shift 3 the three steps are at 999, 857 and 600: one of the first expert's, two of the second's, whose solver
    knows the first's velocity. Some hundred roundings of float32, times guidance."""
    noise, scales = noise_of(3, 8, 12, 16), {"guidance_scale": 4.0, "guidance_scale_2": 2.0}
    expected, found = latents_by_diffusers(a14b[1], noise, **scales), latents_by_us(ours, noise, **scales)
    assert 0.3 < expected.std() < 5
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert ours.transformer.held == ("transformer", "transformer_2")


@pytest.mark.full
def test_an_expert_is_read_when_a_step_asks_for_it(a14b, tmp_path, monkeypatch):
    pipe = TextToVideo.from_pretrained(a14b[0], cache_dir=tmp_path)
    assert pipe.transformer.held == ()
    small = {**SIZE, "num_frames": 1, "guidance_scale": 1.0}
    pipe(PROMPT, **small | {"num_inference_steps": 1})
    assert pipe.transformer.held == ("transformer",)
    # Where there is no room for both, the second takes the place of the first.
    monkeypatch.setattr("rehyat_jax.runtime.memory.Room.lacking", lambda self, need: ("memory", 1, 0))
    pipe(PROMPT, **small | {"num_inference_steps": 3})
    assert pipe.transformer.held == ("transformer_2",)


def test_a_release_of_two_experts_is_known_and_each_converts_alone(a14b, tmp_path):
    release = tmp_path / "release"
    for name, folder in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")):
        (release / folder).mkdir(parents=True)
        original = {"dim": 24, "num_heads": 2, "num_layers": 2, "ffn_dim": 48, "text_dim": 32, "freq_dim": 32}
        (release / folder / "config.json").write_text(json.dumps(original | {"model_type": "t2v"}))
        tensors = load_file(a14b[0] / name / "diffusion_pytorch_model.safetensors")
        named = {renamed(key, TRANSFORMER, "diffusers", "original")[0]: tensor for key, tensor in tensors.items()}
        save_file(named, release / folder / "diffusion_pytorch_model.safetensors")
    assert read_traits(release).boundary_ratio == 0.875
    defaults = read_defaults(release)
    assert (defaults.guidance_scale, defaults.guidance_scale_2, defaults.num_inference_steps) == (4.0, 3.0, 40)
    convert(release / "low_noise_model", tmp_path / "one")
    theirs = load_file(a14b[0] / "transformer_2" / "diffusion_pytorch_model.safetensors")
    found = load_file(tmp_path / "one" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)
    shutil.rmtree(release / "low_noise_model")
    with pytest.raises(CheckpointError, match="low_noise_model is missing"):
        describe(release)


def test_a_checkpoint_of_two_experts_is_converted(a14b, tmp_path):
    convert(a14b[0], tmp_path / "out")
    assert read_traits(tmp_path / "out").boundary_ratio == 0.875
    for name in ("transformer", "transformer_2"):
        found, expected = (
            load_file(folder / name / "diffusion_pytorch_model.safetensors") for folder in (tmp_path / "out", a14b[0])
        )
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    said = str(describe(tmp_path / "out"))
    assert "transformer_2: Wan low-noise transformer" in said
    assert "guidance 4 and 3" in said
    assert load_transformer(tmp_path / "out").hybrid is None


def test_what_cannot_be_is_a_sentence(a14b, ours, tmp_path):
    folder = shutil.copytree(a14b[0], tmp_path / "broken")
    shutil.rmtree(folder / "transformer_2")
    for ask in (lambda: TextToVideo.from_pretrained(folder, cache_dir=tmp_path), lambda: describe(folder)):
        with pytest.raises(
            CheckpointError, match=r"two experts by its model_index\.json, and transformer_2 is missing"
        ):
            ask()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 2}))
    with pytest.raises(ConfigError, match="boundary_ratio must be between 0 and 1, not '2'"):
        read_traits(folder)
    with pytest.raises(RehyatError, match="transformer: the model cannot stream: blocks 0-1 of 2 attend"):
        ours.open_stream(PROMPT)


def test_a_lora_is_for_both_experts_or_for_the_one_that_is_named(a14b, tmp_path):
    """The low expert against diffusers' with `load_into_transformer_2`: 1e-5, as any LoRA."""
    folder, pipeline = a14b
    theirs = pipeline.transformer_2
    lora = random_lora({name: x.shape for name, x in theirs.state_dict().items()}, everywhere(2))
    path, _ = written("diffusers", lora, tmp_path)
    pipe = TextToVideo.from_pretrained(folder, cache_dir=tmp_path, loras=[f"low:{path}:0.5"])
    high, low = (member.load() for member in pipe.transformer.members)
    assert bits(high) == bits(load_transformer(folder / "transformer"))
    pipeline.load_lora_weights(str(path), adapter_name="one", load_into_transformer_2=True)
    theirs.set_adapters(["one"], weights=[0.5])
    args = inputs(Case(low.config, (3, 4, 4), text=5, times=(700.0,)))
    assert relative(by_us(low, *args), by_diffusers(theirs, *args)) < 1e-5
    pipeline.unload_lora_weights()
    pipe.load_lora(path, name="both", strength=0.5)
    pipe.set_loras({"both": 0.5})
    found = [bits(member.load()) for member in pipe.transformer.members]
    assert found[1] == bits(low)
    convert(folder, tmp_path / "baked", loras=[(path, 0.5)])
    assert found == [bits(load_transformer(tmp_path / "baked" / name)) for name in ("transformer", "transformer_2")]
    with pytest.raises(RehyatError, match="is for the high expert, and this model has one transformer"):
        load_transformer(folder / "transformer", loras=[f"high:{path}"])


def bits(module):
    return {path: np.asarray(leaf.get_value()).tobytes() for path, leaf in nnx.to_flat_state(nnx.state(module))}
