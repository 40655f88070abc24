"""Sizes of UMT5's encoder: a frozen dataclass, to and from transformers' ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rehyat_jax.models.checks import check_positive, check_understood, check_whole_numbers

#: What files may say of the encoder that it has one form of.
_HAS: dict[str, Any] = {
    "model_type": "umt5",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """UMT5's encoder. Defaults are umt5-xxl's; names are those of transformers' ``config.json``."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_whole_numbers(
            self,
            "vocab_size",
            "d_model",
            "d_kv",
            "d_ff",
            "num_layers",
            "num_heads",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
        )
        check_positive(self, "layer_norm_epsilon")

    @classmethod
    def umt5_xxl(cls) -> TextEncoderConfig:
        return cls()

    @classmethod
    def mini_sprites(cls) -> TextEncoderConfig:
        """The bundled model: four layers of 128, a vocabulary that the tokenizer sets."""
        return cls(vocab_size=256, d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> TextEncoderConfig:
        """From transformers' ``text_encoder/config.json``.

        Raises:
            ConfigError: a value is impossible, or the file describes another encoder.
        """
        # transformers writes dozens of settings of generation, of training and of its own: any name may be there.
        check_understood("UMT5 configuration", source, known=source, required=_HAS)
        return cls(**{k: v for k, v in source.items() if k in {f.name for f in dataclasses.fields(cls)}})

    def to_dict(self) -> dict[str, Any]:
        """transformers' ``UMT5Config`` for ``UMT5EncoderModel``, complete."""
        return {
            "architectures": ["UMT5EncoderModel"],
            "model_type": "umt5",
            **dataclasses.asdict(self),
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu_new",
            "is_gated_act": True,
            "dropout_rate": 0.0,
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "num_decoder_layers": self.num_layers,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "tie_word_embeddings": True,
            "use_cache": True,
            "classifier_dropout": 0.0,
        }
