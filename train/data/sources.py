"""Where distillation's inputs come from: the teacher's own trajectories, or clips with noise."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import WHOLE, Devices, Rows
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sprites import world
from rehyat_jax.sprites.captions import captions
from rehyat_jax.text.files import numbered_lines, read_text
from train.data.clips import Bucket
from train.data.prepared import Prepared, PreparedClips, PreparedFeed, open_prepared
from train.data.trajectories import Clips, Given, HostBatch, Points, Prompts, Sampling

#: Captions are drawn so many at a time.
_CAPTIONS = 1024
#: Frames of latents that the VAE encodes at a time.
_ENCODE_FRAMES = 8
_KINDS = {"plain": world.WIDTH, "occlusion": world.OCCLUSION_WIDTH}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Inputs of one shape, from one kind of prompts. ``share`` is the part of the rounds that draw from it."""

    #: "plain" or "occlusion": captions of MovingSprites, drawn as for pretraining. Else a text file, a prompt a line.
    prompts: str = "plain"
    frames: int
    height: int = world.HEIGHT
    width: int = world.WIDTH
    #: Trajectories, or clips, side by side.
    batch: int
    share: float = 1.0
    #: Clips of MovingSprites with noise in place of the teacher's own trajectories.
    videos: bool = False
    #: A folder that `rehyat prepare` made: its clips with noise in their place. Whole videos are held out.
    prepared: Path | None = None
    #: Of clips with a pillar: hidden-wait frames are drawn from 0 to this.
    longest_wait: int = 48

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("batch", 1), ("share", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"a source's {name} must be {least} or more, not {getattr(self, name)}")
        if self.videos and self.prepared is not None:
            raise ConfigError("a source has videos or a prepared folder, not both")
        if self.videos and (self.height, self.width) != (world.HEIGHT, _KINDS.get(self.prompts)):
            raise ConfigError(
                f"a source with videos has prompts 'plain' (64x64) or 'occlusion' (96x64), not {self.prompts!r} "
                f"({self.width}x{self.height})"
            )

    @property
    def of_sprites(self) -> bool:
        """Whether the prompts are captions of the world, and not a file's."""
        return self.prepared is None and self.prompts in _KINDS

    @property
    def samples(self) -> bool:
        """Whether its inputs are the teacher's own trajectories."""
        return self.prepared is None and not self.videos

    def latent_shape(self, vae: VAEConfig, model: WanConfig) -> tuple[int, int, int, int]:
        """[T, h, w, z] of its latents.

        Raises:
            ConfigError: the VAE or the model's patches cannot have such a size.
        """
        if (self.frames - 1) % vae.temporal_factor:
            raise ConfigError(f"{self.frames} frames are not {vae.temporal_factor}k + 1")
        for side, patch in zip((self.height, self.width), model.patch_size[1:], strict=True):
            if side % (vae.spatial_factor * patch):
                raise ConfigError(f"a side of {side} is no multiple of {vae.spatial_factor * patch} pixels")
        frames = (self.frames - 1) // vae.temporal_factor + 1
        return frames, self.height // vae.spatial_factor, self.width // vae.spatial_factor, vae.z_dim

    def texts(self, *, seed: int, reserved: int) -> Callable[[int], str]:
        """Prompt number i of training, for every i ≥ 0.

        Args:
            reserved: of a file, so many lines at its beginning are `held_out`.

        Raises:
            ConfigError: the file cannot be read, or has too few prompts.
        """
        if self.of_sprites:
            draw = functools.lru_cache(maxsize=2)(functools.partial(self._captions, seed, "train"))
            return lambda number: draw(number // _CAPTIONS)[number % _CAPTIONS]
        lines = self.lines(reserved)[reserved:]

        def of_file(number: int) -> str:
            epoch, place = divmod(number, len(lines))
            return lines[np.random.default_rng((seed, epoch)).permutation(len(lines))[place]]

        return of_file

    def held_out(self, count: int) -> list[str]:
        """Prompts that are never trained on: captions kept for testing, or the file's first lines. (Of a prepared
        folder: `Prepared.held_out_captions`.)

        There are only as many occlusion captions as grounds: they are the same as in training.

        Raises:
            ConfigError: as `texts`.
        """
        if self.of_sprites:
            return self._captions(0, "unseen", 0)[:count]
        return self.lines(count)[:count]

    def scenes(self, *, seed: int) -> Callable[[Int[np.ndarray, " R"]], Any]:
        """The scenes of the captions of these numbers, of sprites; as `texts` numbers them."""
        draw = functools.lru_cache(maxsize=2)(functools.partial(self._scenes, seed, "train"))

        def of_numbers(numbers: Int[np.ndarray, " R"]) -> Any:
            rows = [jax.tree.map(lambda x, n=n: x[n % _CAPTIONS], draw(n // _CAPTIONS)) for n in numbers.tolist()]
            return jax.tree.map(lambda *each: jnp.stack(each), *rows)

        return of_numbers

    def held_out_scenes(self, count: int) -> Any:
        """Those of `held_out`, of sprites."""
        return jax.tree.map(lambda x: x[:count], self._scenes(0, "unseen", 0))

    def render(self, scenes: Any) -> Float[Array, "R F H W 3"]:
        """The scenes' clips; see `check_renders`."""
        return world.render(scenes, num_frames=self.frames)

    def check_renders(self) -> None:
        """
        Raises:
            ConfigError: of sprites, whose clips are of another size than the source.
        """
        if (self.height, self.width) != (size := (world.HEIGHT, _KINDS[self.prompts])):
            raise ConfigError(
                f"the clips of {self.prompts!r} captions are {size[1]}x{size[0]}, and the source says "
                f"{self.width}x{self.height}"
            )

    def _captions(self, seed: int, split: Any, block: int) -> list[str]:
        return captions(self._scenes(seed, split, block))

    def _scenes(self, seed: int, split: Any, block: int) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), block)
        if self.prompts == "occlusion":
            return world.sample_occlusions(key, _CAPTIONS)
        return world.sample_scenes(key, _CAPTIONS, split=split)

    def lines(self, reserved: int = 0) -> list[str]:
        """The prompts of a file, in its order.

        Raises:
            ConfigError: the file cannot be read, or has no more prompts than are reserved.
        """
        what = f"the prompts {self.prompts[:200]!r}, neither 'plain' nor 'occlusion', as a file with a prompt a line"
        lines = [line for _, line in numbered_lines(read_text(self.prompts, what=what))]
        if len(lines) <= reserved:
            raise ConfigError(f"{self.prompts} has {len(lines)} prompts, of which {reserved} are to be held out")
        return lines


def prepared_sources(sources: Sequence[Source], model: Path, *, held_out: int) -> dict[Path, Prepared]:
    """The prepared folders of sources.

    Args:
        model: the folder of the teacher, whose networks they must be of.
        held_out: clips of each that training does not see; see `train.data.prepared.hold_out`.

    Raises:
        ConfigError: a folder is not finished, damaged, of another size, or of another model.
    """
    there = [source for source in sources if source.prepared is not None]
    buckets = [PreparedClips(folder=x.prepared or Path(), frames=x.frames, batch=x.batch) for x in there]
    found = open_prepared(buckets, model, held_out=held_out)
    for source, bucket in zip(there, buckets, strict=True):
        plan = found[bucket.folder].plan
        if (plan.width, plan.height) != (source.width, source.height):
            raise ConfigError(
                f"{bucket.folder} has clips of {plan.width}x{plan.height}, and the source says "
                f"{source.width}x{source.height}"
            )
    return found


@dataclasses.dataclass(frozen=True)
class Shown:
    """How a model that takes images is shown a clip's own: what `condition` makes of clips, by the networks' arrays."""

    arrays: PyTree
    condition: Callable[[PyTree, Float[Array, "R T h w z"]], Condition]


def encoded(vae: WanVAE, video: Float[Array, "R F H W 3"]) -> Float[Array, "R T h w z"]:
    """Normalised latents of clips."""
    return vae.normalize(vae.encode(video, frames_per_step=_ENCODE_FRAMES).astype(jnp.float32))


#: Embeddings [R, L, D] of texts.
Embed = Callable[[Sequence[str]], Float[Array, "R L D"]]


@runtime_checkable
class Inputs(Protocol):
    """One source at work: what it carries from round to round on the device, and what a round needs from the host."""

    #: Arrays that its programs read.
    frozen: PyTree

    def begin(self, devices: Devices) -> PyTree:
        """What is carried, before the first round."""
        ...

    def host_batch(self, index: int) -> PyTree:
        """For its round ``index``, from the host: all of it, or this process's rows."""
        ...

    def host_batch_shapes(self) -> PyTree:
        """Shapes and dtypes of a whole host batch."""
        ...

    def points(self, carried: PyTree, host_batch: PyTree, frozen: PyTree, teacher: Any) -> tuple[PyTree, Points]:
        """What goes into the teacher; inside jit."""
        ...

    def after(self, carried: PyTree, host_batch: PyTree, frozen: PyTree, velocity: Array) -> PyTree:
        """What is carried on, after the teacher's answer; inside jit."""
        ...


class OwnTrajectories:
    """The teacher's own trajectories: see `train.data.trajectories`."""

    def __init__(
        self,
        source: Source,
        *,
        sampling: Sampling,
        texts: Callable[[int], str],
        embed: Embed,
        shape: tuple[int, ...],
        key: Key[Array, ""],
        clips: Clips | None = None,
    ) -> None:
        """
        Args:
            clips: of a teacher that needs some of each trajectory.
        """
        self._batch, self._sampling, self._shape, self._key, self._clips = source.batch, sampling, shape, key, clips
        self._prompts: Prompts = lambda numbers: embed([texts(int(number)) for number in numbers])
        # The key among them, so that every seed has the same programs.
        self.frozen = {"table": sampling.table, "negative": embed([""]), "key": key}

    def begin(self, devices: Devices) -> PyTree:
        numbers = np.arange(self._batch, dtype=np.int32)
        given = Given() if self._clips is None else self._clips(numbers)

        def begin(key: Key[Array, ""], numbers: Array, text: Array, given: Given) -> PyTree:
            return self._sampling.begin(key, numbers, text, shape=self._shape, given=given)

        return devices.made_batch(begin, self._key, numbers, self._prompts(numbers), given)

    def host_batch(self, index: int) -> HostBatch:
        return self._sampling.host_batch(index, self._batch, self._prompts, self._clips)

    def host_batch_shapes(self) -> HostBatch:
        return _shapes(self.host_batch(0))

    def points(self, carried: PyTree, host_batch: HostBatch, frozen: PyTree, teacher: Any) -> tuple[PyTree, Points]:
        rollouts = self._sampling.restart(carried, host_batch, frozen["key"])
        return rollouts, self._sampling.points(rollouts, frozen["table"].at(host_batch.places), frozen["negative"])

    def after(self, carried: PyTree, host_batch: HostBatch, frozen: PyTree, velocity: Array) -> PyTree:
        return self._sampling.advance(carried, frozen["table"].at(host_batch.places), velocity)


class NoisyClips:
    """Clips of the world, encoded, at every level of noise: nothing is carried from round to round."""

    def __init__(
        self,
        source: Source,
        *,
        sampling: Sampling,
        embed: Embed,
        vae: WanVAE,
        key: Key[Array, ""],
        shown: Shown | None = None,
    ) -> None:
        self._bucket = Bucket(
            kind="plain" if source.prompts == "plain" else "occlusion",
            frames=source.frames,
            batch=source.batch,
            longest_wait=source.longest_wait,
        )
        self._noise = _Noise.of(sampling)
        self._embed, self._key, self._shown = embed, key, shown
        self._draw = jax.jit(functools.partial(self._bucket.sample, count=source.batch))
        self._vae, weights = nnx.split(vae)
        self.frozen = {"vae": weights, "shown": None if shown is None else shown.arrays}

    def begin(self, devices: Devices) -> PyTree:
        return None

    def host_batch_shapes(self) -> PyTree:
        return _shapes(self.host_batch(0))

    def host_batch(self, index: int) -> PyTree:
        draw, noise = jax.random.split(jax.random.fold_in(self._key, index))
        scenes = self._draw(draw)
        return scenes, noise, self._embed(captions(scenes))

    def points(self, carried: PyTree, host_batch: PyTree, frozen: PyTree, teacher: Any) -> tuple[PyTree, Points]:
        scenes, key, text = host_batch
        latents = encoded(nnx.merge(self._vae, frozen["vae"]), self._bucket.render(scenes))
        condition = None if self._shown is None else self._shown.condition(frozen["shown"], latents)
        return None, self._noise.points(latents, text, key).under(condition)

    def after(self, carried: PyTree, host_batch: PyTree, frozen: PyTree, velocity: Array) -> PyTree:
        return None


class PreparedInputs:
    """Clips of a prepared folder, at every level of noise; as exact to resume as its reader is."""

    def __init__(
        self,
        source: Source,
        data: Prepared,
        *,
        sampling: Sampling,
        dtype: jnp.dtype,
        key: Key[Array, ""],
        seed: int,
        rows: Rows = WHOLE,
        shown: Shown | None = None,
    ) -> None:
        self._feed = PreparedFeed(
            data,
            count=source.batch,
            seed=seed,
            dtype=dtype,
            place=lambda index: index,
            rows=rows,
        )
        self._noise, self._key, self._shown = _Noise.of(sampling), key, shown
        self.frozen = {"feed": self._feed.frozen, "shown": None if shown is None else shown.arrays}

    def begin(self, devices: Devices) -> PyTree:
        return None

    def host_batch_shapes(self) -> PyTree:
        return self._feed.host_batch_shapes(), _shapes(self._key)

    def host_batch(self, index: int) -> PyTree:
        return self._feed.host_batch(index), jax.random.fold_in(self._key, index)

    def points(self, carried: PyTree, host_batch: PyTree, frozen: PyTree, teacher: Any) -> tuple[PyTree, Points]:
        pool = self._feed.pool(host_batch[0], frozen["feed"], None)
        condition = None if self._shown is None else self._shown.condition(frozen["shown"], pool.latents)
        return None, self._noise.points(pool.latents, pool.text, host_batch[1]).under(condition)

    def after(self, carried: PyTree, host_batch: PyTree, frozen: PyTree, velocity: Array) -> PyTree:
        return None


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@dataclasses.dataclass(frozen=True)
class _Noise:
    """Of clips, each at a level of its own."""

    shifts: tuple[float, ...]
    #: From and to.
    levels: tuple[float, float]

    @classmethod
    def of(cls, sampling: Sampling) -> _Noise:
        """The teacher's levels."""
        return cls(tuple(float(schedule.shift) for schedule in sampling.schedules), sampling.levels)

    def points(self, latents: Float[Array, "B T h w z"], text: Float[Array, "B L D"], key: Key[Array, ""]) -> Points:
        time_key, noise_key = jax.random.split(key)
        rows: Int[Array, " B"] = jnp.arange(latents.shape[0], dtype=jnp.int32)
        even = (rows.astype(jnp.float32) + jax.random.uniform(time_key, rows.shape)) / len(rows)
        # Rows next to each other have nearly the same level: each shift gets all levels.
        shift = jnp.asarray(self.shifts, jnp.float32)[rows % len(self.shifts)]
        # Before the shift, where levels are even.
        low, high = (level / (shift - (shift - 1) * level) for level in self.levels)
        even = low + (high - low) * even
        sigma = shift * even / (1 + (shift - 1) * even)
        wide = sigma[:, None, None, None, None]
        noisy = (1 - wide) * latents + wide * jax.random.normal(noise_key, latents.shape)
        return Points(noisy, sigma * 1000, text)
