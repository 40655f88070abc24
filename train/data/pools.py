"""Where flow matching's clips come from: for each bucket, what a round needs from the host, and the pool of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.mesh import devices_along, spec
from rehyat_jax.sprites.captions import captions
from rehyat_jax.text.tokenizer import Tokenizer
from train.data.clips import Bucket, round_key

#: Clips, and latent frames of each, that the VAE encodes at a time: one shape for all lengths.
ENCODE_CLIPS, _ENCODE_FRAMES = 32, 8


class Captions(NamedTuple):
    """Captions in tokens; for the mask see `rehyat_jax.text.tokenizer.Tokens`."""

    ids: Int[Array, "B L"]
    mask: Int[Array, "B L"]


def padded_captions(tokenizer: Tokenizer, texts: Sequence[str], *, length: int) -> Captions:
    """Every text in so many tokens."""

    def padded(x: np.ndarray) -> Array:
        return jnp.asarray(np.pad(x, ((0, 0), (0, length - x.shape[1]))))

    return Captions(*map(padded, tokenizer.encode(texts, max_length=length)))


class Pool(NamedTuple):
    """Clips of a round: normalised latents, and their captions as the loss reads them, a row a clip."""

    latents: Float[Array, "M T h w z"]
    text: PyTree
    #: What each latent frame counts in a loss; None: all alike.
    learned: Float[Array, "M T"] | None = None


#: Captions as a pool keeps them, from the parameters that do not learn.
Read = Callable[[PyTree, Captions], PyTree]


@runtime_checkable
class Feed(Protocol):
    """One bucket at work."""

    #: Arrays that its programs read.
    frozen: PyTree

    def host_batch(self, index: int) -> PyTree:
        """For round ``index`` of the run, from the host: all of it, or this process's rows."""
        ...

    def host_batch_shapes(self) -> PyTree:
        """Shapes and dtypes of a whole host batch."""
        ...

    def pool(self, host_batch: PyTree, frozen: PyTree, models: PyTree) -> Pool:
        """The round's clips, inside jit; ``models`` are the stage's parameters that do not learn."""
        ...

    def null_embedding(self, frozen: PyTree, models: PyTree) -> PyTree:
        """The empty prompt, as a pool's text of one row; inside jit."""
        ...

    def prompts(self, host_batch: PyTree) -> PyTree:
        """What a reward is told of the clips: a row a clip."""
        ...


class SpriteFeed:
    """Clips of MovingSprites drawn for a round, and encoded by the VAE on the device."""

    def __init__(
        self,
        bucket: Bucket,
        *,
        count: int,
        seed: int,
        vae: WanVAE,
        tokens: Callable[[Sequence[str]], Captions],
        read: Read,
    ) -> None:
        self._bucket, self._count, self._seed, self._tokens, self._read = bucket, count, seed, tokens, read
        self._vae, self.frozen = nnx.split(vae)
        self._temporal_factor = vae.config.temporal_factor
        self._draw = functools.partial(bucket.sample, count=count)
        self._sample = jax.jit(self._draw)
        self._empty = tokens([""])

    def host_batch(self, index: int) -> PyTree:
        scenes = self._sample(jax.random.split(round_key(self._seed, index))[0])
        return scenes, self._tokens(captions(scenes))

    def host_batch_shapes(self) -> PyTree:
        tokens = jax.tree.map(lambda x: jax.ShapeDtypeStruct((self._count, *x.shape[1:]), x.dtype), self._empty)
        return jax.eval_shape(self._draw, round_key(0, 0)), tokens

    def pool(self, host_batch: PyTree, frozen: PyTree, models: PyTree) -> Pool:
        scenes, tokens = host_batch
        encode, pieces = self._encode, devices_along("batch")
        if pieces > 1 and self._count % pieces == 0:
            # A loop over clips that are cut over devices would have each of them encode every clip.
            batch = spec("batch")
            encode = jax.shard_map(encode, in_specs=(batch, PartitionSpec()), out_specs=batch, check_vma=False)
        learned = self._bucket.learned(scenes, temporal_factor=self._temporal_factor)
        return Pool(encode(scenes, frozen), self._read(models, tokens), learned)

    def null_embedding(self, frozen: PyTree, models: PyTree) -> PyTree:
        return self._read(models, self._empty)

    def prompts(self, host_batch: PyTree) -> PyTree:
        """The scenes."""
        return host_batch[0]

    def _encode(self, scenes: Any, frozen: PyTree) -> Float[Array, "M T h w z"]:
        count = scenes.grounds.shape[0]
        part = count if count < ENCODE_CLIPS else math.gcd(count, ENCODE_CLIPS)
        vae = nnx.merge(self._vae, frozen)

        def encoded(scenes: Any) -> Float[Array, "P T h w z"]:
            latents = vae.encode(self._bucket.render(scenes), frames_per_step=_ENCODE_FRAMES)
            return vae.normalize(latents.astype(jnp.float32))

        parts = jax.tree.map(lambda x: x.reshape(-1, part, *x.shape[1:]), scenes)
        latents = jax.lax.map(encoded, parts)
        return latents.reshape(count, *latents.shape[2:])
