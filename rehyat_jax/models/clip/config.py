"""Sizes of CLIP's vision encoder, and how images are prepared for it: to and from transformers' files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.checks import check_positive, check_understood, check_whole_numbers, entries

_ACTIVATIONS = ("gelu", "quick_gelu")
_HAS: dict[str, Any] = {"model_type": "clip_vision_model", "num_channels": 3, "quantization_config": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """CLIP's vision encoder. Defaults are ViT-H/14's, which Wan's image-to-video models use; names are those of
    transformers' ``config.json``."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_whole_numbers(
            self,
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
        )
        check_positive(self, "layer_norm_eps")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"ImageEncoderConfig.hidden_size {self.hidden_size} is not a multiple of its "
                f"{self.num_attention_heads} heads"
            )
        if not self.patch_size <= self.image_size <= 1 << 14:
            raise ConfigError(
                f"ImageEncoderConfig.image_size must be from its patch_size {self.patch_size} to 16384, not "
                f"{self.image_size}"
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise ConfigError(
                f"ImageEncoderConfig.hidden_act must be {' or '.join(_ACTIVATIONS)}, not {str(self.hidden_act)[:80]!r}"
            )

    @property
    def tokens(self) -> int:
        """Of an image: its patches and one for all."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> ImageEncoderConfig:
        """From transformers' ``image_encoder/config.json``.

        Raises:
            ConfigError: a value is impossible, or the file describes another encoder.
        """
        # transformers writes settings of training and of its own beside these: any name may be there.
        check_understood("CLIP configuration", source, known=source, required=_HAS)
        names = {f.name for f in dataclasses.fields(cls)}
        # What transformers' class has where a file says nothing.
        usual: dict[str, Any] = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
        }
        return cls(**usual | {k: v for k, v in source.items() if k in names})

    def to_dict(self) -> dict[str, Any]:
        """transformers' ``CLIPVisionConfig``, complete."""
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            **dataclasses.asdict(self),
            "num_channels": 3,
            "attention_dropout": 0.0,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "projection_dim": 1024,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What transformers' ``CLIPImageProcessor`` does: the shorter edge to a length, the middle cut out, normalised."""

    shortest_edge: int = 224
    height: int = 224
    width: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        check_whole_numbers(self, "shortest_edge", "height", "width")
        if min(self.height, self.width) < 1 or max(self.height, self.width, self.shortest_edge) > 1 << 14:
            raise ConfigError("an image processor's sizes must be at most 16384")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(x, int | float) and np.isfinite(x) for x in values):
                raise ConfigError(f"an image processor's image_{name} must be three numbers, not {values!r}")
        if min(self.std) <= 0:
            raise ConfigError(f"an image processor's image_std must be positive, not {self.std!r}")

    @classmethod
    def of(cls, config: ImageEncoderConfig) -> Preparation:
        """Where no file says another."""
        side = config.image_size
        return cls(shortest_edge=side, height=side, width=side)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any], *, config: ImageEncoderConfig) -> Preparation:
        """From transformers' ``image_processor/preprocessor_config.json``.

        Raises:
            ConfigError: a value is impossible, or it is another processor's.
        """
        required = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3}
        check_understood("CLIP image processor", source, known=source, required=required)
        usual = cls.of(config)
        size, crop = source.get("size", {}), source.get("crop_size", {})
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        size = {"shortest_edge": size} if isinstance(size, int) else size
        if not isinstance(size, Mapping) or not isinstance(crop, Mapping):
            raise ConfigError("an image processor's size and crop_size must be numbers by name")
        made = cls(
            shortest_edge=size.get("shortest_edge", usual.shortest_edge),
            height=crop.get("height", usual.height),
            width=crop.get("width", usual.width),
            mean=entries("image_mean", source.get("image_mean", usual.mean)),
            std=entries("image_std", source.get("image_std", usual.std)),
        )
        if (made.height, made.width) != (config.image_size,) * 2:
            raise ConfigError(
                f"the image processor makes {made.width}x{made.height} and the encoder takes "
                f"{config.image_size}x{config.image_size}"
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """transformers' ``preprocessor_config.json``, complete."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
            "size": {"shortest_edge": self.shortest_edge},
            "crop_size": {"height": self.height, "width": self.width},
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def __call__(self, image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "{self.height} {self.width} 3"]:
        """Pixels as the encoder takes them, float32."""
        rows, columns = image.shape[:2]
        edge = self.shortest_edge
        long = int(edge * max(rows, columns) / min(rows, columns))
        size = (long, edge) if columns > rows else (edge, long)
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        padded = np.zeros((max(size[1], self.height), max(size[0], self.width), 3), np.uint8)
        top, left = (-(-(whole - part) // 2) for whole, part in zip(padded.shape, resized.shape[:2], strict=False))
        padded[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
        top, left = (padded.shape[0] - self.height) // 2, (padded.shape[1] - self.width) // 2
        middle = padded[top : top + self.height, left : left + self.width]
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        return (middle.astype(np.float32) / 255 - mean) / std
