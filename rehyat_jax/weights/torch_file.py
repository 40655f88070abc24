"""Torch files (``.pth``, ``.pt``, ``.bin``, ``.ckpt``): the one place that imports torch.

Nothing but plain tensors in dictionaries is unpickled (``weights_only=True``). Of the format in use since torch 1.6, a
zip archive, torch reads the names alone, and the numbers are read from where they lie; of the older format torch reads
all.
"""

from __future__ import annotations

import collections
import math
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.files import CheckedFile, TensorInfo, TensorSource

#: Classes of Python's own that training programs keep beside their tensors. They are read as something inert, and so is
#: every class of another package; whatever else of Python's own a file names (``os.system``) is refused.
_STATE = frozenset(
    {
        "argparse.Namespace",
        "types.SimpleNamespace",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "datetime.datetime",
        "datetime.timedelta",
        "collections.defaultdict",
        "typing.Any",
        *(f"builtins.{name}" for name in ("dict", "list", "set", "int", "float", "str", "bool")),
    }
)
_NOT_PLAIN = "not a torch file of plain tensors"


class _Inert:
    """In the place of NumPy's arrays and types: takes whatever it is given and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Mapping:
    """In the place of any other class: an empty dictionary, which the unpickler fills where the class was one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return collections.OrderedDict()


class TorchFile(TensorSource):
    """The tensors of a torch file, by dotted path through its dictionaries."""

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(f"{path} is a torch file: install torch (pip install torch) to read it") from error
        self._file, self.files, self._torch = CheckedFile(path), (path,), torch
        lies = _check_archive(path)
        try:
            with torch.serialization.safe_globals(_stand_ins(torch, path, lies)):
                content = torch.load(path, map_location="meta" if lies else "cpu", weights_only=True)
        except Exception as error:  # of a damaged or hostile file torch, pickle, struct and tarfile raise their own
            raise CheckpointError(f"{path} is truncated, or {_NOT_PLAIN}{_named(error)}") from error
        self._tensors = dict(_flatten(content, torch.Tensor))
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        names |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8"}
        self.infos = {}
        for name, tensor in self._tensors.items():
            kind = names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            plain = tensor.layout == torch.strided and not tensor.is_quantized
            self.infos[name] = TensorInfo(kind if plain else f"{kind}, not plain", tuple(tensor.shape))

    def pieces(self, name: str, *, rows: int | None = None) -> Iterator[np.ndarray]:
        tensor, info = self._tensors[name].detach(), self.infos[name]
        if tensor.device.type != "meta":
            bits = {1: self._torch.uint8, 2: self._torch.int16}.get(info.dtype.itemsize)
            whole = tensor if bits is None else tensor.view(bits)
            yield whole.contiguous().numpy().view(info.dtype).reshape(info.shape or (1,))
            return
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if begin is None:
            raise CheckpointError(f"{self._file.path}: this version of torch does not say where {name!r} lies")
        begin += tensor.storage_offset() * info.dtype.itemsize
        if tensor.is_contiguous():
            yield from self._file.pieces(begin, info.dtype, info.shape, rows)
            return
        strides = tensor.stride()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(info.shape, strides, strict=True))
        if not math.prod(info.shape) or extent > self._file.size:
            raise CheckpointError(f"{self._file.path}: tensor {name!r} cannot lie in the file")
        flat = np.concatenate([piece.copy() for piece in self._file.pieces(begin, info.dtype, (extent,), None)])
        byte_strides = [stride * info.dtype.itemsize for stride in strides]
        yield np.lib.stride_tricks.as_strided(flat, info.shape, byte_strides, writeable=False)


def _stand_ins(torch: Any, path: Path, archive: bool) -> list[Any]:
    """Something inert for each class that a file names and that is no tensor's. No class is imported for it."""
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archive else []
    others = {name for name in named if name.partition(".")[0] not in {*sys.stdlib_module_names, "torch"}}
    return [(_Inert if name.startswith("numpy.") else _Mapping, name) for name in sorted(_STATE | others)]


def _check_archive(path: Path) -> bool:
    """Is it a zip archive whose tensors lie in it as they are?

    Raises:
        CheckpointError: it is one, and they do not.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            order = next((record for record in records if record.filename.endswith("/byteorder")), None)
            big = order is not None and order.file_size < 64 and archive.read(order) == b"big"
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is truncated, or {_NOT_PLAIN}") from error
    if big or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{path} is compressed, or of a machine of the other byte order, which is not read")
    return True


def _named(error: Exception) -> str:
    """What torch would not unpickle, where it says so."""
    found = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
    return f": it holds {found[1]}, which is not unpickled" if found else ""


def _flatten(content: Any, leaf: type, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Tensors by dotted name; what else a training checkpoint holds (step counts, options) is left."""
    if not isinstance(content, Mapping) or depth > 32:
        return
    for key, value in content.items():
        if isinstance(value, leaf):
            yield f"{prefix}{key}", value
        else:
            yield from _flatten(value, leaf, f"{prefix}{key}.", depth + 1)
