"""The text encoder's tensors under every name that checkpoints give them, and how such a checkpoint is recognised.

Sources: ``transformers/models/umt5/modeling_umt5.py``; ``Wan-Video/Wan2.1``, ``wan/modules/t5.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.weights.opened import Opened
from rehyat_jax.weights.registry import Component, Dialect, Shapes
from rehyat_jax.weights.rows import Row, rows_of_linear


def _rows() -> Iterator[Row]:
    names: dict[str, str | tuple[str, ...]] = {
        "diffusers": ("shared.weight", "encoder.embed_tokens.weight"),
        "original": "token_embedding.weight",
    }
    yield Row("shared.embedding", names, not_zero=True)
    attention, feed_forward = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    for letter in "qkvo":
        yield from rows_of_linear(
            f"block.self_attention.{letter}",
            {"diffusers": f"{attention}.SelfAttention.{letter}", "original": f"blocks.{{}}.attn.{letter}"},
            bias=False,
        )
    bias = "relative_attention_bias"
    yield Row(
        f"block.self_attention.{bias}.embedding",
        {
            "diffusers": f"{attention}.SelfAttention.{bias}.weight",
            "original": "blocks.{}.pos_embedding.embedding.weight",
        },
    )
    norm = {"diffusers": f"{attention}.layer_norm.weight", "original": "blocks.{}.norm1.weight"}
    yield Row("block.self_attention_norm.scale", norm)
    for ours, original in (("wi_0", "gate.0"), ("wi_1", "fc1"), ("wo", "fc2")):
        yield from rows_of_linear(
            f"block.ffn.{ours}",
            {"diffusers": f"{feed_forward}.DenseReluDense.{ours}", "original": f"blocks.{{}}.ffn.{original}"},
            bias=False,
            float32_for_float16=ours == "wo",
        )
    norm = {"diffusers": f"{feed_forward}.layer_norm.weight", "original": "blocks.{}.norm2.weight"}
    yield Row("block.ffn_norm.scale", norm)
    yield Row("final_layer_norm.scale", {"diffusers": "encoder.final_layer_norm.weight", "original": "norm.weight"})


#: ``UMT5Encoder``. The embedding is stored under either or both of two tied names.
UMT5 = tuple(_rows())


def _infer(shapes: Shapes) -> TextEncoderConfig:
    attention = "encoder.block.0.layer.0.SelfAttention"
    inner, width = shapes.get(f"{attention}.q.weight", rank=2)
    buckets, heads = shapes.get(f"{attention}.relative_attention_bias.weight", rank=2)
    return TextEncoderConfig(
        vocab_size=shapes.get("shared.weight", rank=2)[0],
        d_model=width,
        d_kv=inner // max(heads, 1),
        d_ff=shapes.get("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", rank=2)[0],
        num_layers=shapes.layers("encoder.block.{}.layer.0.layer_norm.weight"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


TEXT_ENCODER = Component(
    name="text_encoder",
    title="UMT5 text encoder",
    module=UMT5Encoder,
    config_type=TextEncoderConfig,
    described_by=lambda config: config.get("model_type") == "umt5",
    rows=lambda config: UMT5,
    dialects=(
        Dialect(name="diffusers", mark=re.compile(r"(shared\.weight|encoder\.block\.[0-9]+\.layer)")),
        Dialect(name="original", mark=re.compile(r"blocks\.[0-9]+\.pos_embedding\.")),
    ),
    infer=_infer,
    least_tensors=lambda config: config.num_layers,
    stem="model",
    released_as=re.compile(r"models_t5|umt5", re.IGNORECASE),
    kept_in=("text_encoders", "clip"),
    # A whole UMT5 has a decoder, and an output layer or its own copy of the embedding.
    unneeded=re.compile(r"(decoder|lm_head)\."),
)


def carried_tokenizer(opened: Opened) -> bytes | None:
    """The SentencePiece model that a text encoder's file carries (ComfyUI's ``spiece_model``), if it does."""
    name = next((name for name in opened.beside if name.rpartition(".")[2] == "spiece_model"), None)
    if name is None or opened.tensors.infos[name].kind not in ("U8", "I8"):
        return None
    return b"".join(piece.tobytes() for piece in opened.tensors.pieces(name))
