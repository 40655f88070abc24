"""Sizes of Wan's transformer and of its autoencoder: frozen dataclasses, to and from ``config.json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.checks import LATER, check_positive, check_understood, check_whole_numbers, entries, is_whole


def _later(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={LATER: True})


#: What files may say of the transformer that it has one form of: both layouts' words.
_TRANSFORMER_HAS: dict[str, Any] = {
    "text_len": 512,
    "window_size": [-1, -1],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "quantization_config": None,
}
#: The original layout's words for the models that this transformer is; what they take beside text, tensors tell.
_KINDS = ("t2v", "i2v", "flf2v", "ti2v")


#: Models whose further channels no other ones have: noise, control and image, and Wan2.2's mask.
_CONTROLLED = {48: "Wan2.1's Fun-Control", 52: "Wan2.2's Fun-Control"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
    """The Wan2.1 and Wan2.2 transformer. Defaults are T2V-1.3B's; names are those of diffusers' ``config.json``."""

    num_layers: int = 30
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    ffn_dim: int = 8960
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    #: Entries of diffusers' table of positions, an axis. Kept for it alone: `rotary_embedding` goes on beyond.
    rope_max_seq_len: int = 1024
    #: Width of the image features that image-to-video models attend to; None: they have none.
    image_dim: int | None = _later(None)
    #: Of the embedded features: the transformer's own.
    added_kv_proj_dim: int | None = _later(None)
    #: Tokens of two images, which have positions of their own (first and last frame to video).
    pos_embed_seq_len: int | None = _later(None)

    def __post_init__(self) -> None:
        check_whole_numbers(
            self,
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "ffn_dim",
            "in_channels",
            "out_channels",
            "text_dim",
            "freq_dim",
            "rope_max_seq_len",
        )
        images = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
        check_whole_numbers(self, *(name for name in images if getattr(self, name) is not None))
        if self.added_kv_proj_dim != (None if self.image_dim is None else self.dim):
            raise ConfigError(
                f"WanConfig.added_kv_proj_dim {self.added_kv_proj_dim} is not supported: with an image_dim "
                f"it is the transformer's own width, {self.dim}, and else null"
            )
        if self.image_dim is None and self.pos_embed_seq_len is not None:
            raise ConfigError("WanConfig.pos_embed_seq_len is of image features, and there is no image_dim")
        if self.out_channels == 16 and (family := _CONTROLLED.get(self.in_channels)) is not None:
            raise ConfigError(f"{family} ({self.in_channels} channels in, 16 out) is not supported")
        check_positive(self, "eps")
        if len(self.patch_size) != 3 or not all(is_whole(p, 16) for p in self.patch_size):
            raise ConfigError(f"WanConfig.patch_size must be three whole numbers from 1 to 16, not {self.patch_size!r}")
        head_dim = self.attention_head_dim
        if head_dim % 2 or head_dim < 6:
            raise ConfigError(f"WanConfig.attention_head_dim must be even and at least 6, not {head_dim}")
        if self.freq_dim % 2:
            raise ConfigError(f"WanConfig.freq_dim must be even, not {self.freq_dim}")

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def t2v_1_3b(cls) -> WanConfig:
        return cls()

    @classmethod
    def t2v_14b(cls) -> WanConfig:
        return cls(num_layers=40, num_attention_heads=40, ffn_dim=13824)

    @classmethod
    def i2v_14b(cls) -> WanConfig:
        """Of Wan2.1, from an image: noise, a mask of 4 and the image's latents go in, and CLIP's features."""
        return dataclasses.replace(cls.t2v_14b(), in_channels=36, image_dim=1280, added_kv_proj_dim=5120)

    @classmethod
    def flf2v_14b(cls) -> WanConfig:
        """Of Wan2.1, from a first and a last frame."""
        return dataclasses.replace(cls.i2v_14b(), pos_embed_seq_len=514)

    @classmethod
    def i2v_a14b(cls) -> WanConfig:
        """An expert of Wan2.2, from an image: as Wan2.1's without CLIP."""
        return dataclasses.replace(cls.t2v_14b(), in_channels=36)

    @classmethod
    def ti2v_5b(cls) -> WanConfig:
        """Of Wan2.2, on the latents of `VAEConfig.wan22`."""
        return cls(num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48)

    @classmethod
    def mini_sprites(cls) -> WanConfig:
        """The bundled model: 4 heads of 64, ten layers, 64 tokens a latent frame."""
        return cls(
            num_layers=10, num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, text_dim=128, freq_dim=128
        )

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> WanConfig:
        """From diffusers' ``transformer/config.json`` or the original layout's ``config.json``.

        Raises:
            ConfigError: a value is impossible, or the file describes another architecture (VACE, speech to video, …).
        """
        if "dim" in source and "num_heads" in source:
            source = cls._from_original(source)
        kind = "Wan transformer configuration"
        known = {f.name for f in dataclasses.fields(cls)}
        check_understood(kind, source, known=known | {"model_type"}, required=_TRANSFORMER_HAS)
        if (model := source.get("model_type", "t2v")) not in _KINDS:
            raise ConfigError(f"{kind}: model_type = {str(model)[:80]!r} is not supported (only {', '.join(_KINDS)})")
        if (name := source.get("_class_name", "WanModel")) not in ("WanTransformer3DModel", "WanModel"):
            raise ConfigError(f"{kind}: {str(name)[:80]!r} is another network than WanModel or WanTransformer3DModel")
        if missing := {"num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim"} - set(source):
            raise ConfigError(f"{kind}: {', '.join(sorted(missing))} missing")
        values = {k: v for k, v in source.items() if k in known}
        if "patch_size" in values:
            values["patch_size"] = entries("patch_size", values["patch_size"])
        return cls(**values)

    @staticmethod
    def _from_original(source: Mapping[str, Any]) -> dict[str, Any]:
        """The original layout's file in diffusers' words; what diffusers has no word for stays as it is."""
        dim, heads = source["dim"], source["num_heads"]
        if not (isinstance(dim, int) and isinstance(heads, int) and heads > 0 and dim % heads == 0):
            raise ConfigError(f"dim {dim!r} is not a multiple of num_heads {heads!r}")
        renamed = {"in_dim": "in_channels", "out_dim": "out_channels"}
        values = {renamed.get(name, name): value for name, value in source.items() if name not in ("dim", "num_heads")}
        if values.get("qk_norm") is True:
            values["qk_norm"] = "rms_norm_across_heads"
        return values | {"num_attention_heads": heads, "attention_head_dim": dim // heads}

    def to_dict(self) -> dict[str, Any]:
        """diffusers' ``WanTransformer3DModel`` configuration, complete."""
        return {
            "_class_name": "WanTransformer3DModel",
            "_diffusers_version": "0.36.0",
            **dataclasses.asdict(self),
            "patch_size": list(self.patch_size),
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
        }


#: What files may say of the autoencoder that it has one form of.
_VAE_HAS: dict[str, Any] = {"dropout": 0.0, "clip_output": True, "quantization_config": None}
#: What diffusers writes and the other values say.
_VAE_NOTES = frozenset({"scale_factor_spatial", "scale_factor_temporal", "in_channels", "out_channels"})

#: Wan2.1's published latent statistics (diffusers, ``AutoencoderKLWan``'s defaults).
_WAN_LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
_WAN_LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
#: Wan2.2's, of its autoencoder of 48 channels (Wan-Video/Wan2.2, ``wan/modules/vae2_2.py``).
_WAN22_LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_WAN22_LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The causal video autoencoders of Wan2.1 and of Wan2.2's 5B. Defaults are Wan2.1's; names are those of diffusers'
    ``config.json``."""

    #: Of the encoder, and of the decoder where that has none of its own.
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    #: Per downsampling (finest first): also halve time? (diffusers spells it so.)
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = _WAN_LATENTS_STD
    #: Wan2.2's: each level is a residual group, with a shortcut around its change of size.
    is_residual: bool = _later(False)
    decoder_base_dim: int | None = _later(None)
    #: Pixels that are folded into channels before the first layer, along each side; None: 1.
    patch_size: int | None = _later(None)

    def __post_init__(self) -> None:
        check_whole_numbers(self, "base_dim", "z_dim", "num_res_blocks")
        check_whole_numbers(self, *(n for n in ("decoder_base_dim", "patch_size") if getattr(self, n) is not None))
        if not isinstance(self.is_residual, bool):
            raise ConfigError(f"VAEConfig.is_residual must be true or false, not {self.is_residual!r}")
        if (self.patch_size or 1) > 16:
            raise ConfigError(f"VAEConfig.patch_size must be at most 16, not {self.patch_size}")
        if not self.dim_mult or not all(is_whole(m, 64) for m in self.dim_mult):
            raise ConfigError(f"VAEConfig.dim_mult must be whole numbers from 1 to 64, not {self.dim_mult!r}")
        halves = self.temperal_downsample
        if len(halves) != len(self.dim_mult) - 1 or not all(isinstance(half, bool) for half in halves):
            raise ConfigError("VAEConfig.temperal_downsample must be true or false, one entry fewer than dim_mult")
        if self.attn_scales:
            raise ConfigError("VAEConfig.attn_scales is not supported (Wan2.1 has none)")
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
            raise ConfigError(f"VAEConfig.latents_mean and latents_std must have z_dim = {self.z_dim} entries")
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in self.latents_mean):
            raise ConfigError("VAEConfig.latents_mean must be finite")
        if not all(isinstance(x, (int, float)) and math.isfinite(x) and x > 0 for x in self.latents_std):
            raise ConfigError("VAEConfig.latents_std must be finite and positive")

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent pixel stands for, along each side."""
        return self.patch * 2 ** len(self.temperal_downsample)

    @property
    def patch(self) -> int:
        """Pixels that are folded into channels, along each side."""
        return self.patch_size or 1

    @property
    def pixel_channels(self) -> int:
        """Channels of a folded pixel: what the first layer takes and the last one gives."""
        return 3 * self.patch**2

    @property
    def decoder_dim(self) -> int:
        """The decoder's base width."""
        return self.decoder_base_dim or self.base_dim

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame stands for (the first stands for one)."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def encoder_memory(self) -> int:
        """Latent frames after which nothing of a frame is left in what the encoder makes: it looks back by the two
        frames of each of its convolutions in time, of which a level has two a residual block, and one that halves."""
        rate, back = 1, 2  # frames a frame of the level stands for; the first convolution
        for halves in (*self.temperal_downsample, None):
            back += rate * (4 * self.num_res_blocks + (2 if halves else 0))
            rate *= 2 if halves else 1
        back += rate * (4 * 2 + 2)  # the middle's residual blocks, and the last convolution
        return 1 + -(-back // rate)

    @classmethod
    def wan(cls) -> VAEConfig:
        return cls()

    @classmethod
    def published_for(cls, model: WanConfig) -> VAEConfig:
        """The published autoencoder whose latents a transformer makes."""
        wan22 = cls.wan22()
        return wan22 if model.out_channels == wan22.z_dim else cls.wan()

    @classmethod
    def wan22(cls) -> VAEConfig:
        """Of Wan2.2's TI2V-5B: 16 pixels a side and four frames become one latent pixel of 48 channels."""
        return cls(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            latents_mean=_WAN22_LATENTS_MEAN,
            latents_std=_WAN22_LATENTS_STD,
            is_residual=True,
            patch_size=2,
        )

    @classmethod
    def mini_sprites(cls) -> VAEConfig:
        """The bundled model: a quarter of Wan's width, and one downsampling fewer: its videos are small."""
        return cls(
            base_dim=24,
            dim_mult=(1, 2, 3),
            temperal_downsample=(True, True),
            num_res_blocks=1,
            latents_mean=(0.0,) * 16,
            latents_std=(1.0,) * 16,
        )

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> VAEConfig:
        """From diffusers' ``vae/config.json``.

        Raises:
            ConfigError: a value is impossible, or the file describes another autoencoder.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        check_understood("Wan VAE configuration", source, known=known | _VAE_NOTES, required=_VAE_HAS)
        values = {k: v for k, v in source.items() if k in known}
        for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            if name in values:
                values[name] = entries(name, values[name])
        if "attn_scales" in values:
            scales = values["attn_scales"]
            values["attn_scales"] = () if scales is None or scales == [] else entries("attn_scales", scales)
        config = cls(**values)
        for name in ("in_channels", "out_channels"):
            if source.get(name, config.pixel_channels) != config.pixel_channels:
                raise ConfigError(
                    f"Wan VAE configuration: {name} = {str(source[name])[:80]} is not supported (only "
                    f"{config.pixel_channels}, for patch_size {config.patch_size})"
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """diffusers' ``AutoencoderKLWan`` configuration, complete."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {
            "_class_name": "AutoencoderKLWan",
            "_diffusers_version": "0.36.0",
            **values,
            "dropout": 0.0,
            "in_channels": self.pixel_channels,
            "out_channels": self.pixel_channels,
            "scale_factor_spatial": self.spatial_factor,
            "scale_factor_temporal": self.temporal_factor,
        }
