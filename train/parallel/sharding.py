"""Sharding: a mesh from configuration, and how parameters, optimiser, averages, batches and states are cut over it.

Four axes (`rehyat_jax.runtime.mesh`), any of them of size 1:

- ``data``: whole copies of the parameters, each on its part of the batch; the slowest links;
- ``fsdp``: its part of the batch and of the parameters, which are gathered layer by layer;
- ``context``: a part of time in whole chunks, and again of the parameters;
- ``tensor``: a part of the heads and of the feed-forward's hidden units.

Rules name the dimensions of a parameter by its path; `rehyat_jax.runtime.mesh.ALONG` names the axes of a dimension. The
optimiser's moments and the moving average are cut as their parameters are: their paths end alike.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.mixers.hybrid import BlockState
from rehyat_jax.models.config import WanConfig
from rehyat_jax.runtime.mesh import AXES, Dimension, spec

#: Ends of paths, and the dimensions of the arrays there. What no rule names (norms, biases, tables: a thousandth of a
#: model) is whole on every device.
RULES: tuple[tuple[str, tuple[Dimension | None, ...]], ...] = (
    (r"blocks/attn[12]/to_[qkv]/kernel", (None, "width", "heads")),
    (r"blocks/attn[12]/to_out/kernel", (None, "heads", "width")),
    (r"blocks/ffn/up/kernel", (None, "width", "hidden")),
    (r"blocks/ffn/down/kernel", (None, "hidden", "width")),
    (r"phi_[qk]/layers/\d+/kernel", (None, "heads", "channels", "features")),
    (r"phi_[qk]/layers/\d+/bias", (None, "heads", None)),
    (r"patch_embedding/kernel", (None, None, None, None, "width")),
    (r"condition_embedder/\w+_embedder/linear_1/kernel", (None, "width")),
    (r"condition_embedder/\w+_embedder/linear_2/kernel", ("width", None)),
    (r"condition_embedder/time_proj/kernel", ("width", None)),
    (r"proj_out/kernel", ("width", None)),
)
_RULES = tuple((re.compile(rf"(^|/){end}$"), dimensions) for end, dimensions in RULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis."""

    data: int = 1
    #: None: all devices that the other axes leave.
    fsdp: int | None = None
    context: int = 1
    tensor: int = 1
    #: As `for_devices` has it for the devices that there are, in place of the sizes above.
    automatic: bool = False

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise ConfigError(f"the mesh's {axis} must be at least 1, not {size}")

    @property
    def single(self) -> bool:
        """Whether this is one device."""
        return not self.automatic and (self.data, self.fsdp, self.context, self.tensor) == (1, 1, 1, 1)

    @classmethod
    def for_devices(cls, devices: int, *, chunks: int = 1, batch: int | None = None) -> MeshConfig:
        """A sensible mesh for a Wan of either size on 8, 64, 256 or 512 chips.

        Parameters are cut by all chips up to 256, and by a power of two. Time is not cut, for that costs nothing but
        needs a clip a chip: where the batch has fewer clips, time is cut by as little as makes up for it, and by no
        more pieces than the video has ``chunks``. Heads are cut by nothing: 12 do not divide by 8, and 40 need an
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

    def make(self, devices: Sequence[jax.Device] | None = None, *, chunks: int = 1, batch: int | None = None) -> Mesh:
        """The mesh over these devices, or all there are; ``jax.set_mesh`` puts it in force.

        Args:
            chunks, batch: as `for_devices` takes them, for an automatic mesh.

        Raises:
            ConfigError: see `sizes` and `for_devices`.
        """
        devices = jax.devices() if devices is None else devices
        config = self.for_devices(len(devices), chunks=chunks, batch=batch) if self.automatic else self
        sizes = config.sizes(len(devices))
        # Neighbours in the mesh are neighbours in the machine, also where an axis is a part of one of the machine's.
        grid = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(
    size: Mapping[str, int], model: WanConfig, *, hybrid: HybridConfig | None, batch: int, latent_frames: int
) -> None:
    """
    Args:
        size: a mesh's shape, by axis.
        batch: clips of a step (of one accumulation), over all devices.

    Raises:
        ConfigError: the model's heads or width, the batch or the time do not divide by the mesh's axes.
    """
    frames = latent_frames // model.patch_size[0]
    chunk = 1 if hybrid is None else hybrid.chunk_frames
    features = model.attention_head_dim
    for what, number, by in [
        ("heads", model.num_attention_heads, ("tensor",)),
        ("hidden units", model.ffn_dim, ("tensor",)),
        ("channels", model.dim, ("fsdp", "context")),
        ("channels of a head", features, ("context",)),
        ("features of a head", features * (1 if hybrid is None else hybrid.degree), ("fsdp",)),
        ("clips of a batch", batch, ("data", "fsdp")),
    ]:
        pieces = math.prod(size[axis] for axis in by)
        if number % pieces:
            raise ConfigError(f"{number} {what} do not divide by {' x '.join(by)} = {pieces} of the mesh")
    if size["context"] > 1 and (frames % chunk or frames // chunk < size["context"]):
        raise ConfigError(
            f"{frames} latent frames cannot be cut by context = {size['context']} of the mesh: that takes whole chunks "
            f"of {chunk}, one for each device at least"
        )


def parameter_specs(tree: PyTree) -> PyTree:
    """By `RULES`, a `PartitionSpec` for each array of a model's parameters or a training state with such in it."""

    def of(path: tuple, x: Any) -> PartitionSpec:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        # An nnx.State's leaf is an nnx.Param, whose value has a name of its own.
        name = re.sub(r"/(value|raw_value)$", "", name)
        for end, dimensions in _RULES:
            if end.search(name) and len(dimensions) == len(x.shape):
                return spec(*dimensions)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(of, tree)


def on_mesh(mesh: Mesh, specs: PyTree) -> PyTree:
    """Shardings, as ``jax.jit`` and ``jax.device_put`` take them."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def batch_specs(batch: PyTree) -> PyTree:
    """Every array by its first axis. Time is not cut: a batch is small, and 21 frames do not divide."""
    return jax.tree.map(lambda x: spec("batch", *[None] * (len(x.shape) - 1)), batch)


def state_specs(state: BlockState) -> Any:
    """A stream's states, with or without a leading axis of layers: by batch and heads."""
    dimensions: dict[str, tuple[Dimension | None, ...]] = {
        "s": ("batch", "heads", None, None),
        "z": ("batch", "heads", None),
        "seen": (),
    }

    def of(name: str, x: Any) -> PartitionSpec:
        named = dimensions.get(name, ("batch", None, "heads", None))
        return spec(*[None] * (len(x.shape) - len(named)), *named)

    kind: Any = type(state)
    return kind(*(of(name, x) for name, x in zip(state._fields, state, strict=True)))


def bytes_on_each(tree: PyTree, mesh: Mesh, specs: PyTree) -> int:
    """What one device holds of arrays that are cut so."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(on_mesh(mesh, specs)), strict=True)
    return sum(int(np.prod(s.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x, s in leaves)
