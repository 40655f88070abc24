"""Prompts into embeddings, on disk once made: the text encoder, Wan's largest network, is read only for new prompts."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rehyat_jax.errors import CheckpointError, NotFiniteError, RehyatWarning
from rehyat_jax.models.checkpoints import load_text_encoder
from rehyat_jax.models.checkpoints.loading import Quantize
from rehyat_jax.models.networks import open_component
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.umt5.rows import carried_tokenizer
from rehyat_jax.runtime.devices import everywhere
from rehyat_jax.runtime.eight_bits import eight_bits_of
from rehyat_jax.runtime.files import sample_digest
from rehyat_jax.text.tokenizer import PromptCache, Tokenizer, embed_tokens

#: Tokens that Wan's transformer was trained on: shorter prompts are padded with zero embeddings, longer ones cut.
TEXT_LENGTH = 512


class PromptEncoder:
    """A tokenizer, and a UMT5 encoder that is read from disk when first needed."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: DTypeLike = jnp.float32,
        cache: Path | None = None,
        repair: bool = True,
        warn: bool = True,
        quantize: Quantize | None = None,
        mesh: Mesh | None = None,
        offload: bool = False,
    ) -> None:
        """Open a checkpoint's text part: sizes and headers are checked, the weights not yet read.

        Args:
            folder: a whole checkpoint's, diffusers or original layout.
            dtype: of the encoder's weights and computation.
            cache: a folder for embeddings; ``None``: made each time.
            warn: tell of a prompt that is cut when it is first met; False where the caller counts them.
            quantize: as `load_text_encoder` takes it.
            mesh: over whose devices the encoder is sharded and computes.
            offload: the encoder's blocks stay in the host's memory, and it leaves the device when a prompt is embedded:
                the next one has it read again.
            repair: have ftfy repair prompts, as :func:`~rehyat_jax.text.tokenizer.clean_prompt` says.

        Raises:
            CheckpointError, ConfigError: tokenizer or encoder is missing, damaged or foreign, or they do not fit.
        """
        self.folder, self._dtype, self._mesh = folder, dtype, mesh
        self._quantize = eight_bits_of(quantize)
        self._offload = offload
        self._cache = None if cache is None else PromptCache(cache)
        self._warn, self._told = warn, set[str]()
        opened = open_component(folder, "text_encoder")
        self.tokenizer = Tokenizer.from_folder(folder, model=carried_tokenizer(opened), repair=repair)
        self._config, self._files = opened.config, opened.tensors.files
        if self.tokenizer.vocab_size > self._config.vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {self.tokenizer.vocab_size} tokens, the encoder {self._config.vocab_size}"
            )

    @property
    def text_dim(self) -> int:
        """Width of an embedding."""
        return self._config.d_model

    @cached_property
    def encoder(self) -> UMT5Encoder:
        """The network, read at the first use."""
        return load_text_encoder(
            self.folder, dtype=self._dtype, quantize=self._quantize, mesh=self._mesh, offload=self._offload
        )

    def __call__(self, prompt: str) -> Float[Array, "1 L D"]:
        """The prompt's embedding in float32, zero beyond its last token, as ``WanPipeline`` makes it.

        Raises:
            CheckpointError: the weights are damaged.
            NotFiniteError: the embedding is not finite.
        """
        if self._warn:
            self.tell_cut([prompt])
        tokens = self.tokenizer.encode(prompt, TEXT_LENGTH)
        key = f"{self._identity} {tokens.ids.tolist()} {tokens.mask.sum()}"
        rows = None if self._cache is None else self._cache.get(key, shape=(1, TEXT_LENGTH, self.text_dim))
        # Processes that share an encoder embed together, or none does.
        kept = rows is not None if self._mesh is None else everywhere(rows is not None)
        if rows is None or not kept:
            with nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
                rows = np.asarray(embed_tokens(self.encoder, tokens).astype(jnp.float32))
            if self._offload:
                del self.encoder
            if not np.isfinite(rows).all():
                raise NotFiniteError(
                    f"the text encoder's embedding of a prompt is not finite: it overflows in {jnp.dtype(self._dtype)}"
                )
            if self._cache is not None:
                self._cache.put(key, rows)
        return jnp.asarray(rows)

    def warm_up(self) -> None:
        """Read and compile the encoder, which else waits for the first prompt that the cache does not hold."""
        embed_tokens(self.encoder, self.tokenizer.encode("", TEXT_LENGTH)).block_until_ready()

    def tell_cut(self, prompts: Sequence[str]) -> None:
        """Warn, once for these prompts together and never again of one of them, of those that are too long.

        Warns:
            RehyatWarning: how many lose their ends, and how long the longest is.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._told]
        cut = {prompt: n for prompt, n in zip(new, self.tokenizer.lengths(new), strict=True) if n > TEXT_LENGTH}
        self._told.update(cut)
        if cut:
            many = "a prompt has" if len(prompts) == 1 else f"{len(cut)} of {len(prompts)} prompts have"
            longest = f"{max(cut.values())}" if len(cut) == 1 else f"up to {max(cut.values())}"
            warnings.warn(
                f"{many} {longest} tokens, and Wan reads {TEXT_LENGTH}: what comes after them is cut off",
                RehyatWarning,
                stacklevel=2,
            )

    @cached_property
    def _identity(self) -> str:
        """What an embedding depends on beside the tokens: the encoder's files (their content), sizes and dtype."""
        # fp8 was another before it was E3M4.
        kept = jnp.dtype(self._dtype).name + (f" {self._quantize.file_kind}, finest" if self._quantize else "")
        digest = hashlib.sha256(f"{self._config} {kept}".encode())
        for path in self._files:
            digest.update(sample_digest(path))
        return digest.hexdigest()
