"""`rehyat info` tells every kind of file of the Wan world apart, or refuses it by name; the documents name each."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from shared.lora import OTHERS, everywhere, random_lora, written

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.checkpoints import describe
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.rows import transformer_rows
from rehyat_jax.weights.rows import renamed

ROOT = Path(__file__).parents[2]
ROWS = transformer_rows(WanConfig.flf2v_14b())
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "out_channels": 16,
}


def original(**more):
    """A transformer's tensors by the original's names: a file without a configuration, whose heads are of 128."""
    state = WanTransformer3DModel(**SIZES | more).state_dict()
    named = {name: renamed(name, ROWS, "diffusers", "original") for name in state}
    # Nothing reads a norm that diffusers has beside an image's keys.
    return {names[0]: state[name].contiguous() for name, names in named.items() if names}


I2V = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 256}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"in_channels": 16}, ["in_channels 16, out_channels 16"]),
        (I2V, ["in_channels 36, out_channels 16", "image_dim 20"]),
        (I2V | {"pos_embed_seq_len": 10}, ["in_channels 36", "image_dim 20", "pos_embed_seq_len 10"]),
        ({"in_channels": 36}, ["in_channels 36, out_channels 16"]),
        ({"in_channels": 48, "out_channels": 48}, ["in_channels 48, out_channels 48"]),
    ],
    ids=["T2V", "I2V", "FLF2V", "I2V-A14B", "TI2V-5B"],
)
def test_transformers_are_told_apart(more, words, tmp_path):
    save_file(original(**more), tmp_path / "wan.safetensors")
    said = str(describe(tmp_path / "wan.safetensors"))
    assert all(word in said for word in words), said
    others = {"image_dim", "pos_embed_seq_len"} - {name for name in more if name in said}
    assert not [name for name in others if re.search(rf"{name} \d", said)], said


@pytest.mark.parametrize("dialect", OTHERS[:2])
def test_loras_are_told(dialect, tmp_path):
    shapes = {name: x.shape for name, x in WanTransformer3DModel(**SIZES).state_dict().items()}
    path, _ = written(dialect, random_lora(shapes, everywhere(1)), tmp_path / "lora")
    assert "lora: " in str(describe(path))


def vace():
    return original() | {"vace_blocks.0.before_proj.weight": torch.zeros(256, 256)}


def beside(name):
    return original() | {name: torch.zeros(4, 4)}


def fp4():
    tensors = original()
    return tensors | {"blocks.0.ffn.0.weight_scale_2": torch.ones(1)}


def adapter(end):
    return {f"diffusion_model.blocks.0.self_attn.q.{end}": torch.zeros(4, 4)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (vace, "a VACE model"),
        (lambda: original(in_channels=48), r"Wan2\.1's Fun-Control \(48 channels in, 16 out\)"),
        (lambda: original(in_channels=52), r"Wan2\.2's Fun-Control"),
        (lambda: beside("control_adapter.conv.weight"), "a Fun-Control model"),
        (lambda: beside("casual_audio_encoder.weights"), "a speech-to-video model"),
        (lambda: beside("blocks.0.audio_cross_attn.proj.weight"), "MultiTalk"),
        (lambda: beside("face_adapter.fuser_blocks.0.linear1_q.weight"), "an Animate model"),
        (lambda: beside("fps_embedding.weight"), "SkyReels"),
        (fp4, "nvfp4"),
        (lambda: adapter("hada_w1_a"), "LoHa"),
        (lambda: adapter("lokr_w1"), "LoKr"),
        (lambda: adapter("lora_down.weight") | adapter("lora_up.weight") | adapter("dora_scale"), "DoRA"),
    ],
    ids=[
        "VACE",
        "Fun 2.1",
        "Fun 2.2",
        "Fun",
        "S2V",
        "MultiTalk",
        "Animate",
        "SkyReels",
        "nvfp4",
        "LoHa",
        "LoKr",
        "DoRA",
    ],
)
def test_what_is_not_read_is_refused_by_name(tensors, words, tmp_path):
    save_file(tensors(), tmp_path / "file.safetensors")
    with pytest.raises(RehyatError, match=words):
        describe(tmp_path / "file.safetensors")


def test_both_autoencoders_are_told_apart(tmp_path):
    small = {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1}
    AutoencoderKLWan(base_dim=4, num_res_blocks=1).save_pretrained(tmp_path / "2.1")
    AutoencoderKLWan.from_config(VAEConfig.wan22().to_dict() | small).save_pretrained(tmp_path / "2.2")
    first, second = (str(describe(tmp_path / name)) for name in ("2.1", "2.2"))
    assert "z_dim 16" in first
    assert "z_dim 48" in second
    assert "is_residual True" in second


def test_the_documents_have_a_row_for_each_with_a_test_that_is_there():
    page = (ROOT / "docs" / "how-to" / "convert.md").read_text(encoding="utf-8")
    rows = page.partition("## Every model")[2].partition("\n## ")[0]
    for name in ("T2V-1.3B", "I2V-14B", "FLF2V", "TI2V-5B", "A14B", "Self-Forcing", "rCM", "lightx2v", "LongLive"):
        assert name in rows
    named = re.findall(r"`(tests/[\w/]+\.py)`", rows)
    assert len(named) > 10
    assert all((ROOT / name).is_file() for name in named)
