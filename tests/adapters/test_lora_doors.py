"""LoRAs at the doors: the pipeline, `generate`, `convert`, `info`."""

import json

import av
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from shared.checkpoint import save_tiny_checkpoint
from shared.lora import everywhere, random_lora, written
from shared.tiers import full

from rehyat_jax import HybridConfig, TextToVideo, cli, load_transformer
from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.models.checkpoints import describe

SIZE = {"num_frames": 5, "height": 16, "width": 32, "num_inference_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REHYAT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    pipe = save_tiny_checkpoint(folder)
    return folder, pipe


@pytest.fixture(scope="module")
def lora(theirs, tmp_path_factory):
    shapes = {name: x.shape for name, x in theirs[1].transformer.state_dict().items()}
    return written("kohya", random_lora(shapes, everywhere(2)), tmp_path_factory.mktemp("lora"))[0]


def bits(module):
    return {path: np.asarray(leaf.get_value()).tobytes() for path, leaf in nnx.to_flat_state(nnx.state(module))}


def test_a_pipeline_takes_them_on_and_off(theirs, lora):
    pipe = TextToVideo.from_pretrained(theirs[0])
    base = bits(pipe.transformer)
    assert (pipe.load_lora(lora, strength=0.6), pipe.loras) == ("style", {"style": 0.6})
    with_it = bits(pipe.transformer)
    assert with_it == bits(load_transformer(theirs[0], loras=[(lora, 0.6)])) != base
    assert pipe.load_lora(lora, strength=-0.2, name="other") == "other"
    assert bits(pipe.transformer) not in (base, with_it)
    pipe.set_loras({"other": 0.6})
    assert pipe.loras == {"style": 0.0, "other": 0.6}
    assert bits(pipe.transformer) == with_it
    pipe.unload_lora("style")
    pipe.unload_lora()
    assert (pipe.loras, bits(pipe.transformer)) == ({}, base)


@pytest.mark.full
def test_a_pipeline_makes_what_diffusers_makes_with_it(theirs, lora):
    """Float videos in 0..1 after two guided steps and the decoder: 1e-5 is what float32 leaves of such sums."""
    folder, pipe = theirs
    noise = np.random.default_rng(0).standard_normal((1, 2, 2, 4, 16), dtype=np.float32)
    pipe.load_lora_weights(str(lora), adapter_name="style")
    pipe.set_adapters(["style"], adapter_weights=[0.6])
    latents = torch.from_numpy(noise).permute(0, 4, 1, 2, 3).contiguous()
    expected = pipe("a cat", latents=latents, output_type="np", guidance_scale=4.0, **SIZE).frames[0]
    pipe.unload_lora_weights()
    how = {"noise": noise, "output": "float", "guidance_scale": 4.0, **SIZE}
    found = TextToVideo.from_pretrained(folder, loras=[(lora, 0.6)])("a cat", **how)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(TextToVideo.from_pretrained(folder)("a cat", **how) - expected).max() > 0.01


def test_mistakes_are_told(theirs, lora, tmp_path):
    pipe = TextToVideo.from_pretrained(theirs[0], loras=[f"{lora}:0.5"])
    assert pipe.loras == {"style": 0.5}
    for call, message in (
        (lambda: pipe.load_lora(lora), "two LoRAs are called 'style'"),
        (lambda: pipe.load_lora(lora, strength=float("nan"), name="x"), "strength must be a finite number, not nan"),
        (lambda: pipe.unload_lora("x"), r"name must be that of a loaded LoRA \(style\), not 'x'"),
        (lambda: pipe.set_loras({"x": 1}), "that of a loaded LoRA"),
    ):
        with pytest.raises(RehyatError, match=message):
            call()
    assert pipe.loras == {"style": 0.5}
    with pytest.raises(CheckpointError, match="does not exist"):
        pipe.load_lora(tmp_path / "none.safetensors", name="none")
    parts = {name: getattr(pipe, name) for name in ("transformer", "vae", "text", "schedule", "solver", "defaults")}
    with pytest.raises(RehyatError, match="made of modules"):
        TextToVideo(**parts).load_lora(lora)


def rehyat(capsys, *argv):
    code = cli.main([str(argument) for argument in argv])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("sweep", [(), full(("--hybrid", "1+1"))])
def test_generate_makes_a_video_with_it_and_says_so(sweep, theirs, lora, tmp_path, capsys):
    options = ["--model", theirs[0], *sweep, "--frames", 5, "--size", "32x16", "--steps", 2, "--guidance", 1]
    options += ["--lora", f"{lora}:0.5"]
    code, _, error = rehyat(capsys, "generate", "a cat", *options, "--out", tmp_path / "a.mp4")
    assert code == 0, error
    record = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert record["lora"] == [f"{lora}:0.5"]
    assert record["sweep"] == ("per-chunk" if sweep else "per-step")
    with av.open(tmp_path / "a.mp4") as video:
        assert json.loads(video.metadata["comment"])["loras"] == {"style": 0.5}
        assert "LoRA: style:0.5" in video.metadata["parameters"]


def test_the_blocks_of_a_converted_model_have_it(theirs, lora):
    hybrid = HybridConfig(chunk_frames=1, overlap_frames=0)
    converted = load_transformer(theirs[0], hybrid=hybrid, loras=[lora])
    teacher = bits(load_transformer(theirs[0], loras=[lora]))
    found = bits(converted)
    assert {path: value for path, value in found.items() if path in teacher} == teacher


def test_convert_bakes_it_in(theirs, lora, tmp_path, capsys):
    code, _, error = rehyat(capsys, "convert", theirs[0], tmp_path / "new", "--lora", f"{lora}:0.5")
    assert code == 0, error
    assert bits(load_transformer(tmp_path / "new")) == bits(load_transformer(theirs[0], loras=[(lora, 0.5)]))
    assert json.loads((tmp_path / "new.json").read_text())["settings"]["lora"] == [f"{lora}:0.5"]
    code, _, error = rehyat(capsys, "convert", theirs[0] / "vae", tmp_path / "vae", "--lora", lora)
    assert code == 2
    assert "has no Wan transformer" in error


def test_info_tells_a_lora(theirs, lora, tmp_path, capsys):
    code, output, _ = rehyat(capsys, "info", lora)
    assert code == 0
    assert "lora: kohya, with alpha\n  pairs       20 of rank 3\n" in output
    assert "fits        no published size; its first module's weight is [24, 24]" in output
    q = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{q}.lora_down.weight": torch.zeros(4, 5120), f"{q}.lora_up.weight": torch.zeros(5120, 4)}
    tensors |= {f"{q}.diff_b": torch.zeros(5120)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"modelspec.trigger_phrase": "in \x1b[31mchalk"})
    info = describe(tmp_path / "x.safetensors")
    assert (info.dialect, info.fits, info.ranks) == ("ComfyUI, with differences", "Wan2.1 14B", (4,))
    assert "pairs       1 of rank 4, and 1 differences" in str(info)
    assert info.trigger == "in  [31mchalk"
    # A network beside it makes it none: that is refused where networks are opened.
    whole = {
        f"model.{k}": v for k, v in load_file(theirs[0] / "transformer/diffusion_pytorch_model.safetensors").items()
    }
    save_file(whole | tensors, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="LoRA"):
        describe(tmp_path / "y.safetensors")


@pytest.mark.full
def test_an_open_stream_goes_on_as_it_was_begun(theirs, lora):
    pipe = TextToVideo.from_pretrained(theirs[0], hybrid=HybridConfig(chunk_frames=1, overlap_frames=0))
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 32}
    alone, other = pipe.open_stream("a cat", **options), pipe.open_stream("a cat", **options)
    wanted = [next(alone) for _ in range(2)]
    first = next(other)
    pipe.load_lora(lora)
    np.testing.assert_array_equal(np.concatenate([first, next(other)]), np.concatenate(wanted))
    assert np.abs(next(pipe.open_stream("a cat", **options)).astype(int) - wanted[0]).max() > 0
