"""The three networks of a checkpoint: what each is called, configured, built from and recognised by."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import nnx

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.config import TextEncoderConfig, VAEConfig, WanConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.weights import vae_names
from rehyat_jax.weights.files import TensorInfo
from rehyat_jax.weights.names import TRANSFORMER, UMT5, Dialect, Kind, Row, translate

#: The networks by the name of their folder in the diffusers layout.
ComponentName = Literal["transformer", "vae", "text_encoder"]
Config = WanConfig | VAEConfig | TextEncoderConfig
COMPONENTS: tuple[ComponentName, ...] = get_args(ComponentName)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """One network of a Wan checkpoint."""

    name: ComponentName
    title: str
    config_type: type[Any]
    #: File name without ending, in the diffusers layout.
    stem: str
    #: Files that hold it in the original layout, best first.
    original_files: tuple[str, ...]
    #: A tensor name that begins so is this network's and no other's.
    marks: Mapping[Dialect, re.Pattern[str]]
    rows: Callable[[Any], tuple[Row, ...]]
    #: Sizes, read from the tensors' shapes where no configuration lies beside them.
    infer: Callable[[Mapping[str, TensorInfo], Dialect], Config]
    #: The least tensors that a configuration asks for, found without building anything.
    least_tensors: Callable[[Any], int]
    module: type[Any]

    def abstract(self, config: Config, dtype: Any) -> Any:
        """The module without memory: shapes only."""
        kinds = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
        return nnx.eval_shape(lambda: self.module(config, **kinds, rngs=nnx.Rngs(0)))


def recognise(names: Iterable[str]) -> tuple[ComponentName, Dialect] | None:
    """Which network these (clean) names belong to, and in which dialect."""
    names = list(names)
    for component in BY_NAME.values():
        for dialect, mark in component.marks.items():
            if any(mark.match(name) for name in names):
                return component.name, dialect
    return None


def _rows_of_vae(config: VAEConfig) -> tuple[Row, ...]:
    def kind(row: vae_names.Row) -> Kind:
        if row.kind == "gamma":
            # Only attention normalises images, and its gamma has one axis fewer.
            return "gamma2d" if ".attentions." in row.path else "gamma3d"
        return "same" if row.kind == "vector" else row.kind

    return tuple(Row(row.path, row.diffusers, row.original, kind(row)) for row in vae_names.vae_rows(config))


class _Shapes:
    """Shapes by diffusers' name, whatever the file's dialect."""

    def __init__(self, infos: Mapping[str, TensorInfo], rows: tuple[Row, ...], dialect: Dialect) -> None:
        self._infos, self._rows, self._dialect = infos, rows, dialect

    def get(self, name: str, rank: int) -> tuple[int, ...]:
        theirs = translate(name, self._rows, "diffusers", self._dialect) or name
        if theirs not in self._infos:
            raise CheckpointError(f"tensor {theirs!r} is missing, and without a config.json its size is not known")
        shape = self._infos[theirs].shape
        if len(shape) != rank:
            raise CheckpointError(f"tensor {theirs!r} has shape {list(shape)}, which should have {rank} dimensions")
        return shape


def _layers(infos: Iterable[str], pattern: str) -> int:
    found = [int(match[1]) for name in infos if (match := re.match(pattern, name)) and len(match[1]) < 9]
    return max(found, default=-1) + 1


def _infer_transformer(infos: Mapping[str, TensorInfo], dialect: Dialect) -> WanConfig:
    shapes = _Shapes(infos, TRANSFORMER, dialect)
    dim, channels, *patch = shapes.get("patch_embedding.weight", 5)
    # Every Wan2.1 has heads of 128; the tensors do not tell.
    if dim % 128:
        raise CheckpointError(f"a transformer of width {dim} needs a config.json beside it that gives its heads")
    volume = max(patch[0] * patch[1] * patch[2], 1)
    return WanConfig(
        num_layers=_layers(infos, r"blocks\.([0-9]+)\."),
        num_attention_heads=dim // 128,
        attention_head_dim=128,
        ffn_dim=shapes.get("blocks.0.ffn.net.0.proj.weight", 2)[0],
        in_channels=channels,
        out_channels=shapes.get("proj_out.weight", 2)[0] // volume,
        text_dim=shapes.get("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        freq_dim=shapes.get("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        patch_size=(patch[0], patch[1], patch[2]),
    )


def _infer_vae(infos: Mapping[str, TensorInfo], dialect: Dialect) -> VAEConfig:
    """Wan2.1's, at the width and depth that the tensors show."""
    shapes = _Shapes(infos, _rows_of_vae(VAEConfig()), dialect)
    stages = len(VAEConfig().dim_mult)
    layers = _layers(infos, r"encoder\.(?:downsamples|down_blocks)\.([0-9]+)\.")
    return VAEConfig(
        base_dim=shapes.get("encoder.conv_in.weight", 5)[0],
        z_dim=shapes.get("post_quant_conv.weight", 5)[0],
        num_res_blocks=max((layers - stages + 1) // stages, 1),
    )


def _infer_text_encoder(infos: Mapping[str, TensorInfo], dialect: Dialect) -> TextEncoderConfig:
    shapes = _Shapes(infos, UMT5, dialect)
    attention = "encoder.block.0.layer.0.SelfAttention"
    inner, width = shapes.get(f"{attention}.q.weight", 2)
    buckets, heads = shapes.get(f"{attention}.relative_attention_bias.weight", 2)
    alias = "encoder.embed_tokens.weight"
    return TextEncoderConfig(
        vocab_size=shapes.get(alias if alias in infos else "shared.weight", 2)[0],
        d_model=width,
        d_kv=inner // max(heads, 1),
        d_ff=shapes.get("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        num_layers=_layers(infos, r"(?:encoder\.block|blocks)\.([0-9]+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


BY_NAME: dict[ComponentName, Component] = {
    "transformer": Component(
        name="transformer",
        title="Wan transformer",
        config_type=WanConfig,
        stem="diffusion_pytorch_model",
        original_files=("diffusion_pytorch_model*.safetensors.index.json", "diffusion_pytorch_model*.safetensors"),
        marks={
            "diffusers": re.compile(r"condition_embedder\."),
            "original": re.compile(r"(time_projection|time_embedding|text_embedding|head)\."),
        },
        rows=lambda config: TRANSFORMER,
        infer=_infer_transformer,
        least_tensors=lambda config: config.num_layers,
        module=WanTransformer,
    ),
    "vae": Component(
        name="vae",
        title="Wan VAE",
        config_type=VAEConfig,
        stem="diffusion_pytorch_model",
        original_files=("*VAE*.safetensors", "*VAE*.pth"),
        marks={
            "diffusers": re.compile(r"(encoder\.conv_in|encoder\.down_blocks|decoder\.up_blocks|post_quant_conv)\."),
            "original": re.compile(r"(encoder\.downsamples|decoder\.upsamples|decoder\.middle)\."),
        },
        rows=_rows_of_vae,
        infer=_infer_vae,
        least_tensors=lambda config: config.num_res_blocks,
        module=WanVAE,
    ),
    "text_encoder": Component(
        name="text_encoder",
        title="UMT5 text encoder",
        config_type=TextEncoderConfig,
        stem="model",
        original_files=("models_t5*.safetensors", "models_t5*.pth"),
        marks={
            "diffusers": re.compile(r"(shared\.weight|encoder\.block\.[0-9]+\.layer)"),
            "original": re.compile(r"(token_embedding|blocks\.[0-9]+\.pos_embedding)\."),
        },
        rows=lambda config: UMT5,
        infer=_infer_text_encoder,
        least_tensors=lambda config: config.num_layers,
        module=UMT5Encoder,
    ),
}


def narrow(row: Row, dtype: Any) -> Any:
    """The type in which a row is kept when the model is kept in ``dtype`` (diffusers' ``_keep_in_fp32_modules``)."""
    return jnp.dtype(jnp.float32) if row.float32 else jnp.dtype(dtype)
