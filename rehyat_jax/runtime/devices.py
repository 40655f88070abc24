"""The devices of a run: one, or a mesh over those of every process; how arrays come to lie on them, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.mesh import ALONG
from rehyat_jax.runtime.mesh_config import MeshConfig, VaeDevices, picture_grid
from rehyat_jax.runtime.sharding import on_mesh, parameter_specs

#: Larger arrays come to the host a layer at a time.
_AT_ONCE = 1 << 30


class Rows(NamedTuple):
    """A process's share of a batch: this of so many parts, which other processes may have as well."""

    part: int
    parts: int


WHOLE = Rows(0, 1)


class Devices:
    """One device, where ``mesh`` is None: then arrays stay as and where they are."""

    def __init__(self, mesh: Mesh | None) -> None:
        self.mesh = mesh

    @classmethod
    def of(
        cls,
        config: MeshConfig,
        *,
        chunks: int = 1,
        batch: int | None = None,
        among: Sequence[jax.Device] | None = None,
    ) -> Devices:
        """All devices by a mesh, or the first where the configuration has one alone.

        Args:
            chunks: of the shortest video.
            batch: clips that are at work side by side.
            among: devices that need not be here; none: those that are.

        Raises:
            ConfigError: the mesh does not divide the devices.
        """
        if config.single and among is None:
            if jax.process_count() > 1:
                raise ConfigError(f"{jax.process_count()} processes need a mesh of more than one device")
            return cls(None)
        return cls(config.make(among, chunks=chunks, batch=batch))

    @classmethod
    def first(cls, config: MeshConfig) -> Devices:
        """A mesh of the first devices, as many as it takes; every process of a run must have its part of it.

        Raises:
            ConfigError: processes would be left without a device.
        """
        count, among = config.count, jax.devices()
        if count == 1 and len(among) == 1:
            return cls(None)
        if jax.process_count() > 1 and count != len(among):
            raise ConfigError(f"a mesh of {count} devices leaves some of {jax.process_count()} processes without any")
        return cls(config.make(among[:count]))

    @property
    def count(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def shape(self) -> dict[str, int]:
        """Devices along each axis; nothing on one device."""
        return {} if self.mesh is None else dict(self.mesh.shape)

    @property
    def batch_pieces(self) -> int:
        """Into how many parts a batch is sharded."""
        return math.prod(self.shape.get(axis, 1) for axis in ALONG["batch"])

    def rows(self) -> Rows:
        """Of a batch over the mesh: what this process's devices hold.

        Raises:
            ConfigError: the processes' shares of a batch overlap in part.
        """
        if self.mesh is None:
            return WHOLE
        axes, pieces = ALONG["batch"], self.batch_pieces
        held: dict[int, set[int]] = {}
        places: Any = NamedSharding(self.mesh, PartitionSpec(axes)).devices_indices_map((pieces,))
        for device, (place,) in places.items():
            held.setdefault(device.process_index, set()).add(place.start or 0)
        shares = sorted({tuple(sorted(places)) for places in held.values()})
        if sum(map(len, shares)) != pieces or len({len(share) for share in shares}) > 1:
            raise ConfigError("the mesh cuts a batch otherwise than by process: make data x fsdp a multiple of them")
        return Rows(shares.index(tuple(sorted(held[jax.process_index()]))), len(shares))

    def parameter_shardings(self, tree: PyTree) -> PyTree:
        """By `rehyat_jax.runtime.sharding.parameter_specs`; None on one device."""
        return None if self.mesh is None else on_mesh(self.mesh, parameter_specs(tree, mesh=self.mesh))

    def batch_shardings(self, tree: PyTree) -> PyTree:
        """By the first axis where that divides, else replicated; None on one device."""
        if self.mesh is None:
            return None
        mesh, axes, pieces = self.mesh, ALONG["batch"], self.batch_pieces

        def of(x: Any) -> NamedSharding:
            divides = len(x.shape) > 0 and x.shape[0] % pieces == 0 and x.shape[0] > 0
            return NamedSharding(mesh, PartitionSpec(axes) if divides else PartitionSpec())

        return jax.tree.map(of, tree)

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of arrays that every device has; None on one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def replicate(self, tree: PyTree) -> PyTree:
        """Arrays that every process has, replicated."""
        return self._put(tree, jax.tree.map(lambda _: self.replicated, tree))

    def in_force(self) -> AbstractContextManager[Any]:
        """In which programs run on these devices; on one device as they are."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def local(self, tree: PyTree) -> PyTree:
        """Replicated arrays of a mesh, on this process's default device; on one device, as they are."""
        return tree if self.mesh is None else jax.tree.map(lambda x: jax.device_put(np.asarray(x)), tree)

    def one_of(self, x: jax.Array) -> jax.Array:
        """A replicated array of a mesh as one of its devices has it, without waiting until it is made."""
        return x if self.mesh is None or not x.is_fully_replicated else x.addressable_data(0)

    def placed(self, tree: PyTree, specs: PyTree) -> PyTree:
        """Arrays that every process has, sharded by these `PartitionSpec`; on one device, as they are."""
        return tree if self.mesh is None else self._put(tree, on_mesh(self.mesh, specs))

    def parameters(self, tree: PyTree) -> PyTree:
        """Arrays that every process has, by `parameter_shardings`."""
        return self._put(tree, self.parameter_shardings(tree))

    def made_batch(self, make: Callable[..., PyTree], *arrays: PyTree) -> PyTree:
        """What ``make`` makes of arrays that every process has, as `batch_shardings` has it."""
        if self.mesh is None:
            return jax.jit(make)(*arrays)
        sharded = self.batch_shardings(jax.eval_shape(make, *arrays))
        return jax.jit(make, out_shardings=sharded)(*(self.replicate(x) for x in arrays))

    def made(self, make: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
        """What ``make`` makes of parameters that lie here, sharded as they are."""
        if self.mesh is None:
            return make(params)
        return jax.jit(make, out_shardings=self.parameter_shardings(jax.eval_shape(make, params)))(params)

    def batch(self, host: PyTree, shapes: PyTree) -> PyTree:
        """A host batch of these shapes, sharded by rows: from this process's `rows` of it or from the whole."""
        if self.mesh is None:
            return host

        def place(x: Any, shape: Any, sharding: NamedSharding) -> jax.Array:
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return self._put(x, sharding)
            return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape.shape)

        return jax.tree.map(place, host, shapes, self.batch_shardings(shapes))

    def described(self, tree: PyTree, shardings: PyTree) -> PyTree:
        """Shapes, dtypes and shardings, to compile with."""
        if self.mesh is None:
            return tree
        shardings = jax.tree.broadcast(shardings, tree)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def lower(
        self, function: Callable[..., Any], *described: PyTree, donate: tuple[int, ...] = (), out: PyTree = None
    ) -> jax.stages.Lowered:
        """``function`` with the mesh in force, ready to compile; ``out``: its results' shardings."""
        if self.mesh is None:
            return jax.jit(function, donate_argnums=donate).lower(*described)
        with jax.set_mesh(self.mesh):
            return jax.jit(function, donate_argnums=donate, out_shardings=out).lower(*described)

    def on_host(self, tree: PyTree) -> PyTree:
        """The same arrays whole in this process's memory; on one device, as they are. Every process has to call it."""
        if self.mesh is None:
            return tree
        whole = jax.jit(lambda x: x, out_shardings=self.replicated)

        def fetch(x: jax.Array) -> np.ndarray:
            if x.is_fully_addressable:
                return np.asarray(x)
            if x.nbytes > _AT_ONCE and x.ndim > 1:
                return np.stack([fetch(x[index]) for index in range(x.shape[0])])
            return np.asarray(whole(x))

        return jax.tree.map(fetch, tree)

    def _put(self, tree: PyTree, shardings: PyTree) -> PyTree:
        if self.mesh is None:
            return tree

        def put(x: Any, sharding: NamedSharding) -> jax.Array:
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(put, tree, shardings)


#: Where there is no mesh.
ONE_DEVICE = Devices(None)


class PictureDevices:
    """Devices of a video autoencoder, each with a part of every picture: rows, and columns where rows are too few.

    Programs are told how their arrays lie, and XLA divides them: of a convolution the halo of neighbouring rows is
    exchanged, of attention among a frame's pixels the keys and values are gathered.

    Args:
        apart: none of them is one that makes the latents.
    """

    def __init__(self, devices: Sequence[jax.Device], *, apart: bool) -> None:
        self._devices, self.apart = tuple(devices), apart

    @classmethod
    def of(cls, vae: VaeDevices | None, *, beside: Devices) -> PictureDevices | None:
        """As configured: those after the transformer's, or the same; None for the first device.

        Raises:
            ConfigError: there are several processes.
        """
        if vae is None:
            return None
        if jax.process_count() > 1:
            raise ConfigError(f"vae_devices is for one process, and there are {jax.process_count()}")
        if vae == "mesh":
            return cls(jax.devices() if beside.mesh is None else list(beside.mesh.devices.flat), apart=False)
        return cls(jax.devices()[beside.count : beside.count + vae], apart=True)

    @property
    def count(self) -> int:
        return len(self._devices)

    def sharding(self, *, height: int, width: int) -> Sharding:
        """Of frames and latents [B, F, H, W, C], where these are the latents' height and width.

        Raises:
            ConfigError: the devices cannot have equal parts.
        """
        if self.count == 1:
            return SingleDeviceSharding(self._devices[0])
        grid = np.array(self._devices).reshape(picture_grid(self.count, height=height, width=width))
        return NamedSharding(Mesh(grid, ("rows", "columns")), PartitionSpec(None, None, "rows", "columns"))

    def replicated(self, tree: PyTree) -> PyTree:
        """Arrays that each of the devices has."""
        if self.count == 1:
            return jax.device_put(tree, self._devices[0])
        return jax.device_put(tree, NamedSharding(Mesh(np.array(self._devices), ("devices",)), PartitionSpec()))


class Agreement:
    """What one process finds, all find at the same round: they have to save and to stop together.

    Of several processes the numbers of a round are known in the next, so that no round waits for them.
    """

    def __init__(self) -> None:
        self._found: jax.Array | None = None

    def of(self, *numbers: int) -> list[int]:
        """The largest of each over the processes; of several, as of the call before (0 at first)."""
        if jax.process_count() == 1:
            return [int(number) for number in numbers]
        before = [0] * len(numbers) if self._found is None else np.asarray(self._found).tolist()
        mesh = Mesh(np.array(jax.devices()), ("devices",))
        mine = np.broadcast_to(np.array(numbers, np.int32), (jax.local_device_count(), len(numbers)))
        given = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("devices")), mine)
        largest = jax.jit(_largest, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._found = largest(given)
        return before


def _largest(numbers: jax.Array) -> jax.Array:
    return numbers.max(axis=0)


def first_process() -> bool:
    """Whether this process is the one that writes what all have."""
    return jax.process_index() == 0


def agreed(number: int) -> int:
    """The first process's number, in every process; every process has to call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def everywhere(found: bool) -> bool:
    """Whether it is so in every process; every process has to call it."""
    if jax.process_count() == 1:
        return found
    return bool(np.all(multihost_utils.process_allgather(np.int32(found))))


def whole_array(x: jax.Array) -> np.ndarray:
    """An array that may be sharded over several processes, on the host; every process has to call it."""
    if x.is_fully_addressable or not isinstance(x.sharding, NamedSharding):
        return np.asarray(x)
    found: np.ndarray = Devices(x.sharding.mesh).on_host(x)  # type: ignore[arg-type]
    return found


def wait_for_all(name: str) -> None:
    """Until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def loading(mesh: MeshConfig) -> AbstractContextManager[Any]:
    """In which weights are read: for a mesh into the host's memory, for one device may be too small for them."""
    if mesh.single:
        return nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return nullcontext()
