"""A mesh of devices as a configuration or a command line has it.

Four axes, any of them of size 1:

- ``data``: replicas of the parameters, each with its part of the batch; the slowest links;
- ``fsdp``: its part of the batch and of the parameters, which are gathered layer by layer;
- ``context``: a part of time in whole chunks, and again of the parameters;
- ``tensor``: a part of the heads and of the feed-forward's hidden units.

Commands read it before JAX is imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from rehyat_jax.errors import ConfigError

#: The names of a mesh's axes, slowest links first. All four are there, some of size 1.
AXES = ("data", "fsdp", "context", "tensor")

#: Where the video autoencoder runs: on so many devices of its own, or on all of the mesh.
VaeDevices: TypeAlias = int | Literal["mesh"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis."""

    data: int = 1
    """Parts of a batch, guidance's two evaluations among them: each device with all weights."""
    fsdp: int | None = None
    """Parts of a batch, and of the weights, which are gathered layer by layer. None: all devices that the others
    leave."""
    context: int = 1
    """Parts of a video's time in whole chunks, or of a chunk's tokens; again of the weights."""
    tensor: int = 1
    """Parts of the heads and of the feed-forward's hidden units, whose weights stay where they are."""
    automatic: bool = False
    """A sensible division of all devices that there are, in place of these sizes."""

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise ConfigError(f"the mesh's {axis} must be at least 1, not {size}")

    @property
    def single(self) -> bool:
        """Whether this is one device."""
        return not self.automatic and (self.data, self.fsdp, self.context, self.tensor) == (1, 1, 1, 1)

    @property
    def count(self) -> int:
        """Of its devices, where none is left to be filled in."""
        return self.data * (self.fsdp or 1) * self.context * self.tensor

    @classmethod
    def for_devices(cls, devices: int, *, chunks: int = 1, batch: int | None = None) -> MeshConfig:
        """A sensible mesh for a Wan of either size on 8, 64, 256 or 512 chips.

        Parameters are sharded over all chips up to 256, and a power of two of them. Time is not: that costs nothing but
        needs a clip a chip. Where the batch has fewer clips, time is sharded by as little as makes up for it, and into
        no more pieces than the video has ``chunks``. Heads are not: 12 do not divide by 8, and 40 need an
        exchange of all activations twice a layer.

        Args:
            batch: clips a step, over all devices; None: as many as devices.

        Raises:
            ConfigError: the devices cannot share this batch.
        """
        clips = devices if batch is None else batch
        context = devices // math.gcd(devices, clips)
        if context > chunks:
            raise ConfigError(
                f"{devices} devices cannot share {clips} clips of {chunks} chunks: a clip can be cut into {chunks} at "
                "most"
            )
        fsdp = math.gcd(devices // context, max(256 // context, 1))
        return cls(data=devices // context // fsdp, fsdp=fsdp, context=context)

    def sizes(self, devices: int) -> tuple[int, int, int, int]:
        """Of the axes, in the order of `AXES`.

        Raises:
            ConfigError: the axes do not divide the devices, or leave some unused.
        """
        others = self.data * self.context * self.tensor
        fsdp = devices // others if self.fsdp is None else self.fsdp
        if others * fsdp != devices:
            raise ConfigError(
                f"a mesh of data {self.data}, fsdp {'the rest' if self.fsdp is None else fsdp}, context {self.context} "
                f"and tensor {self.tensor} does not divide {devices} devices"
            )
        return self.data, fsdp, self.context, self.tensor

    def make(self, devices: Sequence[Any] | None = None, *, chunks: int = 1, batch: int | None = None) -> Any:
        """The `jax.sharding.Mesh` over these devices, or all there are; ``jax.set_mesh`` puts it in force.

        Args:
            chunks, batch: as `for_devices` takes them, for an automatic mesh.

        Raises:
            ConfigError: see `sizes` and `for_devices`.
        """
        import jax

        devices = jax.devices() if devices is None else devices
        config = self.for_devices(len(devices), chunks=chunks, batch=batch) if self.automatic else self
        sizes = config.sizes(len(devices))
        from jax.experimental import mesh_utils
        from jax.sharding import AxisType, Mesh

        # Neighbours in the mesh are neighbours in the machine, also where an axis is a part of one of the machine's.
        grid = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def devices_left(vae: VaeDevices | None, mesh: MeshConfig | None, *, found: int) -> int:
    """Devices that are left to the mesh.

    Args:
        mesh: None: one device.
        found: all that there are.

    Raises:
        ConfigError: they are not enough for both, or there is no mesh for the autoencoder to be on.
    """
    if vae == "mesh" and (mesh is None or mesh.single):
        raise ConfigError("vae_devices mesh needs a mesh of several devices, as --mesh.automatic gives")
    own = vae if isinstance(vae, int) else 0
    taken = 1 if mesh is None else mesh.count
    if own and taken + own > found:
        beside = "the transformer's one" if taken == 1 else f"a mesh of {taken}"
        raise ConfigError(f"vae_devices {own} beside {beside} are {taken + own} devices, and there are {found}")
    return found - own


def picture_grid(devices: int, *, height: int, width: int) -> tuple[int, int]:
    """Into how many parts a picture's rows and columns are divided: all equal, and as many of rows as can be.

    Args:
        height, width: in latent pixels, which are not divided.

    Raises:
        ConfigError: so many devices cannot have equal parts.
    """

    def grids(count: int) -> list[tuple[int, int]]:
        each = [(rows, count // rows) for rows in range(count, 0, -1) if count % rows == 0]
        return [(rows, columns) for rows, columns in each if height % rows == 0 and width % columns == 0]

    if not (found := grids(devices)):
        fitting = ", ".join(str(count) for count in range(1, devices) if grids(count))
        raise ConfigError(
            f"vae_devices: {devices} devices cannot have equal parts of a picture of {height} x {width} latent pixels; "
            f"of fewer, {fitting} can"
        )
    return found[0]
