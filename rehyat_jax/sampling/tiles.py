"""Frames decoded and encoded by tiles that overlap, with blended seams: an autoencoder in the memory of one tile.

diffusers ``AutoencoderKLWan.tiled_decode`` and ``tiled_encode`` with their sizes' proportions: a quarter of a tile is
its neighbour's too, and goes over into that linearly. What lies near a tile's border is decoded without what is beyond
it, so that frames differ a little from those decoded at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from rehyat_jax.errors import NotFiniteError, RehyatError
from rehyat_jax.runtime.offload import host_memory
from rehyat_jax.sampling.codec import Codec, Pixels, to_uint8


class TiledCodec(Codec):
    """As `Codec`, tile by tile. What is kept of the frames before waits in the host's memory.

    Args:
        tile: of a side, in pixels.

    Raises:
        RehyatError: it is no multiple of four latent pixels.
    """

    def __init__(self, vae: Any, *, tile: int, decoder: Any = None, compute: DTypeLike | None = None) -> None:
        super().__init__(vae, decoder=decoder, compute=compute)
        factor = self.config.spatial_factor
        if tile < 1 or tile % (4 * factor):
            raise RehyatError(f"vae_tile must be a multiple of {4 * factor} pixels, not {tile}")
        #: Of a side, in latent pixels; the next one begins so many later.
        self._side, self._stride = tile // factor, 3 * tile // (4 * factor)

    def encode(
        self, video: UInt8[np.ndarray, "B F H W 3"] | Float[np.ndarray, "B F H W 3"], *, frames_per_step: int
    ) -> Float[Array, "B T h w z"]:
        factor = self.config.spatial_factor
        self._check_sides(*video.shape[2:4])
        rows, columns = self._places(video.shape[2] // factor, video.shape[3] // factor)
        tiles = []
        for top, left in itertools.product(rows, columns):
            down, across = (slice(start * factor, (start + self._side) * factor) for start in (top, left))
            tiles.append(np.asarray(super().encode(video[:, :, down, across], frames_per_step=frames_per_step)))
        return jnp.asarray(self._joined(tiles, rows=len(rows), columns=len(columns), factor=1, patch=1))

    def _check_sides(self, height: int, width: int) -> None:
        """
        Raises:
            RehyatError: a side is no multiple of a latent pixel.
        """
        factor = self.config.spatial_factor
        if height % factor or width % factor:
            raise RehyatError(
                f"a video of {width}x{height} cannot be encoded: both sides must be multiples of {factor}"
            )

    def decode(
        self, latents: Float[Array, "B T h w z"], state: Any = None, *, first_frame: int = 0, pixels: Pixels = to_uint8
    ) -> Iterator[tuple[Array, Any]]:
        rows, columns = self._places(*latents.shape[2:4])
        places, side = list(itertools.product(rows, columns)), self._side
        states: list[Any] = [None] * len(places) if state is None else list(state)
        for i in range(latents.shape[1]):
            tiles = []
            for number, (top, left) in enumerate(places):
                latent = latents[:, i : i + 1, top : top + side, left : left + side]
                [(shown, after)] = super().decode(
                    latent, _to_device(states[number]), first_frame=first_frame + i, pixels=_as_they_are
                )
                tiles.append(np.asarray(shown))
                states[number] = _to_host(after)
            whole = {"factor": self.config.spatial_factor, "patch": self.config.patch}
            frames = self._joined(tiles, rows=len(rows), columns=len(columns), **whole)
            if not np.isfinite(frames).all():
                raise NotFiniteError(f"decoding latent frame {first_frame + i} made pixels that are not finite")
            yield jax.jit(pixels)(frames), tuple(states)

    @property
    def takes_rows(self) -> bool:
        return False

    def init_state(self, batch: int, *, height: int, width: int) -> Any:
        rows, columns = self._places(height, width)
        return tuple(
            super(TiledCodec, self).init_state(
                batch, height=min(self._side, height - top), width=min(self._side, width - left)
            )
            for top, left in itertools.product(rows, columns)
        )

    def _places(self, height: int, width: int) -> tuple[range, range]:
        """Where rows and columns of tiles begin: one tile for what is no larger."""
        if max(height, width) <= self._side:
            return range(1), range(1)
        return range(0, height, self._stride), range(0, width, self._stride)

    def _joined(self, tiles: list[np.ndarray], *, rows: int, columns: int, factor: int, patch: int) -> np.ndarray:
        """Tiles [B, F, H, W, c], row by row, as whole frames: each blended with the one above and the one before it.

        Args:
            factor: of a side, for a latent pixel; patch: pixels of a side that are blended as one.
        """
        if rows == columns == 1:
            return tiles[0]
        stride, overlap = self._stride * factor, (self._side - self._stride) * factor
        grid = [[np.array(tiles[row * columns + column]) for column in range(columns)] for row in range(rows)]
        made = []
        for row, column in itertools.product(range(rows), range(columns)):
            tile = grid[row][column]
            if row:
                _blend(grid[row - 1][column], tile, overlap, axis=2, patch=patch)
            if column:
                _blend(grid[row][column - 1], tile, overlap, axis=3, patch=patch)
            made.append(tile[:, :, :stride, :stride])
        lines = [np.concatenate(made[row * columns : (row + 1) * columns], axis=3) for row in range(rows)]
        return np.concatenate(lines, axis=2)


def _blend(before: np.ndarray, tile: np.ndarray, overlap: int, *, axis: int, patch: int) -> None:
    """The beginning of a tile goes over from the end of the one before it, in steps of folded pixels."""
    overlap = min(overlap, before.shape[axis], tile.shape[axis])
    share = np.repeat(np.arange(overlap // patch, dtype=np.float32) / (overlap // patch), patch)
    share = share.reshape([-1 if each == axis else 1 for each in range(tile.ndim)])
    ours, theirs = ([slice(None)] * tile.ndim for _ in range(2))
    ours[axis], theirs[axis] = slice(overlap), slice(before.shape[axis] - overlap, None)
    tile[tuple(ours)] = before[tuple(theirs)] * (1 - share) + tile[tuple(ours)] * share


def _as_they_are(video: Array) -> Array:
    return video.astype(jnp.float32)


def _to_host(state: Any) -> Any:
    place = host_memory()
    return state if place is None else jax.device_put(state, place)


def _to_device(state: Any) -> Any:
    return state if state is None or host_memory() is None else jax.device_put(state, _device())


def _device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices()[0])
