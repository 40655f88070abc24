"""Files with weights in eight bits: fp8 alone, or fp8 and int8 with scales, read as the numbers they stand for.

W = q · scale, exact in float32; q alone is a cast, exact in bfloat16. A weight whose scale is missed makes noise
without an error: in a file with any scale each eight-bit weight must have its own.

Layouts: ComfyUI's older (``L.scale_weight``, the marker ``scaled_fp8``) and newer (``L.weight_scale``,
``L.comfy_quant`` or the header's ``_quantization_metadata``), lightx2v's (``L.weight_scale`` of [out, 1]), and a scale
for each 128 × 128. ``input_scale`` is for products in fp8 alone, which are not made here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import CheckpointError
from rehyat_jax.weights.files import TensorInfo, TensorSource, parse_object

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (".scale_weight", ".weight_scale")
#: What says of a file that it has scales, and is no weight itself.
_MARK = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$")
_HEADER = "_quantization_metadata"
_TILE = 128
#: Four bits and others, by the words of files.
_FOREIGN = re.compile(r"nvfp4|mxfp|int4|svdquant|fp4|nf4", re.IGNORECASE)
_LARGEST_WORDS = 1 << 16


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Of one weight: a number, one for each row, or one for each tile."""

    values: np.ndarray
    #: Rows and columns that share one; None: all of that axis.
    tile: tuple[int | None, int | None]

    def rows(self, start: int, count: int, columns: int) -> np.ndarray:
        """[count, 1] or [count, columns]."""
        down, across = self.tile
        rows = np.zeros(count, np.intp) if down is None else np.arange(start, start + count) // down
        chosen = self.values[rows]
        return chosen if across is None else np.repeat(chosen, across, axis=1)[:, :columns]


class ScaledTensors(TensorSource):
    """The tensors of a file with eight-bit weights, as wider ones."""

    def __init__(self, inner: TensorSource, path: Path) -> None:
        """
        Raises:
            CheckpointError: a weight has no scale, a scale no weight; a format that is not read.
        """
        self.inner, self.files, self.metadata = inner, inner.files, inner.metadata
        infos, owners = inner.infos, {}
        formats = _formats(inner, path)
        for name in infos:
            if (end := next((end for end in _SCALES if name.endswith(end)), None)) is not None:
                owners[name] = f"{name.removesuffix(end)}.weight"
        self._scales: dict[str, _Scale] = {}
        for scale, weight in owners.items():
            if weight not in infos or infos[weight].kind not in (*_FP8, "I8"):
                raise CheckpointError(f"{path}: {scale!r} is the scale of no weight in fp8 or int8")
            if weight in self._scales:
                raise CheckpointError(f"{path}: {weight!r} has two scales")
            self._scales[weight] = self._scale(scale, infos[weight], path)
        marks = {name for name in infos if _MARK.search(name)}
        eight = {name for name, info in infos.items() if info.kind in _FP8} - marks
        without = sorted(eight - self._scales.keys())
        if without and (owners or marks or formats):
            raise CheckpointError(
                f"{path} has scales, and {len(without)} of its weights in fp8 have none, {without[0]!r} the first"
            )
        wide = dict.fromkeys(self._scales, "F32") | dict.fromkeys(eight - self._scales.keys(), "BF16")
        self.infos: Mapping[str, TensorInfo] = {
            name: dataclasses.replace(info, kind=wide[name], stored=info.kind) if name in wide else info
            for name, info in infos.items()
            if name not in owners and name not in marks
        }

    def _scale(self, name: str, weight: TensorInfo, path: Path) -> _Scale:
        info = self.inner.infos[name]
        if info.kind not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"{path}: the scale {name!r} is of type {info.kind}, which is not read")
        values = np.concatenate([piece.astype(np.float32) for piece in self.inner.pieces(name)]).reshape(info.shape)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{path}: the scale {name!r} holds NaN or infinity")
        rows, columns = weight.shape[0] if weight.shape else 1, math.prod(weight.shape[1:])
        tiles = (-(-rows // _TILE), -(-columns // _TILE))
        if values.size == 1:
            return _Scale(values.reshape(1, 1), (None, None))
        if values.shape in ((rows,), (rows, 1)):
            return _Scale(values.reshape(rows, 1), (1, None))
        if len(weight.shape) == 2 and values.shape == tiles:
            return _Scale(values, (_TILE, _TILE))
        raise CheckpointError(
            f"{path}: the scale {name!r} of shape {list(info.shape)} fits no weight of {list(weight.shape)}: it must "
            f"be one number, one for each row, or one for each {_TILE}x{_TILE}"
        )

    def rows_as_kept(self, name: str, kind: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]] | None:
        """A matrix's rows in eight bits of this kind, and what each is multiplied by; None where it is not kept so."""
        scale = self._scales.get(name, _Scale(np.ones((1, 1), np.float32), (None, None)))
        if self.infos[name].stored is None or scale.tile[1] is not None or self.inner.infos[name].dtype != kind:
            return None
        return self._rows(name, scale)

    def _rows(self, name: str, scale: _Scale) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for piece in self.inner.pieces(name):
            yield piece, np.broadcast_to(scale.rows(start, len(piece), 1)[:, 0], len(piece))
            start += len(piece)

    def pieces(self, name: str, *, rows: int | None = None) -> Iterator[np.ndarray]:
        if self.infos[name].stored is None:
            yield from self.inner.pieces(name, rows=rows)
            return
        scale, start = self._scales.get(name), 0
        wide = self.infos[name].dtype
        for piece in self.inner.pieces(name, rows=rows):
            if scale is None:
                yield piece.astype(wide)
                continue
            flat = piece.astype(np.float32).reshape(len(piece), -1)
            yield (flat * scale.rows(start, len(piece), flat.shape[1])).reshape(piece.shape)
            start += len(piece)


def widened(source: TensorSource, path: Path) -> TensorSource:
    """A file's tensors; where it keeps weights in eight bits, as wider ones.

    Raises:
        CheckpointError: as `ScaledTensors`.
    """
    if any(name.endswith(".weight_scale_2") for name in source.infos):
        raise CheckpointError(f"{path} is in nvfp4 (four bits), which is not supported: fp8, int8 and GGUF are")
    eight = any(info.kind in _FP8 for info in source.infos.values())
    scaled = any(name.endswith(_SCALES) or _MARK.search(name) for name in source.infos)
    return ScaledTensors(source, path) if eight or scaled else source


def _formats(source: TensorSource, path: Path) -> set[str]:
    """What a file calls the formats of its layers.

    Raises:
        CheckpointError: one of them is not read.
    """
    said: list[Any] = []
    if (text := source.metadata.get(_HEADER)) is not None:
        layers = parse_object(text.encode("utf-8", "replace"), f"{_HEADER} of {path}").get("layers")
        said += list(layers.values()) if isinstance(layers, dict) else []
    for name, info in source.infos.items():
        if name.endswith(".comfy_quant") and info.kind == "U8" and info.size < _LARGEST_WORDS:
            data = b"".join(piece.tobytes() for piece in source.pieces(name))
            said.append(parse_object(data, f"tensor {name!r} of {path}"))
    formats = {str(each.get("format")) if isinstance(each, dict) else json.dumps(each)[:40] for each in said}
    for each in sorted(formats):
        if _FOREIGN.search(each) or not each.startswith(("float8_", "int8")):
            raise CheckpointError(f"{path} is in {each[:40]}, which is not supported: fp8, int8 and GGUF are")
    return formats
