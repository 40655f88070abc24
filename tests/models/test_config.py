"""Configurations against the files that diffusers, transformers and the original release write."""

import dataclasses

import jaxtyping
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.wan.config import VAEConfig, WanConfig

#: Wan2.1-T2V-1.3B's own ``config.json``.
ORIGINAL = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 1536,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 12,
    "num_layers": 30,
    "out_dim": 16,
    "text_len": 512,
}
PRESETS = [
    *(
        getattr(kind, name)()
        for kind, names in {
            WanConfig: ("t2v_1_3b", "t2v_14b", "mini_sprites"),
            VAEConfig: ("wan", "mini_sprites"),
            TextEncoderConfig: ("umt5_xxl", "mini_sprites"),
        }.items()
        for name in names
    ),
]


@pytest.fixture
def as_in_production():
    """Without the tests' checks of types, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("config", PRESETS, ids=lambda c: type(c).__name__)
def test_out_and_in_again(config):
    assert type(config).from_dict(config.to_dict()) == config


def test_defaults_are_diffusers_and_transformers():
    """What their classes say when made with nothing: the 14B transformer, Wan2.1's VAE."""
    with torch.device("meta"):
        transformer, vae = WanTransformer3DModel(), AutoencoderKLWan()
    assert WanConfig.from_dict(transformer.config) == WanConfig.t2v_14b()
    assert VAEConfig.from_dict(vae.config) == VAEConfig.wan()


@pytest.mark.parametrize("config", [WanConfig.t2v_14b(), VAEConfig.wan()], ids=["transformer", "vae"])
def test_written_completely_for_diffusers(config):
    """Every entry that diffusers' class takes and that is not a later model's own."""
    kind = {WanConfig: WanTransformer3DModel, VAEConfig: AutoencoderKLWan}[type(config)]
    with torch.device("meta"):
        theirs = kind.from_config(config.to_dict()).config
    for name, value in config.to_dict().items():
        if not name.startswith("_"):
            assert theirs[name] == (tuple(value) if isinstance(theirs[name], tuple) else value), name


def test_transformers_says_what_is_written():
    ours = TextEncoderConfig.mini_sprites().to_dict()
    theirs = UMT5Config.from_dict(ours).to_dict()
    # Written for older releases too; newer ones have renamed or dropped them.
    assert {name: theirs[name] for name in ours if name in theirs} == {n: v for n, v in ours.items() if n in theirs}
    assert theirs["tie_word_embeddings"] is True


def test_the_original_release():
    assert WanConfig.from_dict(ORIGINAL) == WanConfig.t2v_1_3b()


@pytest.mark.usefixtures("as_in_production")
@pytest.mark.parametrize(
    ("kind", "change", "culprit"),
    [
        (WanConfig, {"num_layers": 0}, "num_layers"),
        (WanConfig, {"num_layers": 10**18}, "num_layers"),
        (WanConfig, {"ffn_dim": True}, "ffn_dim"),
        (WanConfig, {"ffn_dim": "13824"}, "ffn_dim"),
        (WanConfig, {"eps": float("nan")}, "eps"),
        (WanConfig, {"attention_head_dim": 127}, "attention_head_dim"),
        (WanConfig, {"attention_head_dim": 4}, "attention_head_dim"),
        (WanConfig, {"freq_dim": 255}, "freq_dim"),
        (WanConfig, {"patch_size": 2}, "patch_size"),
        (WanConfig, {"patch_size": [1, 2]}, "patch_size"),
        (WanConfig, {"patch_size": [1, 2, 10**6]}, "patch_size"),
        (WanConfig, {"patch_size": None}, "patch_size"),
        (WanConfig, {"patch_size": [1, True, 2]}, "patch_size"),
        (WanConfig, {"image_dim": 1280}, "image_dim"),
        (WanConfig, {"added_kv_proj_dim": 5120}, "added_kv_proj_dim"),
        (VAEConfig, {"is_residual": "yes"}, "is_residual"),
        (VAEConfig, {"dim_mult": [1, 2, 4, 0]}, "dim_mult"),
        (VAEConfig, {"temperal_downsample": [True]}, "temperal_downsample"),
        (VAEConfig, {"latents_std": [0.0] * 16}, "latents_std"),
        (VAEConfig, {"latents_mean": [float("inf")] * 16}, "latents_mean"),
        (VAEConfig, {"dim_mult": "1244"}, "dim_mult"),
        (VAEConfig, {"temperal_downsample": [0, "yes", None]}, "temperal_downsample"),
        (VAEConfig, {"z_dim": 48}, "latents_mean"),
        (TextEncoderConfig, {"model_type": "t5"}, "model_type"),
        (TextEncoderConfig, {"vocab_size": -1}, "vocab_size"),
    ],
)
def test_what_is_refused_is_named(kind, change, culprit):
    with pytest.raises(ConfigError) as raised:
        kind.from_dict(kind().to_dict() | change)
    assert culprit in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("as_in_production")
@pytest.mark.parametrize("change", [{"model_type": "vace"}, {"num_heads": 7}, {"num_heads": 0}, {"dim": None}])
def test_original_variants_are_refused(change):
    with pytest.raises(ConfigError):
        WanConfig.from_dict(ORIGINAL | change)


@pytest.mark.parametrize("name", ["num_layers", "ffn_dim"])
def test_what_is_missing_is_named(name):
    source = WanConfig().to_dict()
    del source[name]
    with pytest.raises(ConfigError, match=name):
        WanConfig.from_dict(source)


def test_width_and_factors():
    assert (WanConfig.t2v_1_3b().dim, WanConfig.t2v_14b().dim) == (1536, 5120)
    assert (VAEConfig.wan().spatial_factor, VAEConfig.wan().temporal_factor) == (8, 4)
    assert dataclasses.replace(VAEConfig.wan(), temperal_downsample=(False, False, True)).temporal_factor == 2


@pytest.mark.parametrize(
    ("source", "change", "culprit"),
    [
        (ORIGINAL, {"_class_name": "CausalWanModel"}, "CausalWanModel"),
        (ORIGINAL, {"_class_name": "WanVACEModel"}, "WanVACEModel"),
        (ORIGINAL, {"window_size": [21, 21]}, "window_size"),
        (ORIGINAL, {"qk_norm": False}, "qk_norm"),
        (ORIGINAL, {"cross_attn_norm": False}, "cross_attn_norm"),
        (ORIGINAL, {"text_len": 256}, "text_len"),
        (WanConfig().to_dict(), {"_class_name": "CausalWanTransformer3DModel"}, "CausalWanTransformer3DModel"),
        (WanConfig().to_dict(), {"qk_norm": "rms_norm"}, "qk_norm"),
        (WanConfig().to_dict(), {"cross_attn_norm": False}, "cross_attn_norm"),
        (WanConfig().to_dict(), {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ],
)
def test_another_network_with_the_same_tensors_is_refused_by_name(source, change, culprit):
    with pytest.raises(ConfigError, match=culprit):
        WanConfig.from_dict(source | change)


@pytest.mark.parametrize(
    ("kind", "source", "change"),
    [
        (WanConfig, ORIGINAL, {"local_attn_size": 12}),
        (WanConfig, ORIGINAL, {"num_frame_per_block": 3}),
        (WanConfig, WanConfig().to_dict(), {"sink_size": 1}),
        (WanConfig, WanConfig().to_dict(), {"rope_scaling": {"factor": 2}}),
        (VAEConfig, VAEConfig().to_dict(), {"non_linearity": "relu"}),
    ],
)
def test_another_network_with_the_same_tensors_is_warned_of_by_name(kind, source, change):
    ((name, _),) = change.items()
    with pytest.warns(UserWarning, match=name):
        kind.from_dict(source | change)


def test_what_says_the_usual_or_that_something_is_off_is_no_other_network():
    usual = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "window_size": [-1, -1], "qk_norm": True}
    off = {"cross_attn_norm": True, "add_control_adapter": False, "in_dim_ref_conv": None, "vace_layers": []}
    assert WanConfig.from_dict(ORIGINAL | usual | off) == WanConfig.t2v_1_3b()
