"""Still images as a video takes them: read, and brought to its size."""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rehyat_jax.errors import RehyatError, RehyatWarning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """What a video is to begin and to end with, of any size."""

    first: UInt8[np.ndarray, "H W 3"] | None = None
    last: UInt8[np.ndarray, "h w 3"] | None = None

    @classmethod
    def read(cls, image: Any, last_image: Any) -> Images:
        """What users give: see `read_image`.

        Raises:
            RehyatError: one cannot be read, or there is a last one alone.
        """
        if image is None and last_image is not None:
            raise RehyatError("last_image needs an image before it: give image as well")
        return cls(
            first=None if image is None else read_image("image", image),
            last=None if last_image is None else read_image("last_image", last_image),
        )


def read_image(name: str, value: Any) -> UInt8[np.ndarray, "H W 3"]:
    """An image as RGB.

    Args:
        name: of the argument, for messages.
        value: uint8 [H, W, 3], a PIL image, or the path of a file.

    Raises:
        RehyatError: it is none of these, or the file is missing, damaged or no image.
    """
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] != 3 or not value.size:
            raise RehyatError(f"{name} must be uint8 [H, W, 3], not {value.dtype} {list(value.shape)}")
        return value
    if isinstance(value, Image.Image):
        return np.asarray(_rgb(value))
    if not isinstance(value, str | os.PathLike):
        raise RehyatError(f"{name} must be an image or the path of one, not {type(value).__name__}")
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(value) as file,
        ):
            return np.asarray(_rgb(file))
    except FileNotFoundError as error:
        raise RehyatError(f"{name}: {os.fspath(value)} does not exist") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RehyatError(f"{name}: {os.fspath(value)} has more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except (OSError, ValueError, SyntaxError) as error:  # whatever a damaged file makes Pillow's readers raise
        raise RehyatError(f"{name}: {os.fspath(value)!r} is no image that can be read") from error


def _rgb(image: Image.Image) -> Image.Image:
    """As it is meant to be seen: turned by its orientation, transparent parts on white."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fitted(
    name: str, image: UInt8[np.ndarray, "H W 3"], *, height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """The middle of an image, scaled to a size; one of another shape is cropped, with a warning."""
    (rows, columns), kept = image.shape[:2], _kept(image, height, width)
    if min(kept[0] / rows, kept[1] / columns) < 0.98:
        warnings.warn(
            f"{name} of {columns}x{rows} is cropped to its middle {kept[1]}x{kept[0]}, the shape of {width}x{height}",
            RehyatWarning,
            stacklevel=2,
        )
    return scaled(image, height=height, width=width)


def scaled(image: UInt8[np.ndarray, "H W 3"], *, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """As `fitted`, without a word."""
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    kept = _kept(image, height, width)
    top, left = (rows - kept[0]) // 2, (columns - kept[1]) // 2
    middle = Image.fromarray(image[top : top + kept[0], left : left + kept[1]])
    return np.asarray(middle.resize((width, height), Image.Resampling.LANCZOS))


def _kept(image: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the part of a size's shape."""
    rows, columns = image.shape[:2]
    scale = max(height / rows, width / columns)
    return min(round(height / scale), rows), min(round(width / scale), columns)
