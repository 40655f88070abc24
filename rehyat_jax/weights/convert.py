"""Any dialect in, the diffusers layout out: tensor by tensor from disk to disk, without a model in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import CheckpointError
from rehyat_jax.runtime.files import check_room
from rehyat_jax.weights.layout import INDEX, components_in
from rehyat_jax.weights.plan import LoadPlan, make_plan
from rehyat_jax.weights.registry import REGISTRY, WRITTEN, Attached, Attachment, component
from rehyat_jax.weights.save import of_plan, write_network
from rehyat_jax.weights.writing import MAX_SHARD_BYTES, whole_folder

#: Called with the bytes written so far and in all.
Progress = Callable[[int, int], None]
#: Writes what is not weights: called with the source's folder and the one to write.
WriteRest = Callable[[Path, Path], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What a checkpoint's weights become on their way.

    Attributes:
        dtype: None keeps each tensor's; otherwise float32, bfloat16 or float16.
        around: a checkpoint whose weights stand in the place of those of the network that has a part of its own; its
            weights go into that part.
        plans: by network, what is made of the plan of its weights: of its part's, where that has weights of its own.
        parts: by network, a part of its own that it gets, from the plan of its weights.
        kept: in which eight bits a network's matrix of blocks, by its path, is written, with its scales; or None.
    """

    dtype: Any = None
    around: Path | None = None
    plans: Mapping[str, Callable[[LoadPlan], LoadPlan]] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, Callable[[LoadPlan], Attached]] = dataclasses.field(default_factory=dict)
    kept: Callable[[str, str], np.dtype | None] = lambda network, path: None


def convert_weights(
    src: Path,
    dst: Path,
    *,
    write_rest: WriteRest,
    write_beside: Callable[[Path], None] | None = None,
    changes: Changes = Changes(),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint in the diffusers layout: a whole one, or one network's folder or file.

    Args:
        dst: new or empty; it appears whole or not at all.
        write_rest: of a whole checkpoint.
        write_beside: of a network alone: what lies beside its weights.

    Raises:
        CheckpointError: the source is missing, damaged, incomplete or foreign; the destination is not empty or cannot
            be written; with ``around``, there is no such part or it is of other sizes.
        ConfigError: a configuration is impossible or another architecture's.
    """
    dtype, around = changes.dtype, changes.around
    names = components_of(src)
    whole = (src / INDEX).is_file() or len(names) > 1
    plans = {name: make_plan(src, name) for name in names}
    if whole and (missing := [name for name, each in REGISTRY.items() if name not in plans and not each.optional]):
        raise CheckpointError(f"{src} has no {' and no '.join(missing)}: name one network to convert it alone")
    attached = {name: part for name, plan in plans.items() if (part := attached_to(name, plan, dtype=dtype))}
    for name in changes.parts:
        if name in attached or name not in plans:
            what = "is converted already" if name in attached else f"has no {component(name).title}"
            raise CheckpointError(f"{src} {what}: a conversion is for a base")
        attached[name] = changes.parts[name](plans[name])
    for name, change in changes.plans.items():
        if name not in plans:
            raise CheckpointError(f"{src} has no {component(name).title}, whose weights are to be changed")
        part = attached.get(name)
        if part is not None and part.instead is not None:
            attached[name] = dataclasses.replace(part, instead=change(part.instead))
        else:
            plans[name] = change(plans[name])
    if around is not None:
        if not attached:
            raise CheckpointError(f"{src} is no student: there is nothing to keep a teacher beside")
        for name, part in attached.items():
            outer = make_plan(around, name)
            if outer.config != plans[name].config:
                raise CheckpointError(f"{around} is no teacher of {src}: they are of different sizes")
            attached[name] = dataclasses.replace(part, instead=part.instead or plans[name])
            plans[name] = outer
    counter = _Counter(progress)
    with whole_folder(dst) as partial:
        writes: list[Callable[[], None]] = []

        def later(
            name: str, plan: LoadPlan, folder: Path, *, dialect: str = WRITTEN, most: int | None = max_shard_bytes
        ) -> None:
            how: dict[str, Any] = {
                "dtype": dtype,
                "passing": counter.passing,
                "kept": functools.partial(changes.kept, name),
            }
            tensors = of_plan(plan, dialect=dialect, **how)
            counter.total += sum(tensor.nbytes for tensor in tensors)
            writes.append(lambda: write_network(folder, plan.config, tensors, stem=plan.stem, max_shard_bytes=most))

        for name, plan in plans.items():
            folder = partial / name if whole else partial
            later(name, plan, folder)
            if name in attached:
                kind = attachment_of(name)
                later(name, attached[name].plan, folder / kind.folder, dialect=attached[name].plan.dialect, most=None)
                if (own := attached[name].instead) is not None:
                    later(name, own, folder / kind.folder / kind.instead)
        check_room(dst, size=counter.total, what="the checkpoint")
        for write in writes:
            write()
        if whole:
            write_rest(src, partial)
        elif write_beside is not None:
            write_beside(partial)


def components_of(path: Path) -> tuple[str, ...]:
    """The networks of a whole checkpoint, or those of a network's folder or of a file.

    Raises:
        CheckpointError: none that this program knows.
    """
    if found := components_in(path):
        return found
    # Says why not.
    make_plan(path, next(iter(REGISTRY)))
    raise CheckpointError(f"{path} holds no network that this program knows")


def attachment_of(name: str) -> Attachment:
    """A network's kind of part; it must have one."""
    attachment = component(name).attachment
    assert attachment is not None
    return attachment


def attached_to(name: str, plan: LoadPlan, *, dtype: Any) -> Attached | None:
    """A network's part of its own, where it has one.

    Raises:
        CheckpointError, ConfigError: it is incomplete, damaged or does not fit.
    """
    attachment = component(name).attachment
    folder = None if attachment is None else find_attachment(plan.weights, attachment.folder)
    if folder is None:
        return None
    return attachment_of(name).plan(folder, plan.config, dtype=np.float32 if dtype is None else dtype)


def find_attachment(weights: Path, name: str) -> Path | None:
    """The folder of a part that belongs to a weights file, where there is one.

    Raises:
        CheckpointError: there is one beside the weights and another beside ``model_index.json``.
    """
    own, root = weights.parent / name, weights.parent.parent
    # Of one of two networks of a kind, in its own folder alone.
    second = (each := REGISTRY.get(weights.parent.name)) is not None and each.kin
    beside = root / name if (root / INDEX).is_file() and not second else own
    found = [folder for folder in dict.fromkeys((own, beside)) if folder.exists()]
    if len(found) > 1:
        raise CheckpointError(f"{own} and {beside} are both there: a checkpoint has one {name} folder")
    return found[0] if found else None


class _Counter:
    """Bytes done, told to whoever asked."""

    def __init__(self, progress: Progress | None) -> None:
        self.done = self.total = 0
        self._progress = progress

    def passing(self, source: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for block in source:
            yield block
            self.done += block.nbytes
            if self._progress is not None:
                self._progress(self.done, self.total)
