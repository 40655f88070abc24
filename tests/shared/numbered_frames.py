"""Frames that tell their number, so that one that is lost or doubled is seen in what plays."""

import numpy as np


def frames(start: int, stop: int, size: int = 16) -> np.ndarray:
    """Frames that tell their number: a row of flat squares, white for each bit that is set."""
    bits = np.arange(start, stop)[:, None] >> np.arange(16) & 1
    return np.broadcast_to((bits * 255).astype(np.uint8)[:, None, :, None], (stop - start, size, 16, 3)).copy()


def numbers(video: np.ndarray) -> list[int]:
    bits = video[:, 8, 8::16, 1] > 127
    return (bits * (1 << np.arange(16))).sum(axis=1).tolist()
