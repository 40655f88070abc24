"""A video without an end: blocks of frames, handed out as they are made, in memory that does not grow."""

from __future__ import annotations

import copy
import html
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt8

from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.runtime import arguments
from rehyat_jax.runtime.devices import first_process
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.noise import seeds, video_keys
from rehyat_jax.sampling.session import Embed, Session, prompt_list
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.shown import OnLatents, check_finite
from rehyat_jax.streams.prefill import prefill, rows_of
from rehyat_jax.streams.state import (
    MOST_FRAMES,
    StreamRecord,
    StreamState,
    init_state,
    load_state,
    read_record,
    save_stream,
)
from rehyat_jax.text.prompt_encoder import TEXT_LENGTH
from rehyat_jax.video.display import player

#: Begins chunks ahead. On a CPU XLA runs what one thread asks for in turn, and what two ask for at once.
_AHEAD = ThreadPoolExecutor(1, thread_name_prefix="ahead")

#: One text, or one for each of several videos side by side.
Prompts = str | Sequence[str]


class Stream(Iterator[np.ndarray]):
    """One video, or several side by side, a chunk at a time: made by ``TextToVideo.open_stream`` and ``resume_stream``.

    Iterating gives uint8 blocks [F, H, W, 3] of one prompt's video and [B, F, H, W, 3] of a list's: 1 + 4 (T_c - 1)
    frames first, then 4 T_c for every chunk of T_c latent frames, for as long as one asks. A beginning's frames are not
    among them.

    Args:
        session: the networks and settings that make it.
        text: embeds a prompt that comes later.
        model: asked once for `rehyat_jax.streams.state.fingerprint` of the networks, when the stream is saved.

    Attributes:
        state: the stream after the blocks handed out so far. Its arrays are donated to the next chunk: copy them to
            keep them, or `fork` or `save` the stream.
        prompt, negative_prompt: what the next chunks show (a text, or a list of texts), and do not.
        beginning: of a stream that was started with one, its frames as the autoencoder has them.
        ahead: whether the next chunk is begun before this one's frames are decoded, in the memory of a second state of
            the transformer; what was begun is thrown away where another prompt is asked for. The blocks are the same.
        until: frames of the video of which nobody takes more: no chunk is begun ahead after them.
        on_latents: shown each chunk's latents before they are decoded (`rehyat_jax.sampling.shown.LatentsSeen`);
            returns None. May be set at any time; a fork begins without one.
    """

    def __init__(
        self,
        session: Session,
        state: StreamState,
        *,
        text: Embed,
        model: Callable[[], str],
        prompt: Prompts,
        negative_prompt: str = "",
    ) -> None:
        self.state, self.negative_prompt = state, negative_prompt
        #: As it was given; a text to those who open a stream of one.
        self.prompt: Any = prompt
        self._session, self._text, self._model = session, text, model
        self.beginning: np.ndarray | None = None
        self.on_latents: OnLatents | None = None
        self.ahead = session.decodes_apart
        self.until: int | None = None
        #: Frames a second that it is shown at.
        self.fps = 16
        #: What whoever opened it calls the model; forks have it too.
        self.label = ""
        #: What was handed out last, for `_repr_html_`.
        self._newest: np.ndarray | None = None
        self._text_kv: tuple[Array, Any] | None = None
        #: Of the state that it goes on from, and of no other: the next chunk, begun already.
        self._ahead: tuple[StreamState, Future[tuple[Array, StreamState]]] | None = None

    @classmethod
    def start(
        cls,
        session: Session,
        prompt: Prompts,
        *,
        text: Embed,
        model: Callable[[], str],
        negative_prompt: str = "",
        seed: int = 0,
        beginning: Shaped[np.ndarray, "..."] | None = None,
        condition: Condition | None = None,
    ) -> Stream:
        """A new stream, which goes on from a beginning if there is one.

        Args:
            condition: of its first latent frames, and what lasts of it.
            seed: of the noise; the i-th of several prompts has that of ``seed + i``.
            beginning: uint8 [F, H, W, 3], or [B, F, H, W, 3] for a list of prompts.

        Raises:
            RehyatError: the transformer cannot stream, a prompt is not a text, or the seed is impossible; a beginning
                of another size or length than `rehyat_jax.streams.prefill` takes.
        """
        prompts = prompt_list(prompt, negative_prompt)
        keys = video_keys(seed, count=len(prompts))
        embedded = session.embed(text, prompts, negative_prompt)
        state = init_state(session, keys=keys, text=embedded, condition=condition)
        if beginning is not None:
            one = isinstance(prompt, str)
            state, beginning = prefill(session, state, rows_of(beginning, one=one))
            beginning = beginning[0] if one else beginning
        stream = cls(
            session,
            state,
            text=text,
            model=model,
            prompt=prompt,
            negative_prompt=negative_prompt,
        )
        stream.beginning = beginning
        return stream

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        *,
        session: Callable[[Settings], Session],
        text: Embed,
        model: Callable[[], str],
        condition: Callable[[Settings, int], Condition],
    ) -> Stream:
        """A saved stream.

        Args:
            session: made of its settings; raises RehyatError where the networks cannot be run at these.
            condition: the shapes of what lasts of the condition of so many videos.

        Raises:
            CheckpointError: there is no stream in the folder, it is damaged, or other models made it.
        """
        record = read_record(folder)
        found = model()
        if record.model != found:
            raise CheckpointError(
                f"the stream in {os.fspath(folder)} was made by another model, or in another number format"
            )
        try:
            made = session(record.settings)
        except RehyatError as error:
            raise CheckpointError(f"the stream in {os.fspath(folder)} is damaged: {error}") from error
        count = len(prompt_list(record.prompt, record.negative_prompt))
        text_shape = made.evaluations, count, TEXT_LENGTH, made.text_dim

        def template(condition: Condition) -> StreamState:
            text = jnp.zeros(text_shape, jnp.float32)
            return init_state(made, keys=video_keys(0, count=count), text=text, condition=condition)

        with made.computing():
            wanted = jax.eval_shape(template, condition(record.settings, count))
        state = load_state(folder, wanted, place=made.placed)
        if int(state.first_frame) % made.chunk_shape[0]:
            raise CheckpointError(f"the stream in {os.fspath(folder)} is damaged: it stands in the middle of a chunk")
        stream = cls(made, state, text=text, model=model, prompt=record.prompt, negative_prompt=record.negative_prompt)
        stream._fingerprint = found
        return stream

    @property
    def settings(self) -> Settings:
        """How it is made, every value resolved."""
        return self._session.settings

    @property
    def how(self) -> dict[str, Any]:
        """What clients of a server are told of it, by the names that they ask with."""
        names = ("width", "height", "num_inference_steps", "guidance_scale")
        return {"model": self.label} | {name: getattr(self.settings, name) for name in names}

    @property
    def gains_ahead(self) -> bool:
        """Whether blocks come faster with ``ahead``, here."""
        return self._session.decodes_beside

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of each video's noise."""
        return seeds(self.state.keys)

    @property
    def frames_done(self) -> int:
        """Frames of the video so far: those handed out, and before them the beginning's."""
        return self._session.codec.num_frames(int(self._living().first_frame))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> UInt8[np.ndarray, "*B F H W 3"]:
        """The next block.

        Raises:
            RehyatError: positions in time end here (48 days), or an interrupt left the stream without its state.
            NotFiniteError: the chunk, or its frames, are not finite; the stream ends with the block before.
        """
        state, session, first = self._living(), self._session, self._check_goes_on()
        begun, self._ahead = self._ahead, None
        if begun is not None and begun[0] is state:
            latents, after = begun[1].result()
        else:
            if begun is not None:  # programs over several devices are asked for in one order
                wait([begun[1]])
            latents, after = self._denoised(state, self._precomputed(state))
        ahead = None
        if self.ahead and first and self._is_wanted(after):  # the first is not held up by what the second compiles
            kept = after._replace(states=_copies(after.states))
            ahead = _AHEAD.submit(self._denoised, kept, self._precomputed(after))
        check_finite(latents, self._chunk_name())
        session.show(latents, first_frame=first, to=self.on_latents)
        decoded = list(session.codec.decode(latents, state.decoder, first_frame=first))
        self.state = after._replace(decoder=decoded[-1][1])
        self._ahead = None if ahead is None else (self.state, ahead)
        block = np.concatenate([np.asarray(frames) for frames, _ in decoded], axis=1)
        self._newest = block[0] if isinstance(self.prompt, str) else block
        return self._newest

    def _denoised(self, state: StreamState, text_kv: Any) -> tuple[Array, StreamState]:
        """The next chunk's latents, and the stream after it but for its frames. The mixers' states are donated."""
        session = self._session
        latents, states = session.denoise_chunk(state.states, state.keys, text_kv, state.first_frame, state.condition)
        # What is given is of the first chunk: those after it are one program, whatever the stream began with.
        left = state.condition.lasting()
        first = jnp.asarray(int(state.first_frame) + session.chunk_shape[0], jnp.int32)
        return latents, state._replace(states=states, first_frame=first, condition=left)

    def __repr__(self) -> str:
        size, several = self.settings, "" if isinstance(self.prompt, str) else f", {len(self.prompt)} side by side"
        return f"Stream({self.prompt!r}, {self.frames_done} frames of {size.width}x{size.height} so far{several})"

    def _repr_html_(self) -> str:
        """The newest block as a player; of several videos, side by side."""
        if self._newest is None:
            return html.escape(repr(self))
        block = self._newest if self._newest.ndim == 4 else np.concatenate(list(self._newest), axis=2)
        return player(block, fps=self.fps, title=html.escape(repr(self)))

    def shares(self, other: Stream) -> bool:
        """Whether `advance_together` takes both: one video each, of the same networks (one transformer) and settings,
        without images, past the first chunk, with sentences of as many tokens up to a multiple of 64."""
        for each in (self, other):
            alone = not isinstance(each.prompt, str) or jax.tree.leaves(each.state.condition)
            if alone or not each.frames_done or not each._session.takes_rows:
                return False
        mine, others = (jax.tree.map(jnp.shape, s._precomputed(s.state)) for s in (self, other))
        return self._session.is_as(other._session) and mine == others

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Keep the stream in a folder, for ``resume_stream`` in this or another process to go on from, bit for bit.

        The folder holds the new state whole, or the one before it as it was, whenever the process ends. Of several
        processes every one has to call it, and the first writes.

        Raises:
            RehyatError: the folder cannot be written, the solver has no form on disk, or the stream is to begin with
                an image and has not begun.
        """
        if self.state.condition.clean is not None and not self.frames_done:
            raise RehyatError("a stream that begins with an image can be saved once its first chunk is made")
        record = StreamRecord(
            settings=self.settings, model=self._fingerprint, prompt=self.prompt, negative_prompt=self.negative_prompt
        )
        state = self._living()
        if jax.process_count() > 1:  # which have each a part of the states
            state = state._replace(states=self._session.devices.on_host(state.states))
        if first_process():
            save_stream(arguments.user_path("folder", folder), state, record)

    def fork(self, *, seed: int | None = None) -> Stream:
        """A second stream that goes on from here with a copy of the state: the same way, or another with other noise.

        Raises:
            RehyatError: an impossible seed.
        """
        other, state = copy.copy(self), self._living()
        other.on_latents = other._ahead = None
        # The text and the condition are never donated; so both go on with what was precomputed of them.
        shared: dict[str, Any] = {"text": state.text, "condition": state.condition}
        other.state = _copied(state, **dict.fromkeys(shared))._replace(**shared)
        if seed is not None:
            other.state = other.state._replace(keys=video_keys(seed, count=len(state.keys)))
        return other

    def snapshot(self) -> Stream:
        """As `fork`, to be kept: without what was made of the state and can be made again."""
        other = self.fork()
        other._text_kv = other._newest = None
        return other

    def change_prompt(self, prompt: Prompts, negative_prompt: str | None = None) -> None:
        """What the next chunks are to show; without a ``negative_prompt`` that one stays as it is.

        Args:
            prompt: a text, or a list of as many as there are.

        Raises:
            RehyatError: a prompt is not a text, or there are more or fewer than before.
        """
        negative = self.negative_prompt if negative_prompt is None else negative_prompt
        prompts, count = prompt_list(prompt, negative), len(self.state.keys)
        if isinstance(prompt, str) != isinstance(self.prompt, str) or len(prompts) != count:
            asked = "one prompt" if isinstance(self.prompt, str) else f"a list of {count} prompts"
            raise RehyatError(f"this stream has {asked}: it cannot be changed to {str(prompt)[:80]!r}")
        text = self._session.embed(self._text, prompts, negative)
        self.state = self._living()._replace(text=text)
        self.prompt, self.negative_prompt = prompt, negative

    def _check_goes_on(self) -> int:
        """The next chunk's first latent frame.

        Raises:
            RehyatError: positions in time end here.
        """
        if not self._may_go_on(state := self._living()):
            raise RehyatError(f"a stream ends after {MOST_FRAMES} latent frames")
        return int(state.first_frame)

    def _is_wanted(self, state: StreamState) -> bool:
        """Whether somebody may take a chunk after this state."""
        more = self.until is None or self._session.codec.num_frames(int(state.first_frame)) < self.until
        return more and self._may_go_on(state)

    def _may_go_on(self, state: StreamState) -> bool:
        return int(state.first_frame) + self._session.chunk_shape[0] <= MOST_FRAMES

    def _chunk_name(self) -> str:
        first = int(self.state.first_frame)
        return f"chunk {first // self._session.chunk_shape[0] + 1}, from latent frame {first} on,"

    def _living(self) -> StreamState:
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            raise RehyatError("the stream was interrupted in the middle of a chunk: resume it from where it was saved")
        return self.state

    def _precomputed(self, state: StreamState) -> Any:
        """Once for each text; beside the state, since it is not to be saved."""
        if self._text_kv is None or self._text_kv[0] is not state.text:
            self._text_kv = state.text, self._session.precompute_text_kv(state.text, state.condition)
        return self._text_kv[1]

    @cached_property
    def _fingerprint(self) -> str:
        return self._model()


def _copied(state: StreamState, **left: Any) -> StreamState:
    """But for what is given; by two programs, where a copy for each array would be as many. The decoder's part may lie
    on other devices."""
    copied: StreamState = _copies(state._replace(decoder=None, **left))
    return copied._replace(decoder=_copies(state.decoder))


@jax.jit
def _copies(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
