"""From prompts to token ids to the embeddings that Wan's transformer reads, as diffusers' ``WanPipeline`` makes them.

Source of the behaviour: huggingface/diffusers ``src/diffusers/pipelines/wan/pipeline_wan.py``, ``prompt_clean`` and
``_get_t5_prompt_embeds``.
"""

from __future__ import annotations

import functools
import hashlib
import html
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from rehyat_jax.errors import CheckpointError, ConfigError, RehyatError
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.runtime.files import whole_file
from rehyat_jax.runtime.mesh import replicated
from rehyat_jax.text.sentencepiece import from_sentencepiece

_log = logging.getLogger(__name__)

#: Prompts run through the encoder padded to a multiple of this, so that there are few programs to compile.
_BUCKET = 64


def clean_prompt(text: str, *, repair: bool = True) -> str:
    """A prompt as Wan's own code and ``WanPipeline`` clean it: repaired by ftfy, HTML entities resolved twice over,
    white space made single spaces.

    Args:
        repair: have ftfy repair it: curly quotes, full-width letters, ligatures, encodings mistaken for one another,
            control characters. Without that only a byte order mark at the beginning goes, and lone surrogates, which
            no tokenizer takes, become U+FFFD.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").removeprefix("\ufeff")
    if repair:
        text = ftfy.fix_text(text)
    for _ in range(2):
        try:
            text = html.unescape(text)
        except ValueError:  # An entity of thousands of digits, beyond Python's largest number in a string.
            break
    return re.sub(r"\s+", " ", text).strip()


class Tokens(NamedTuple):
    """A batch of prompts, each followed by ``</s>`` and then padding."""

    ids: Int32[np.ndarray, "B L"]
    #: 1 for tokens of the prompt and its ``</s>``, 0 for padding.
    mask: Int32[np.ndarray, "B L"]


class Tokenizer:
    """A checkpoint's tokenizer, from its ``tokenizer.json`` or its SentencePiece model."""

    #: Where a whole checkpoint keeps it: diffusers' layout, the original layout.
    _HOMES = ("", "tokenizer", "google/umt5-xxl")
    _NAMES = ("tokenizer.json", "spiece.model", "tokenizer.model")

    def __init__(self, backend: tokenizers.Tokenizer, *, repair: bool = True) -> None:
        """
        Args:
            backend: has ``<pad>``, and appends ``</s>``.
            repair: as :func:`clean_prompt`.

        Raises:
            CheckpointError: it has or does not.
        """
        backend.no_padding()
        backend.no_truncation()
        pad, eos = backend.token_to_id("<pad>"), backend.token_to_id("</s>")
        if pad is None or eos is None or backend.encode("").ids != [eos]:
            raise CheckpointError("the tokenizer is not of T5's kind: it must have <pad>, and end each text with </s>")
        self._backend, self._pad, self._repair = backend, pad, repair

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str], *, model: bytes | None = None, repair: bool = True) -> Tokenizer:
        """Read ``tokenizer.json``, else ``spiece.model``, from the tokenizer's own folder or a whole checkpoint's.

        Args:
            path: a folder, of either layout.
            model: a SentencePiece model that the text encoder's file carries, for a folder that has no tokenizer.
            repair: as :func:`clean_prompt`.

        Raises:
            CheckpointError: there is none, it is damaged, or it is not of T5's kind.
        """
        files = [Path(path) / home / name for name in cls._NAMES for home in cls._HOMES]
        file = next((file for file in files if file.is_file()), None)
        where = f"{path}: the text encoder's spiece_model" if file is None else str(file)
        if file is None and model is None:
            raise CheckpointError(
                f"no tokenizer.json or spiece.model in {path}, nor in its folders tokenizer and google/umt5-xxl"
            )
        try:
            if file is None or file.suffix == ".model":
                backend = from_sentencepiece(file.read_bytes() if file else model or b"", where=where)
            else:
                backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except CheckpointError:
            raise
        except Exception as error:  # The library raises plain Exception.
            raise CheckpointError(f"{where} cannot be read as a tokenizer: {error}") from error
        try:
            return cls(backend, repair=repair)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; every id is smaller, unless ids are not contiguous."""
        return self._backend.get_vocab_size()

    @property
    def words(self) -> list[str]:
        """The tokens that are whole words, in order: of a model with a small vocabulary, all that it knows."""
        tokens = sorted(self._backend.get_vocab())
        return [token[1:] for token in tokens if token.startswith("▁") and token[1:].isalpha()]

    def encode(self, prompts: str | Sequence[str], max_length: int = 512) -> Tokens:
        """Clean prompts and cut them into tokens, [B, max_length]. A prompt too long loses its end, but not ``</s>``.

        Raises:
            ConfigError: ``max_length`` leaves no room for ``</s>``.
        """
        if max_length < 1:
            raise ConfigError(f"max_length must be at least 1, not {max_length}")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        self._backend.enable_truncation(max_length)
        ids = np.full((len(prompts), max_length), self._pad, np.int32)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(self._backend.encode_batch(self._cleaned(prompts))):
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
        return Tokens(ids, mask)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt has, its ``</s>`` among them, before any is cut."""
        self._backend.no_truncation()
        return [len(encoding.ids) for encoding in self._backend.encode_batch(self._cleaned(prompts))]

    def _cleaned(self, prompts: Sequence[str]) -> list[str]:
        return [clean_prompt(prompt, repair=self._repair) for prompt in prompts]


def embed_prompts(
    encoder: UMT5Encoder, tokenizer: Tokenizer, prompts: str | Sequence[str], *, max_length: int = 512
) -> Float[Array, "B L D"]:
    """Prompt embeddings, padded with zeros to ``max_length`` (Wan's transformer reads them without a mask).

    Raises:
        ConfigError: ``max_length`` is below 1, or the tokenizer has tokens that the encoder does not.
    """
    return embed_tokens(encoder, tokenizer.encode(prompts, max_length))


def embed_tokens(encoder: UMT5Encoder, tokens: Tokens) -> Float[Array, "B L D"]:
    """The encoder's hidden states at real tokens, zero at padding; in the encoder's compute dtype.

    What a real token sees does not depend on how much padding follows it, so the encoder runs on no more of that than
    fills up a multiple of 64: eight times less than 512 tokens for a sentence or two.

    Raises:
        ConfigError: the tokenizer has tokens that the encoder does not.
    """
    ids, mask = tokens
    if ids.max(initial=0) >= encoder.config.vocab_size:
        raise ConfigError(
            f"the tokenizer gave token {ids.max()}, and the text encoder has only {encoder.config.vocab_size}"
        )
    length = ids.shape[1]
    bucket = min(length, -(-int(mask.sum(1).max(initial=1)) // _BUCKET) * _BUCKET)
    graphdef, params = nnx.split(encoder)
    hidden = _embed(graphdef, params, ids[:, :bucket], mask[:, :bucket])
    return jnp.pad(hidden, ((0, 0), (0, length - bucket), (0, 0)))


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: Any, params: Any, ids: Int32[Array, "B L"], mask: Int32[Array, "B L"]) -> Float[Array, "B L D"]:
    hidden = nnx.merge(graphdef, params)(ids, mask)
    return replicated(jnp.where(mask[..., None].astype(bool), hidden, jnp.zeros((), hidden.dtype)))


class PromptCache:
    """Prompt embeddings on disk, one safetensors file for each key.

    A key must name all that the embedding depends on: tokens, encoder, precision. Padding is not stored. Each entry
    carries a checksum over its key and content; one that is damaged in any way counts as missing. A folder that cannot
    be written means no caching, said at debug level.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def get(self, key: str, *, shape: tuple[int, ...] | None = None) -> Float32[np.ndarray, "B L D"] | None:
        """The entry, or None where there is none, where it is damaged, not finite or, if ``shape`` is given, not so."""
        try:
            with safetensors.safe_open(self._file(key), framework="numpy") as file:
                metadata, rows = file.metadata() or {}, file.get_tensor("embedding")
        except (OSError, safetensors.SafetensorError) as error:
            _log.debug("no cached prompt %s: %s", key, error)
            return None
        padding = metadata.get("padding", "")
        if metadata.get("checksum") != _checksum(key, rows, padding) or rows.ndim != 3:
            _log.debug("cached prompt %s is damaged", key)
            return None
        whole = (rows.shape[0], rows.shape[1] + int(padding), rows.shape[2])
        if rows.dtype != np.float32 or not np.isfinite(rows).all() or shape not in (None, whole):
            _log.debug("cached prompt %s is not what it should be: %s %s", key, rows.dtype, whole)
            return None
        return np.pad(rows, ((0, 0), (0, int(padding)), (0, 0)))

    def put(self, key: str, rows: Float32[np.ndarray, "B L D"]) -> None:
        """Keep an entry, if the folder can be written."""
        used = np.flatnonzero(rows.any(axis=(0, 2)))
        length = int(used[-1]) + 1 if len(used) else 1
        kept, padding = np.ascontiguousarray(rows[:, :length]), str(rows.shape[1] - length)
        metadata = {"padding": padding, "checksum": _checksum(key, kept, padding)}
        try:
            with whole_file(self._file(key)) as partial:
                partial.write_bytes(safetensors.numpy.save({"embedding": kept}, metadata=metadata))
        except RehyatError as error:
            _log.debug("prompt %s is not cached: %s", key, error)

    def _file(self, key: str) -> Path:
        # Hashed, so that no key is a path.
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _checksum(key: str, rows: np.ndarray, padding: str) -> str:
    header = f"{key} {rows.dtype} {rows.shape} {padding} ".encode()
    return hashlib.sha256(header + rows.tobytes()).hexdigest()
