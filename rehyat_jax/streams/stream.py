"""A video without an end: blocks of frames, handed out as they are made, in memory that does not grow."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped, UInt8

from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.models.wan.block import TextKV
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.platform import precision
from rehyat_jax.sampling import Steps
from rehyat_jax.sampling.programs import decode_on, denoise_chunk, read_text, to_uint8
from rehyat_jax.sampling.rollout import chunk_frames, video_keys
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.streams.prefill import begun
from rehyat_jax.streams.state import (
    MOST_FRAMES,
    StreamRecord,
    StreamState,
    fingerprint,
    load_state,
    read_record,
    save_stream,
)
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from rehyat_jax.text.tokenizer import trimmed

#: A prompt's embedding.
Text = Callable[[str], Float[Array, "1 L D"]]


class Stream(Iterator[np.ndarray]):
    """One video, a chunk at a time: made by ``TextToVideo.open_stream`` and ``resume_stream``.

    Iterating gives uint8 blocks [F, H, W, 3]: 1 + 4 (T_c - 1) frames first, then 4 T_c for every chunk of T_c latent
    frames, for as long as one asks. A beginning's frames are not among them.

    Attributes:
        state: the stream after the blocks handed out so far. Its arrays are given away to the next chunk: copy them to
            keep them, or `fork` or `save` the stream.
        settings: how it is made, every value resolved.
        prompt, negative_prompt: what the next chunks show, and do not.
    """

    def __init__(
        self,
        *,
        transformer: WanTransformer,
        vae: WanVAE,
        text: Text,
        settings: Settings,
        state: StreamState,
        prompt: str,
        negative_prompt: str,
    ) -> None:
        self.state, self.settings = state, settings
        self.prompt, self.negative_prompt = prompt, negative_prompt
        self._transformer, self._vae, self._text = transformer, vae, text
        self._read: tuple[Array, TextKV] | None = None

    @classmethod
    def start(
        cls,
        prompt: str,
        *,
        transformer: WanTransformer,
        vae: WanVAE,
        text: Text,
        settings: Settings,
        negative_prompt: str = "",
        seed: int = 0,
        beginning: Shaped[np.ndarray, "..."] | None = None,
    ) -> Stream:
        """A new stream, which goes on from a beginning if there is one.

        Raises:
            RehyatError: the transformer cannot stream, a prompt is not a text, or the seed is impossible; a beginning
                of another size or length than `rehyat_jax.streams.prefill` takes.
        """
        keys = video_keys(seed, count=1)
        rows = _embedded(text, prompt, negative_prompt, settings, transformer)
        state = StreamState.zeros(transformer, vae, settings, keys=keys, text=rows)
        if beginning is not None:
            state, _ = begun(state, beginning[None], transformer=transformer, vae=vae, settings=settings)
        return cls(
            transformer=transformer,
            vae=vae,
            text=text,
            settings=settings,
            state=state,
            prompt=prompt,
            negative_prompt=negative_prompt,
        )

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        *,
        transformer: WanTransformer,
        vae: WanVAE,
        text: Text,
        check: Callable[[Settings], None],
    ) -> Stream:
        """A saved stream.

        Args:
            check: raises RehyatError where the settings are not what the models can be run at.

        Raises:
            CheckpointError: there is no stream in the folder, it is damaged, or other models made it.
        """
        record = read_record(folder)
        if record.model != fingerprint(transformer, vae):
            raise CheckpointError(
                f"the stream in {os.fspath(folder)} was made by another model, or in another number format"
            )
        chunk = chunk_frames(transformer)
        try:
            check(record.settings)
        except RehyatError as error:
            raise CheckpointError(f"the stream in {os.fspath(folder)} is damaged: {error}") from error
        state = load_state(folder, jax.eval_shape(partial(_template, transformer, vae, record.settings)))
        if int(state.first_frame) % chunk:
            raise CheckpointError(f"the stream in {os.fspath(folder)} is damaged: it stands in the middle of a chunk")
        return cls(
            transformer=transformer,
            vae=vae,
            text=text,
            settings=record.settings,
            state=state,
            prompt=record.prompt,
            negative_prompt=record.negative_prompt,
        )

    @property
    def frames_done(self) -> int:
        """Frames of the video so far: those handed out, and before them the beginning's."""
        latents = int(self._living().first_frame)
        return latents and 1 + self._vae.config.temporal_factor * (latents - 1)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> UInt8[np.ndarray, "F H W 3"]:
        """The next block.

        Raises:
            RehyatError: positions in time end here (48 days), or an interrupt left the stream without its state.
        """
        state = self._living()
        first = int(state.first_frame)
        config = self._vae.config
        shape = (
            chunk_frames(self._transformer),
            self.settings.height // config.spatial_factor,
            self.settings.width // config.spatial_factor,
            config.z_dim,
        )
        if first + shape[0] > MOST_FRAMES:
            raise RehyatError(f"a stream ends after {MOST_FRAMES} latent frames")
        graph, weights = self._parts
        vae_graph, vae_weights = self._vae_parts
        with precision(self._transformer.dtype):
            latents, states = denoise_chunk(
                weights,
                state.states,
                state.keys,
                self._read_text(state.text),
                state.first_frame,
                self._plan,
                graph=graph,
                shape=shape,
                solver=self.settings.solver,
                guidance=self.settings.guidance,
                text_tokens=state.text.shape[-2],
                remember=self.settings.remember,
            )
            blocks, decoder = decode_on(
                vae_weights, latents, state.decoder, first=first, graph=vae_graph, pixels=to_uint8
            )
        self.state = StreamState(states, decoder, jnp.asarray(first + shape[0], jnp.int32), state.keys, state.text)
        return np.concatenate([np.asarray(frames) for frames in blocks], axis=1)[0]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Keep the stream in a folder, for ``resume_stream`` in this or another process to go on from, bit for bit.

        The folder holds the new state whole, or the one before it as it was, whenever the process ends.

        Raises:
            RehyatError: the folder cannot be written, or the solver has no form on disk.
        """
        record = StreamRecord(
            settings=self.settings, model=self._fingerprint, prompt=self.prompt, negative_prompt=self.negative_prompt
        )
        save_stream(folder, self._living(), record)

    def fork(self, *, seed: int | None = None) -> Stream:
        """A second stream that goes on from here with a copy of the state: the same way, or another with other noise.

        Raises:
            RehyatError: an impossible seed.
        """
        other, state = copy.copy(self), self._living()
        # The text is never given away; so both go on with what was read of it.
        other.state = jax.tree.map(jnp.copy, state)._replace(text=state.text)
        if seed is not None:
            other.state = other.state._replace(keys=video_keys(seed, count=1))
        return other

    def change_prompt(self, prompt: str, negative_prompt: str | None = None) -> None:
        """What the next chunks are to show; without a ``negative_prompt`` that one stays as it is.

        Raises:
            RehyatError: a prompt is not a text.
        """
        negative = self.negative_prompt if negative_prompt is None else negative_prompt
        text = _embedded(self._text, prompt, negative, self.settings, self._transformer)
        self.state = self._living()._replace(text=text)
        self.prompt, self.negative_prompt = prompt, negative

    def _living(self) -> StreamState:
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            raise RehyatError("the stream was interrupted in the middle of a chunk: resume it from where it was saved")
        return self.state

    def _read_text(self, text: Float[Array, "branches 1 L D"]) -> TextKV:
        """Anew for another text than before; beside the state, since it is not to be saved."""
        if self._read is None or self._read[0] is not text:
            graph, weights = self._parts
            self._read = text, read_text(weights, trimmed(text), graph=graph, text_tokens=text.shape[-2])
        return self._read[1]

    @cached_property
    def _parts(self) -> tuple:
        return nnx.split(self._transformer)

    @cached_property
    def _vae_parts(self) -> tuple:
        return nnx.split(self._vae)

    @cached_property
    def _plan(self) -> Steps:
        return jax.tree.map(jnp.asarray, self.settings.plan())

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._transformer, self._vae)


def _embedded(
    text: Text, prompt: str, negative_prompt: str, settings: Settings, transformer: WanTransformer
) -> Float[Array, "branches 1 L D"]:
    if not isinstance(prompt, str) or not isinstance(negative_prompt, str):
        raise RehyatError("a stream's prompt must be one text")
    with precision(transformer.dtype):
        return jnp.stack([text(each) for each in (prompt, negative_prompt)[: settings.guidance.branches]])


def _template(transformer: WanTransformer, vae: WanVAE, settings: Settings) -> StreamState:
    rows = jnp.zeros((settings.guidance.branches, 1, TEXT_LENGTH, transformer.config.text_dim), jnp.float32)
    return StreamState.zeros(transformer, vae, settings, keys=video_keys(0, count=1), text=rows)
