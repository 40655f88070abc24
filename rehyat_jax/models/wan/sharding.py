"""Which meshes a transformer can be sharded over, and which is a sensible one to generate on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.folder import read_defaults
from rehyat_jax.models.memory import student_config
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.mixing import Mixing
from rehyat_jax.runtime import arguments
from rehyat_jax.runtime.devices import ONE_DEVICE, Devices
from rehyat_jax.runtime.mesh import ALONG
from rehyat_jax.runtime.mesh_config import AXES, MeshConfig, VaeDevices, devices_left, picture_grid


def check_mesh(
    size: Mapping[str, int],
    model: WanConfig,
    *,
    hybrid: Conversion | None,
    batch: int | None = None,
    latent_frames: int | None = None,
) -> None:
    """
    Args:
        size: a mesh's shape, by axis.
        hybrid: how blocks are converted. Their own parameters are small: where training does not say its batch, those
            that do not divide are on every device.
        batch: clips of a step (of one accumulation), over all devices; None: of any number, which devices may have all.
        latent_frames: of a whole video; None: of a stream's chunk, whose tokens need not divide.

    Raises:
        ConfigError: the model's heads or width, the batch or the time do not divide by the mesh's axes.
    """
    of_mixers = [
        (f"{dimension} of a head", number, ALONG[dimension])
        for mixer in (() if hybrid is None or batch is None else hybrid.distinct())
        for dimension, number in mixer.divided(model.attention_head_dim).items()
    ]
    for what, number, by in [
        ("heads", model.num_attention_heads, ("tensor",)),
        ("hidden units", model.ffn_dim, ("tensor",)),
        ("channels", model.dim, ("fsdp", "context")),
        *of_mixers,
        ("clips of a batch", 0 if batch is None else batch, ("data", "fsdp")),
    ]:
        pieces = math.prod(size[axis] for axis in by)
        if number % pieces:
            raise ConfigError(f"{number} {what} do not divide by {' x '.join(by)} = {pieces} of the mesh")
    if latent_frames is None:
        return
    frames, chunk = latent_frames // model.patch_size[0], 1 if hybrid is None else hybrid.chunk_frames
    if size["context"] > 1 and (frames % chunk or frames // chunk < size["context"]):
        raise ConfigError(
            f"{frames} latent frames cannot be cut by context = {size['context']} of the mesh: that takes whole chunks "
            f"of {chunk}, one for each device at least"
        )


def devices_for(
    mesh: MeshConfig | None,
    folder: Path,
    *,
    hybrid: Conversion | Literal["auto"] | None,
    vae: VaeDevices | None = None,
) -> Devices:
    """The devices that a folder's model is generated on, before any of it is read.

    Args:
        mesh: as a user gives it; None: one device.
        hybrid: how blocks are converted; "auto": as the folder has it.
        vae: the autoencoder's, to which the last are left.

    Raises:
        ConfigError: the mesh does not divide the model, or the devices that there are.
    """
    found = jax.device_count()
    if (found == 1 and (mesh is None or mesh.automatic)) or (mesh is None and jax.process_count() > 1):
        return ONE_DEVICE
    conversion = student_config(folder) if hybrid == "auto" else hybrid
    defaults = read_defaults(folder, student=hybrid == "auto")
    chosen = mesh_for_video(
        # One of several devices is a mesh too: kernels run where a program knows its devices.
        mesh or MeshConfig(fsdp=1),
        folder,
        hybrid=conversion,
        # Videos of other lengths are checked when they are asked for.
        frames=defaults.num_frames if mesh is not None and mesh.automatic else None,
        guided=defaults.guidance_scale > 1,
        streams=True,
        devices=devices_left(vae, mesh, found=found),
    )
    return Devices.first(chosen)


def checked_vae_devices(vae: Any, mesh: MeshConfig | None, *, vae_tile: int | None) -> VaeDevices | None:
    """The autoencoder's devices as a user gives them.

    Raises:
        RehyatError: they are none, or not to be had here, or have another option beside them.
    """
    if vae is None:
        return None
    if isinstance(vae, str) and vae != "mesh":
        raise arguments.wrong("vae_devices", vae, 'a whole number of 1 or more, or "mesh"')
    wanted: VaeDevices = "mesh" if vae == "mesh" else arguments.whole_number("vae_devices", vae, least=1)
    if vae_tile is not None:
        raise RehyatError("vae_tile is for one device, and vae_devices divide the picture themselves: give one of them")
    devices_left(wanted, mesh, found=jax.device_count())
    return wanted


def check_picture(vae: VaeDevices | None, mesh: MeshConfig | None, folder: Path, *, height: int, width: int) -> None:
    """That a folder's autoencoder can be divided by pictures of this size in pixels, before any of it is read.

    Raises:
        CheckpointError: the folder has no such network.
        ConfigError: it cannot.
    """
    if vae is None:
        return
    factor = open_component(folder, "vae").config.spatial_factor
    count = vae if isinstance(vae, int) else 1 if mesh is None else mesh.count
    picture_grid(count, height=height // factor, width=width // factor)


def mesh_for_video(
    config: MeshConfig,
    folder: Path,
    *,
    hybrid: Conversion | None,
    frames: int | None,
    guided: bool,
    streams: bool,
    devices: int,
) -> MeshConfig:
    """`generation_mesh` for a folder's model, before any of it is read.

    Args:
        hybrid: how blocks are converted.
        frames: of a whole video; None: not known yet, and checked later.
        guided: whether there is classifier-free guidance.
        streams: the video is made chunk by chunk where the model can.

    Raises:
        CheckpointError, ConfigError: the folder has no such networks; as `generation_mesh`.
    """
    model, vae = open_component(folder, "transformer").config, open_component(folder, "vae").config
    streams = streams and Mixing.of(hybrid, model.num_layers).why_not_stream() is None
    return generation_mesh(
        config,
        model,
        hybrid=hybrid,
        devices=devices,
        rows=2 if guided else 1,
        latent_frames=None if streams or frames is None else (frames - 1) // vae.temporal_factor + 1,
    )


def generation_mesh(
    config: MeshConfig,
    model: WanConfig,
    *,
    hybrid: Conversion | None,
    devices: int,
    rows: int,
    latent_frames: int | None,
) -> MeshConfig:
    """The mesh to generate on: as it is configured, or a sensible one of all devices where it is automatic.

    Of whole videos guidance's evaluations and a batch's videos go to devices of their own first, and time is sharded by
    the rest, as far as there are chunks: that needs the fewest exchanges. Streams are sharded by heads and hidden
    units, where no weight is moved, and by a chunk's tokens over the devices that heads do not divide.

    Args:
        devices: how many there are.
        rows: of a forward pass, guidance's among them.
        latent_frames: of a whole video; None: a stream.

    Raises:
        ConfigError: there are fewer devices, or the model or the video do not divide by the mesh.
    """
    if not config.automatic:
        others = config.data * config.context * config.tensor
        fsdp = max(devices // others, 1) if config.fsdp is None else config.fsdp
        chosen = dataclasses.replace(config, fsdp=fsdp)
        if chosen.count > devices:
            raise ConfigError(
                f"a mesh of data {chosen.data}, fsdp {fsdp}, context {chosen.context} and tensor {chosen.tensor} is "
                f"{chosen.count} devices, and there are {devices}"
            )
    else:
        chosen = _automatic(model, hybrid=hybrid, devices=devices, rows=rows, latent_frames=latent_frames)
    sizes = dict(zip(AXES, chosen.sizes(chosen.count), strict=True))
    check_mesh(sizes, model, hybrid=hybrid, latent_frames=latent_frames)
    return chosen


def _automatic(
    model: WanConfig, *, hybrid: Conversion | None, devices: int, rows: int, latent_frames: int | None
) -> MeshConfig:
    heads = math.gcd(model.num_attention_heads, model.ffn_dim)
    if latent_frames is None:
        tensor = math.gcd(devices, heads)
        return MeshConfig(data=1, fsdp=1, context=devices // tensor, tensor=tensor)
    chunk = 1 if hybrid is None else hybrid.chunk_frames
    frames = latent_frames // model.patch_size[0]
    causal = hybrid is None or all(mixer.why_not_stream() is None for mixer in hybrid.distinct())
    most = frames // chunk if causal and frames % chunk == 0 else 1
    fsdp = math.gcd(devices, rows)
    rest = devices // fsdp
    context = max(size for size in range(1, rest + 1) if rest % size == 0 and size <= max(most, 1))
    return MeshConfig(data=1, fsdp=fsdp, context=context, tensor=rest // context)
