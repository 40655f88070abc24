"""A small picture of each chunk: of the newest ones at hand, of the others read from the video when asked for."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rehyat_jax.video import colour

#: Pixels of the longer side.
_SIDE = 64
#: Pictures at hand.
_MOST = 128


class Thumbnails:
    """PNGs by chunk; any thread."""

    def __init__(self) -> None:
        self._pictures: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, number: int, frame: UInt8[np.ndarray, "H W 3"]) -> bytes:
        """Keep the picture of a chunk's frame, and return it."""
        image = Image.fromarray(frame)
        image.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        image.save(file, "PNG")
        with self._lock:
            self._pictures[number] = file.getvalue()
            while len(self._pictures) > _MOST:
                self._pictures.popitem(last=False)
        return file.getvalue()

    def get(self, number: int) -> bytes | None:
        with self._lock:
            return self._pictures.get(number)

    def cut(self, number: int) -> None:
        """Forget those from a chunk on."""
        with self._lock:
            for gone in [kept for kept in self._pictures if kept >= number]:
                del self._pictures[gone]


def last_frame(video: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Of an mp4 in memory."""
    with av.open(io.BytesIO(video)) as container:
        *_, frame = container.decode(video=0)
        return colour.to_rgb(frame)
