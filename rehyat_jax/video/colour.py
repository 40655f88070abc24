"""Colours between RGB and what files hold: always by the matrix and range that a file is tagged with.

Source of the numbers: ITU-R BT.709, BT.2087 (BT.2020 to BT.709), BT.1886; code points as in ITU-T H.273.
"""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from jaxtyping import UInt8

#: All chroma at full width, rounded: a flat colour comes back to within 1 of 255 (bilinear alone: 3).
_EXACT = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
#: H.273's matrices that are understood; 0 is RGB itself, 2 is "unspecified".
_RGB, _UNSPECIFIED = 0, 2
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
_FOREIGN_MATRICES = {8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "SMPTE 2085", 14: "ICtCp"}
_HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_SCENE = {
    ColorTrc.LINEAR: "linear light",
    ColorTrc.LOG: "logarithmic light",
    ColorTrc.LOG_SQRT: "logarithmic light",
    ColorTrc.SMPTE428: "cinema's XYZ",
}
#: Linear RGB of wide primaries to linear RGB of BT.709's; white stays white.
_TO_BT709 = {
    ColorPrimaries.BT2020: np.array(
        [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
    ),
    ColorPrimaries.SMPTE432: np.array(
        [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]]
    ),
}
_TO_BT709[ColorPrimaries.SMPTE431] = _TO_BT709[ColorPrimaries.SMPTE432]
#: BT.1886: a display's gamma.
_GAMMA = 2.4


def tag(context: av.VideoCodecContext) -> None:
    """Say in a file that its pixels are BT.709, in YUV of limited range or in RGB."""
    rgb = context.format is not None and context.format.is_rgb
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    context.colorspace = _RGB if rgb else Colorspace.ITU709
    context.color_range = ColorRange.JPEG if rgb else ColorRange.MPEG


def is_tagged(context: av.VideoCodecContext) -> bool:
    """False for files that were written before :func:`tag`."""
    return context.color_primaries == ColorPrimaries.BT709


def from_rgb(pixels: UInt8[np.ndarray, "H W 3"], pixel_format: str) -> av.VideoFrame:
    """A frame to encode: BT.709 in limited range where the format is YUV, the same pixels where it is RGB."""
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    if frame.format.name != pixel_format:
        frame = frame.reformat(
            format=pixel_format,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=_EXACT,
        )
        frame.color_primaries, frame.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return frame


def why_not_rgb(frame: av.VideoFrame) -> str | None:
    """Why a frame's colours cannot be told as BT.709's, in words; None where they can."""
    if transfer := _HDR.get(frame.color_trc):
        return (
            f"it is HDR ({transfer}), and how bright its white is to be is a choice: make an SDR video of it, for "
            "example with ffmpeg -i IN -vf zscale=t=linear:npl=100,tonemap=hable,zscale=p=bt709:t=bt709:m=bt709,"
            "format=yuv420p OUT"
        )
    if transfer := _SCENE.get(frame.color_trc):
        return f"its pixels are {transfer}, not a display's: grade it first"
    if not frame.format.is_rgb and frame.colorspace not in (_RGB, _UNSPECIFIED, *_MATRICES):
        name = _FOREIGN_MATRICES.get(frame.colorspace, f"number {frame.colorspace}")
        return f"its colour matrix ({name}) is not understood: convert it to BT.709 first"
    return None


def to_rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
    """A frame's pixels in RGB of BT.709's primaries, whatever matrix, range, depth and primaries it is stored with.

    A frame without a matrix is BT.601's below 1280 x 577 pixels, else BT.709's, as players take it; without a range it
    is limited. What is transparent lies on black.
    """
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    large = frame.width >= 1280 or frame.height > 576
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    colours: dict[str, int] = {}
    if not frame.format.is_rgb:
        matrix = _MATRICES.get(frame.colorspace, Colorspace.ITU709 if large else Colorspace.ITU601)
        colours = {"src_colorspace": matrix, "src_color_range": ColorRange.JPEG if full else ColorRange.MPEG}
    pixels = frame.reformat(
        format="rgba" if alpha else "rgb24", dst_color_range=ColorRange.JPEG, interpolation=_EXACT, **colours
    ).to_ndarray()
    if alpha:
        pixels = (pixels[..., :3] * (pixels[..., 3:] / 255.0)).round().astype(np.uint8)
    wide = _TO_BT709.get(frame.color_primaries)
    return pixels if wide is None else _in_primaries(pixels, wide)


def _in_primaries(pixels: UInt8[np.ndarray, "H W 3"], matrix: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    linear = (np.arange(256) / 255.0) ** _GAMMA
    shown = np.clip(linear[pixels] @ matrix.T, 0.0, 1.0) ** (1 / _GAMMA)
    return (255.0 * shown).round().astype(np.uint8)
