"""Checkpoints of a run, by Orbax: each is sealed when whole, the newest few are kept, and a damaged one is passed over.

Orbax renames a checkpoint into place once all of it is written, but it neither notices every kind of damage done later
(a flipped bit inside a tensor is restored as it is) nor tells damage from a checkpoint of another model. So each gets a
seal: the checksums of its files, and the names, dtypes and shapes of its arrays.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from rehyat_jax.errors import CheckpointError
from rehyat_jax.runtime.devices import first_process, wait_for_all
from rehyat_jax.runtime.files import check_room, sample_digest, whole_file

_SEAL = "seal.json"
#: How often a reader looks again, where a run that goes on removes checkpoints meanwhile.
_TRIES = 10
#: Of a checkpoint so much is read to seal it, and to see whether it is as it was sealed.
SEALED_BYTES = 1 << 30
#: Of what a checkpoint holds, and how: 2 has the state of a stage by roles. Before it, seals had no version.
VERSION = 2


class Checkpoints:
    """The checkpoints of one run, in ``folder``; a context manager."""

    def __init__(self, folder: Path, *, keep: int = 2, always: Callable[[int], bool] = lambda step: False) -> None:
        """
        Args:
            keep: so many of the newest are kept.
            always: of which steps they are kept for good.
        """
        self._folder, self._keep, self._always = folder.absolute(), keep, always

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """What writes and removes; a reader has none, and leaves alone what another process has under way."""
        return ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
        )

    def restore(self, template: PyTree, *, report: Callable[[str], None] = print) -> PyTree | None:
        """The newest whole checkpoint in the dtypes and on the devices of ``template``, or None where there is none.

        Checkpoints that are newer but damaged, or were never finished, are removed, and ``report`` is told.

        Raises:
            CheckpointError: the checkpoint is of another model.
            RehyatError: there is none, and no room for one: known now, not after the first steps.
        """
        for path in sorted(self._folder.glob("*.orbax-checkpoint-tmp*")):
            report(f"the checkpoint {path} was not finished: passed over and removed")
            if first_process():
                shutil.rmtree(path, ignore_errors=True)
        for step in sorted(self._manager.all_steps(), reverse=True):
            seal = self._seal(step)
            if seal is None:
                report(f"the checkpoint {self._path(step)} is damaged or was not finished: passed over and removed")
                self._manager.delete(step)
                continue
            self._check_version(seal)
            if (difference := _difference(seal["arrays"], _arrays(template))) is not None:
                raise CheckpointError(
                    f"{self._folder} holds checkpoints of another model ({difference}); choose another --out"
                )
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        self._check_room(template)
        return None

    def read(self, template: PyTree, *, step: int | None = None) -> PyTree:
        """A part of a checkpoint, of ``step`` or the newest; nothing is removed. As `restore`, but for what is raised.

        Args:
            template: dictionaries of the names in the saved state that are wanted.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model.
        """
        for _ in range(_TRIES):
            steps = self._steps()
            if not steps or (step is not None and step not in steps):
                what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
                held = f" (there are {', '.join(map(str, steps))})" if steps else ""
                raise CheckpointError(f"{self._folder} has {what}{held}")
            for candidate in steps[::-1] if step is None else [step]:
                if (seal := self._seal(candidate)) is None:
                    continue  # it is being written
                try:
                    return self._read(candidate, seal, template)
                except CheckpointError:
                    raise
                except Exception:  # Orbax and TensorStore raise many kinds
                    if self._path(candidate).is_dir():
                        raise
            if all(self._path(each).is_dir() for each in steps):
                break  # else a run that goes on removed some of them: there are newer ones
        which = f"the checkpoint {self._path(steps[-1] if step is None else step)} is damaged or was not finished"
        raise CheckpointError(
            which if len(steps) == 1 or step is not None else f"no checkpoint in {self._folder} is whole"
        )

    def _steps(self) -> list[int]:
        """In order, whole or not."""
        return sorted(int(path.name) for path in self._folder.glob("*") if path.name.isdecimal())

    def _read(self, step: int, seal: Mapping[str, Any], template: PyTree) -> PyTree:
        self._check_version(seal)
        wanted, held = _arrays(template), {n: x for n, x in seal["arrays"].items() if _among(n, template)}
        if (difference := _difference(held, wanted)) is not None:
            raise CheckpointError(f"the checkpoint {self._path(step)} is of another model than this ({difference})")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        how = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(self._path(step) / "default", args=how)

    def save(self, step: int, state: PyTree) -> None:
        """Write the checkpoint of ``step``, whole or not at all, then remove the older ones that are not to be kept.

        Raises:
            CheckpointError: it cannot be written.
            RehyatError: there is no room for it; nothing of it was written.
        """
        self._check_room(state)
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            why = str(error).strip().split("\n")[0][:200]
            raise CheckpointError(f"cannot write a checkpoint in {self._folder}: {why}") from error
        folder = self._path(step)
        if first_process():
            seal = {"version": VERSION, "arrays": _arrays(state), "files": _checksums(folder)}
            with whole_file(folder / _SEAL) as partial:
                partial.write_text(json.dumps(seal, indent=1), encoding="utf-8")
        wait_for_all("seal")
        for old in sorted(self._manager.all_steps())[: -self._keep]:
            if not self._always(old):
                self._manager.delete(old)

    def _check_room(self, state: PyTree) -> None:
        check_room(
            self._folder, size=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)), what="a checkpoint"
        )

    def _seal(self, step: int) -> dict[str, Any] | None:
        """The seal of a checkpoint that is as it was written; of several processes the first looks for all."""
        whole = _read_seal(self._path(step)) if first_process() else None
        if jax.process_count() == 1:
            return whole
        if not multihost_utils.broadcast_one_to_all(np.array(whole is not None)):
            return None
        return whole or json.loads((self._path(step) / _SEAL).read_text(encoding="utf-8"))

    def _check_version(self, seal: Mapping[str, Any]) -> None:
        if (version := seal.get("version", 1)) != VERSION:
            raise CheckpointError(
                f"{self._folder} holds checkpoints of version {version}, and this program reads version "
                f"{VERSION}: finish that run with the program that began it, or choose another --out"
            )

    def _path(self, step: int) -> Path:
        return self._folder / str(step)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        if "_manager" in vars(self):
            self._manager.close()


def _read_seal(folder: Path) -> dict[str, Any] | None:
    """The seal of a checkpoint that is as it was written, else None."""
    try:
        seal = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        return seal if seal["files"] == _checksums(folder) and isinstance(seal["arrays"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksums(folder: Path) -> dict[str, str]:
    """Of every file: all of it, while that is `SEALED_BYTES` in all; beyond, of samples of so much."""
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _SEAL and not path.name.endswith(".partial")
    ]
    sizes = [path.stat().st_size for path in paths]
    share = SEALED_BYTES / max(sum(sizes), 1)

    def checksum(path: Path, size: int) -> str:
        if share < 1:
            return sample_digest(path, count=max(2, int(size * share) >> 20)).hex()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing is outside Python's lock
        sums = list(pool.map(checksum, paths, sizes))
    return dict(zip((path.relative_to(folder).as_posix() for path in paths), sums, strict=True))


def _arrays(tree: PyTree) -> dict[str, str]:
    """For each array: its path, and "float32[2,3]"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}[{','.join(map(str, x.shape))}]"
        for path, x in leaves
    }


def _among(name: str, template: Any) -> bool:
    """Whether an array is below one of the template's dictionaries' leaves."""
    for key in name.split("/"):
        if not isinstance(template, dict):
            return True
        if key not in template:
            return False
        template = template[key]
    return True


def _difference(theirs: dict[str, str], ours: dict[str, str]) -> str | None:
    """The first array that differs, in words."""
    for name in (*ours, *theirs):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
    return None
