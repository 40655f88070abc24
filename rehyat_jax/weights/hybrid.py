"""A student's own part of a checkpoint: ``rehyat/config.json`` and ``rehyat/features.safetensors``.

The folder around it stays a plain diffusers checkpoint of the softmax teacher. ``rehyat/`` is written into the
transformer's own folder; it is also found beside ``model_index.json``. A converted block's tensors are named
``blocks.<i>.<parameter>``, i counting all the model's blocks, and lie as the module keeps them.

A student that was finetuned has other weights than its teacher throughout. Where both are in one checkpoint, the
student's are in ``rehyat/transformer/``, again as diffusers would have them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.errors import CheckpointError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.mixers.hybrid import hybrid_blocks
from rehyat_jax.models.config import WanConfig
from rehyat_jax.weights.copying import blocks, fill
from rehyat_jax.weights.files import TensorSource, open_tensors, read_json
from rehyat_jax.weights.plan import Plan, listed, make_plan, parameters
from rehyat_jax.weights.writing import Outgoing, write_json, write_tensors

_FOLDER = "rehyat"
_STEM = "features"
_SOFTMAX = "transformer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridSlot:
    """One block's share of a stacked parameter, and its name on disk."""

    path: str
    #: Among the converted blocks.
    place: int
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridPlan:
    """A checked ``rehyat/`` folder, its tensors still on disk."""

    config: HybridConfig
    weights: Path
    tensors: TensorSource
    slots: tuple[HybridSlot, ...]
    #: What it has of its own in the place of the teacher's weights around it.
    softmax: Plan | None = None

    def read(self, slot: HybridSlot, dtype: np.dtype) -> Iterator[np.ndarray]:
        """
        Raises:
            CheckpointError: a value is not finite.
        """
        for piece in self.tensors.pieces(slot.name):
            yield from blocks(piece, dtype, f"{self.weights}: tensor {slot.name!r}")


def find_hybrid(weights: Path) -> Path | None:
    """The ``rehyat`` folder that belongs to a transformer's weights file, where there is one.

    Raises:
        CheckpointError: there is one in the transformer's folder and another beside ``model_index.json``.
    """
    own, root = weights.parent / _FOLDER, weights.parent.parent
    beside = root / _FOLDER if (root / "model_index.json").is_file() else own
    found = [folder for folder in dict.fromkeys((own, beside)) if folder.exists()]
    if len(found) > 1:
        raise CheckpointError(f"{own} and {beside} are both there: a checkpoint has one {_FOLDER} folder")
    return found[0] if found else None


def make_hybrid_plan(folder: Path, config: WanConfig, *, dtype: Any) -> HybridPlan:
    """Pair every tensor of a ``rehyat`` folder with a parameter of the model's hybrid blocks, or fail.

    Raises:
        CheckpointError: a file is missing or damaged; tensors are missing, unused or misshapen; it has a transformer
            of other sizes than ``config``.
        ConfigError: its configuration is impossible, or not of this model.
    """
    hybrid = HybridConfig.from_dict(read_json(folder / "config.json"))
    weights = folder / f"{_STEM}.safetensors"
    tensors = open_tensors(weights)
    slots = tuple(_slots(config, hybrid, _abstract(config, hybrid, dtype)))
    infos = tensors.infos
    wanted = {slot.name for slot in slots}
    if missing := [slot.name for slot in slots if slot.name not in infos]:
        raise CheckpointError(f"{weights} lacks {listed(missing)}")
    if unused := [name for name in infos if name not in wanted]:
        raise CheckpointError(f"{weights} holds {listed(unused)} that its {folder / 'config.json'} has no use for")
    for slot in slots:
        if infos[slot.name].shape != slot.shape:
            raise CheckpointError(
                f"{weights}: tensor {slot.name!r} is {list(infos[slot.name].shape)} in the file and {list(slot.shape)} "
                "by the configuration"
            )
    softmax = make_plan(folder / _SOFTMAX, "transformer", dtype=dtype) if (folder / _SOFTMAX).exists() else None
    if softmax is not None and softmax.config != config:
        raise CheckpointError(f"{softmax.weights} is of other sizes than the transformer that it takes the place of")
    return HybridPlan(config=hybrid, weights=weights, tensors=tensors, slots=slots, softmax=softmax)


def fill_hybrid(plan: HybridPlan, config: WanConfig, *, dtype: Any) -> nnx.Module:
    """The hybrid blocks with the file's numbers.

    Raises:
        CheckpointError: a value is not finite.
    """
    module = _abstract(config, plan.config, dtype)
    state = nnx.state(module)
    by_path: dict[str, list[HybridSlot]] = {}
    for slot in plan.slots:
        by_path.setdefault(slot.path, []).append(slot)
    for path, variable in parameters(state).items():
        array = np.empty(variable.get_value().shape, by_path[path][0].dtype)
        for slot in by_path[path]:
            fill(array[slot.place], plan.read(slot, array.dtype))
        variable.set_value(jnp.asarray(array))
    nnx.update(module, state)
    return module


def write_hybrid(folder: Path, hybrid: HybridConfig, tensors: Iterable[Outgoing]) -> Path:
    """``rehyat/`` within a transformer's new folder. Returns where a softmax part of its own may be written."""
    (folder / _FOLDER).mkdir()
    write_json(folder / _FOLDER / "config.json", hybrid.to_dict())
    # One file whatever its size: it is a tenth of the model at most.
    tensors = list(tensors)
    write_tensors(folder / _FOLDER, _STEM, tensors, max_shard_bytes=sum(tensor.nbytes for tensor in tensors))
    return folder / _FOLDER / _SOFTMAX


def outgoing(
    config: WanConfig, hybrid: HybridConfig, variables: Mapping[str, nnx.Variable], dtype: Any
) -> Iterator[Outgoing]:
    """A model's hybrid blocks for `write_hybrid`: ``variables`` by path; with ``dtype`` None each keeps its own."""
    for slot in _slots(config, hybrid, _abstract(config, hybrid, jnp.float32 if dtype is None else dtype)):
        value = variables[slot.path].get_value()
        target = np.dtype(value.dtype) if dtype is None else slot.dtype
        numbers = functools.partial(_numbers, value, slot, target)
        yield Outgoing(name=slot.name, dtype=target, shape=slot.shape, blocks=numbers)


def converting(plan: HybridPlan, dtype: Any) -> Iterator[Outgoing]:
    """A folder's hybrid blocks for `write_hybrid`, never all in memory; with ``dtype`` None each keeps its own."""
    for slot in plan.slots:
        target = plan.tensors.infos[slot.name].dtype if dtype is None else slot.dtype
        numbers = functools.partial(plan.read, slot, target)
        yield Outgoing(name=slot.name, dtype=target, shape=slot.shape, blocks=numbers)


def _numbers(value: Any, slot: HybridSlot, dtype: np.dtype) -> Iterator[np.ndarray]:
    return blocks(np.asarray(value[slot.place]), dtype, f"tensor {slot.name!r}")


def _abstract(config: WanConfig, hybrid: HybridConfig, dtype: Any) -> Any:
    """The hybrid blocks without memory: shapes only."""
    kinds = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    return nnx.eval_shape(lambda: hybrid_blocks(config, hybrid, **kinds, rngs=nnx.Rngs(0)))


def _slots(config: WanConfig, hybrid: HybridConfig, abstract: Any) -> Iterator[HybridSlot]:
    converted = [i for i, is_hybrid in enumerate(hybrid.converted(config.num_layers)) if is_hybrid]
    for path, variable in parameters(nnx.state(abstract)).items():
        value = variable.get_value()
        for place, block in enumerate(converted):
            yield HybridSlot(
                path=path,
                place=place,
                name=f"blocks.{block}.{path}",
                shape=tuple(value.shape[1:]),
                dtype=np.dtype(value.dtype),
            )
