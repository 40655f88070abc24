"""What memory Wan's networks take, from their sizes alone: before anything is read or compiled.

Constants are fits to XLA's own account of the compiled programs (``Compiled.memory_analysis``), which
``tests/models/test_memory.py`` compares with these figures: they are honest to a factor of two, and mostly to a tenth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rehyat_jax.mixers.config import Conversion, read_conversion
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.taehv.config import TinyDecoderConfig
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.mixing import Mixing
from rehyat_jax.runtime.memory import Need, Room
from rehyat_jax.runtime.mesh_config import MeshConfig, VaeDevices
from rehyat_jax.runtime.platform import platform
from rehyat_jax.runtime.variables import abstract_module
from rehyat_jax.sampling.rollout import ContextNoise
from rehyat_jax.weights.files import read_json

#: Query rows of plain XLA attention whose scores are held at once, and how often (scores, and part of their softmax).
_QUERIES, _SCORES = 1024, 1.25
#: Arrays [B, N, dim] that a block holds at once beside its feed-forward's.
_BLOCK_ARRAYS = 4.0
#: What the VAE's decoder keeps between latent frames, and holds at once for the four frames of one, in float32 numbers
#: a pixel and base channel. Its encoder: for each frame of a step.
_DECODER_STATE, _DECODER, _ENCODER = 25.0, 10.0, 9.0
#: What a process takes beside its arrays once it has imported what it needs: compiler, programs, codecs. 270 to 370
#: MB were seen of a tiny and the bundled model; on an accelerator it is the host's.
_PROGRAM = 300_000_000
#: How much more a residual decoder holds: its upsamplings keep their width.
_RESIDUAL_DECODER = 2.0
#: As `_DECODER_STATE` and `_DECODER`, of a preview decoder, a pixel and channel of its last layers.
_PREVIEW_STATE, _PREVIEW = 1.3, 2.0


def weights_bytes(folder: Path, name: str, *, dtype: DTypeLike, eight_bits: bool = False) -> int:
    """A network's parameters in ``dtype``, its matrices in eight bits if that is said, by its files' headers.

    Raises:
        CheckpointError, ConfigError: there is no such network.
    """
    infos = open_component(folder, name).tensors.infos.values()
    wide = jnp.dtype(dtype).itemsize
    return sum(info.size * (1 if eight_bits and len(info.shape) == 2 else wide) for info in infos if info.readable)


def transformer_bytes(
    model: WanConfig,
    *,
    tokens: int,
    batch: int,
    dtype: DTypeLike,
    weights: int,
    text_tokens: int = 512,
    on: str | None = None,
) -> int:
    """What a forward pass holds at its fullest, the weights themselves aside.

    Args:
        tokens: of a video, or of a chunk.
        batch: rows: two of a video with guidance.
        weights: bytes of the transformer's weights.
        on: the platform; this one when not given.
    """
    size = jnp.dtype(dtype).itemsize
    cpu = (on or platform()) == "cpu"
    wide = 4 if cpu else size  # a CPU computes half precision in float32
    arrays = batch * tokens * (_BLOCK_ARRAYS * model.dim + model.ffn_dim / 2) * wide
    keys = max(tokens, text_tokens)
    scores = _SCORES * batch * model.num_attention_heads * min(tokens, _QUERIES) * keys * 4
    if not cpu and size == 2:  # flash attention
        scores = 0
    return int(arrays + scores) + _copied_for_layout(weights, dtype, on)


def mixer_cache_bytes(
    model: WanConfig, mixing: Mixing, *, frame_tokens: int, batch: int, levels: int, dtype: DTypeLike
) -> int:
    """What a stream of a student keeps of its past.

    Args:
        levels: noise levels at which the past is kept: the sampling steps, or one.
    """
    shape = {"heads": model.num_attention_heads, "head_dim": model.attention_head_dim}
    kinds: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    total = 0
    for mixer in mixing.converted_groups:
        module: Any = abstract_module(mixer.make, **shape, **kinds)
        state = jax.eval_shape(lambda m=module: m.init_state(batch=batch, frame=frame_tokens, dtype=kinds["dtype"]))
        total += len(mixing.blocks(mixer)) * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return levels * total


def decoder_bytes(vae: VAEConfig, *, height: int, width: int) -> int:
    """What decoding a latent frame holds: what is kept of the frames before among it."""
    channels = vae.decoder_dim * (_RESIDUAL_DECODER if vae.is_residual else 1)
    return int((_DECODER_STATE + _DECODER * vae.temporal_factor) * height * width / vae.patch**2 * channels * 4)


def preview_bytes(preview: TinyDecoderConfig, *, height: int, width: int) -> int:
    """As `decoder_bytes`, of a preview decoder."""
    pixels = height * width / preview.patch_size**2
    return int((_PREVIEW_STATE + _PREVIEW * preview.temporal_factor) * pixels * preview.widths[-1] * 4)


def encoder_bytes(vae: VAEConfig, *, frames: int, height: int, width: int, latent_frames_per_step: int) -> int:
    """What encoding a video holds, so many latent frames at a time; the video in float32 among it."""
    step = min(latent_frames_per_step * vae.temporal_factor, frames)
    return int(height * width * 4 * (_ENCODER * step * vae.base_dim / vae.patch**2 + 2 * 3 * frames))


def text_encoder_bytes(folder: Path, *, dtype: DTypeLike) -> int:
    """The text encoder, and what embedding a prompt holds beside it."""
    weights = weights_bytes(folder, "text_encoder", dtype=dtype)
    return weights + _copied_for_layout(weights, dtype)


def _copied_for_layout(weights: int, dtype: DTypeLike, on: str | None = None) -> int:
    """XLA's CPU backend lays a network's weights out again for its products, in float32."""
    return weights // jnp.dtype(dtype).itemsize * 4 if (on or platform()) == "cpu" else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoShape:
    """A video that is to be made, as far as memory is concerned."""

    frames: int
    height: int
    width: int
    steps: int
    #: Whether there is classifier-free guidance.
    guided: bool

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
    """How a video is made, as far as memory is concerned.

    Attributes:
        hybrid: how blocks are converted.
        streams: a chunk at a time, where the model can; else as a whole.
        mesh: over which the transformer and the text encoder are sharded; what is said is of each of its devices.
        offload: the blocks of both come from the host, and the text encoder leaves once a prompt is embedded.
        vae_tile: frames are decoded by tiles of so many pixels a side.
        vae_devices: where frames are decoded, when not by the first device.
        preview: of a decoder in the VAE's place, whose own weights hardly count.
    """

    hybrid: Conversion | None
    streams: bool
    remember: ContextNoise = "steps"
    mesh: MeshConfig | None = None
    offload: bool = False
    vae_tile: int | None = None
    vae_devices: VaeDevices | None = None
    preview: TinyDecoderConfig | None = None


def preview_config(decoder: Path | None) -> TinyDecoderConfig | None:
    """Of a preview decoder's file; None for none.

    Raises:
        CheckpointError: it is no such file.
    """
    if decoder is None:
        return None
    config: TinyDecoderConfig = open_component(decoder.expanduser(), "preview_decoder").config
    return config


def student_config(folder: Path) -> Conversion | None:
    """How a model's blocks are converted; None: it is a teacher.

    Raises:
        CheckpointError, ConfigError: its configuration is damaged or impossible.
    """
    for home in (folder / "transformer" / "rehyat", folder / "rehyat"):
        if (home / "config.json").is_file():
            return read_conversion(read_json(home / "config.json"))
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """A model's networks, as far as memory is concerned; bytes of weights."""

    model: WanConfig
    vae: VAEConfig
    dtype: DTypeLike
    #: Of one transformer, and of its largest block, of which two are on the device where blocks come from the host.
    transformer: int
    blocks: int
    text_encoder: int
    decoder: int
    #: Of the text encoder's blocks: where they come from the host, two are on the device.
    text_blocks: int
    text_layers: int

    @classmethod
    def of_folder(cls, folder: Path, *, dtype: DTypeLike, eight_bits: bool = False) -> Networks:
        """
        Raises:
            CheckpointError, ConfigError: the folder has not all three networks.
        """
        how: dict[str, Any] = {"dtype": dtype, "eight_bits": eight_bits}
        model, text = (open_component(folder, name).config for name in ("transformer", "text_encoder"))
        return cls(
            model=model,
            vae=open_component(folder, "vae").config,
            dtype=dtype,
            transformer=weights_bytes(folder, "transformer", **how),
            blocks=blocks_bytes(model, **how),
            text_encoder=weights_bytes(folder, "text_encoder", **how),
            decoder=weights_bytes(folder, "vae", dtype=jnp.float32),
            text_blocks=text_blocks_bytes(text, **how),
            text_layers=text.num_layers,
        )


def blocks_bytes(model: WanConfig, *, dtype: DTypeLike, eight_bits: bool) -> int:
    """Of all a transformer's blocks: their matrices, which are nearly all of it."""
    matrices = 8 * model.dim**2 + 2 * model.dim * model.ffn_dim + (2 * model.dim**2 if model.image_dim else 0)
    return model.num_layers * matrices * (1 if eight_bits else jnp.dtype(dtype).itemsize)


def text_blocks_bytes(text: TextEncoderConfig, *, dtype: DTypeLike, eight_bits: bool) -> int:
    """As `blocks_bytes`, of a text encoder."""
    matrices = 4 * text.d_model * text.num_heads * text.d_kv + 3 * text.d_model * text.d_ff
    return text.num_layers * matrices * (1 if eight_bits else jnp.dtype(dtype).itemsize)


def video_need(
    folder: Path,
    shape: VideoShape,
    making: Making,
    *,
    dtype: DTypeLike,
    eight_bits: bool = False,
) -> Need:
    """What making a video takes: `networks_need` of a model's folder.

    Raises:
        CheckpointError, ConfigError: the folder has not all three networks.
    """
    return networks_need(Networks.of_folder(folder, dtype=dtype, eight_bits=eight_bits), shape, making)


def networks_need(networks: Networks, shape: VideoShape, making: Making, *, on: str | None = None) -> Need:
    """What making a video takes; of two experts, with one at a time on the device.

    Args:
        on: the platform; this one when not given.
    """
    model, vae, dtype = networks.model, networks.vae, networks.dtype
    latents = (shape.frames - 1) // vae.temporal_factor + 1
    sides = (
        side // (vae.spatial_factor * patch)
        for side, patch in zip((shape.height, shape.width), model.patch_size[1:], strict=True)
    )
    frame, batch = math.prod(sides), 2 if shape.guided else 1
    cache, mixing = 0, Mixing.of(making.hybrid, model.num_layers)
    streams = making.streams and mixing.why_not_stream() is None
    if streams:
        latents = min(latents, mixing.chunk_frames)
        levels = shape.steps if making.remember == "steps" else 1
        cache = mixer_cache_bytes(model, mixing, frame_tokens=frame, batch=batch, levels=levels, dtype=dtype)
    weights, text = networks.transformer, networks.text_encoder
    on_host = networks.blocks - 2 * networks.blocks // model.num_layers if making.offload else 0
    work = transformer_bytes(
        model, tokens=max(latents * frame, 1), batch=batch, dtype=dtype, weights=weights - on_host, on=on
    )
    copied_for_layout = _copied_for_layout(text, dtype, on)
    text_on_host = networks.text_blocks - 2 * networks.text_blocks // networks.text_layers if making.offload else 0
    if (mesh := making.mesh) is not None and (on or platform()) != "cpu":  # whose virtual devices share one memory
        held = (mesh.fsdp or 1) * mesh.context * mesh.tensor
        weights, text = weights // held, text // held
        work //= mesh.context * mesh.tensor * math.gcd(batch, mesh.data * (mesh.fsdp or 1))
        cache //= math.gcd(mesh.context * mesh.tensor, model.num_attention_heads)
    height, width = (min(making.vae_tile or side, side) for side in (shape.height, shape.width))
    decoding = decoder_bytes(vae, height=height, width=width)
    if making.preview is not None:
        decoding = preview_bytes(making.preview, height=height, width=width)
    if streams and (making.vae_devices is not None or (making.mesh is None and (on or platform()) == "cpu")):
        cache *= 2  # of a chunk that is begun before the last one's frames are decoded
    beside, apart = networks.decoder, {}
    if (own := making.vae_devices) is not None and (on or platform()) != "cpu":
        decoding //= own if isinstance(own, int) else mesh.count if mesh else 1
        if isinstance(own, int):
            apart, beside, decoding = {"the VAE": beside, "decoding": decoding}, 0, 0
    parts = {
        "the text encoder": 0 if making.offload else text,
        "the transformer": weights - on_host,
        "the VAE": beside,
        "the past of the stream": cache,
    }
    # One after the other: the prompt is embedded, the video denoised, then decoded; a stream does the last two in turn,
    # and what its decoder keeps stays.
    embedding = copied_for_layout + (text - text_on_host if making.offload else 0)
    phases = {"embedding the prompt": embedding, "denoising": work, "decoding": decoding}
    if streams:
        phases["denoising"] += phases.pop("decoding")
    largest = max(phases, key=lambda name: phases[name])
    pixels = shape.frames * shape.height * shape.width * 3
    host = _PROGRAM + (0 if streams else 2 * pixels) + on_host + text_on_host
    device = parts | {largest: phases[largest]}
    return Need(device=max(device, apart, key=lambda each: sum(each.values())), host=host)


def size_unit(folder: Path) -> tuple[int, int]:
    """Pixels that a video's height and width are multiples of.

    Raises:
        CheckpointError, ConfigError: there is no transformer or VAE.
    """
    model, vae = open_component(folder, "transformer").config, open_component(folder, "vae").config
    return model.patch_size[1] * vae.spatial_factor, model.patch_size[2] * vae.spatial_factor


def fitting_size(need: Callable[[int, int], Need], *, height: int, width: int, multiple: tuple[int, int]) -> str | None:
    """The largest of a few smaller sizes of about this shape that fits here, as an option; None: none does."""
    room = Room.here()
    for share in (0.75, 0.5, 0.375, 0.25):
        rows, columns = (max(int(side * share) // m, 1) * m for side, m in zip((height, width), multiple, strict=True))
        if room.lacking(need(rows, columns)) is None:
            return f"--size {columns}x{rows}"
    return None
