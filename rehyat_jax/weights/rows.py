"""Tables of tensor names: a parameter of a module, and what each dialect of checkpoints calls the tensor that fills it.

``{}`` in a name stands for a layer's number in a stack, which a module keeps as the leading axis of one array and the
files keep as one tensor a layer. Names are compared whole: ``modulation`` never matches inside ``head.modulation``.
The tables themselves live with the models, in files called ``rows.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np

#: How a module's array lies against the file's (``torch_view`` gives each as a view):
#: same; linear [in,out] / [out,in]; conv2d HWIO / OIHW; conv3d DHWIO / OIDHW; pointwise2d [in,out] / [out,in,1,1];
#: table [n,d] / [1,n,d]; gamma2d [c] / [c,1,1]; gamma3d [c] / [c,1,1,1].
Layout = Literal["same", "linear", "conv2d", "conv3d", "pointwise2d", "table", "gamma2d", "gamma3d"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter, and its tensor's name in any number of dialects."""

    #: Dotted path in the module.
    ours: str
    #: By dialect. Several: the tensor may be stored under any or all of them (tied weights); the first is written.
    names: Mapping[str, str | tuple[str, ...]]
    layout: Layout = "same"
    _: dataclasses.KW_ONLY
    #: Stays float32 when the model is loaded in a narrower type (diffusers' ``_keep_in_fp32_modules``).
    float32: bool = False
    #: Stays float32 when the model is loaded in float16, whose range its products leave (transformers' T5 ``wo``).
    float32_for_float16: bool = False
    #: Zeros alone are refused: a model that reads nothing of its prompt would make noise without a word.
    not_zero: bool = False
    #: The layers' numbers in the files, along our leading axis; None: 0, 1, 2, …
    layers: tuple[int, ...] | None = None
    #: By dialect whose files keep several parameters in one tensor, one after the other along its first axis: which of
    #: how many this one is.
    part: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    #: By dialect whose files have axes of one in front: how many.
    leading: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def spellings(self, dialect: str, layer: int | None = None) -> tuple[str, ...]:
        """The names that a file may use, with the layer's number in place; none when the dialect lacks this row."""
        names = self.names.get(dialect, ())
        names = (names,) if isinstance(names, str) else names
        return names if layer is None else tuple(name.replace("{}", str(layer)) for name in names)

    def name(self, dialect: str, layer: int | None = None) -> str:
        """The name that is written."""
        return self.spellings(dialect, layer)[0]

    @property
    def stacked(self) -> bool:
        return any("{}" in spelling for dialect in self.names for spelling in self.spellings(dialect))

    def numbers(self, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        """The layers' numbers of a parameter of this shape; None alone for one that is no stack."""
        return (self.layers or tuple(range(shape[0]))) if self.stacked else (None,)


def rows_of_linear(
    ours: str,
    names: Mapping[str, str],
    *,
    bias: bool = True,
    float32: bool = False,
    float32_for_float16: bool = False,
    part: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> tuple[Row, ...]:
    """Rows of a linear layer, from its name in each dialect."""
    weights = {key: f"{name}.weight" for key, name in names.items()}
    weight = Row(
        f"{ours}.kernel", weights, "linear", float32=float32, float32_for_float16=float32_for_float16, part=part
    )
    if not bias:
        return (weight,)
    biases = {key: f"{name}.bias" for key, name in names.items()}
    return weight, Row(f"{ours}.bias", biases, float32=float32, part=part)


def scale_of(kernel: str) -> str:
    """Our path of the scales of a kernel that is kept in eight bits."""
    return f"{kernel.rpartition('.')[0]}.scale"


def torch_view(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Our array (one layer of it) seen in the file's shape, without a copy: write through it to load, read to save."""
    match layout:
        case "same":
            return array
        case "linear":
            return array.T
        case "conv2d":
            return array.transpose(3, 2, 0, 1)
        case "conv3d":
            return array.transpose(4, 3, 0, 1, 2)
        case "pointwise2d":
            return array.T[:, :, None, None]
        case "table":
            return array[None]
        case "gamma2d":
            return array[:, None, None]
        case "gamma3d":
            return array[:, None, None, None]


def torch_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The file's shape for one layer of ours."""
    return torch_view(np.broadcast_to(np.uint8(0), shape), layout).shape


@functools.lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", "(0|[1-9][0-9]*)"))


def renamed(name: str, rows: Iterable[Row], source: str, target: str) -> tuple[str, ...]:
    """All that another dialect may call ``name`` of this one; empty when no row knows it."""
    for row in rows:
        for spelling in row.spellings(source):
            if match := _pattern(spelling).fullmatch(name):
                return row.spellings(target, int(match[1]) if row.stacked else None)
    return ()
