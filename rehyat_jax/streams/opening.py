"""How a pipeline's streams begin and go on: opened with a prompt, resumed from a folder, paced to be watched."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from jaxtyping import Shaped

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.folder import Defaults
from rehyat_jax.models.own_settings import given_or
from rehyat_jax.models.wan.conditions import Conditioning, VideoSize
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime import arguments
from rehyat_jax.sampling import FlowSchedule, Solver
from rehyat_jax.sampling.codec import Decoder
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.rollout import ContextNoise
from rehyat_jax.sampling.session import Session, prompt_list
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.shown import OnLatents, check_callable
from rehyat_jax.streams.pace import MeasuredSteps, most_steps
from rehyat_jax.streams.prefill import check_prefix, rows_of
from rehyat_jax.streams.state import fingerprint
from rehyat_jax.streams.stream import Stream
from rehyat_jax.text.prompt_encoder import PromptEncoder
from rehyat_jax.video.beginning import read_beginning
from rehyat_jax.video.images import Images


class OpensStreams(ABC):
    """What a pipeline does with streams; `rehyat_jax.pipeline.TextToVideo` says what its networks are."""

    transformer: Any
    vae: WanVAE
    text: PromptEncoder
    decoder: Decoder | None
    defaults: Defaults
    _conditioning: Conditioning

    @abstractmethod
    def settings(self, **asked: Any) -> Settings:
        """What a stream is made with, from what a call asked."""

    @abstractmethod
    def session(self, settings: Settings) -> Session:
        """The networks as they are now, ready to sample with these settings."""

    def why_not_stream(self) -> str | None:
        """None for a model whose videos need no end; else one sentence that says why."""
        try:
            self._conditioning.of_stream()
        except RehyatError as error:
            return str(error)
        why: str | None = self.transformer.why_not_stream()
        return why

    @property
    def fps(self) -> int:
        """Frames a second that the model is trained at."""
        return self.defaults.fps

    def open_stream(
        self,
        prompt: str | list[str],
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | int | None = None,
        guidance_scale_2: float | int | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        schedule: FlowSchedule | None = None,
        solver: Solver | None = None,
        remember: ContextNoise | None = None,
        first_chunk_steps: int | None = None,
        beginning: Shaped[np.ndarray, "..."] | str | os.PathLike[str] | None = None,
        image: Any = None,
        on_latents: OnLatents | None = None,
    ) -> Stream:
        """A video without an end, a chunk of latent frames at a time; memory does not grow with its length.

        Args:
            prompt: what to show, or a list: one video for each side by side, in blocks [B, F, H, W, 3].
            remember: what later chunks see of one. "steps": what it was at their own noise level. As long as the prompt
                stays, frames are then those that a call makes of the same seed, for every number of frames that is
                whole chunks. A noise level from 0 to below 1: the finished chunk, with so much noise; memory is that
                of one step. When not given, as the model was trained.
            first_chunk_steps: of the first chunk, where it is to have more steps than the others: most is decided
                there. Only with ``remember`` a level.
            beginning: frames that the stream goes on from, uint8 [F, H, W, 3]; of its size, and so many that
                they are whole chunks: of chunks of 3 latent frames 9, 21, 33, … Its own frames come after these. For a
                list of prompts one for each, [B, F, H, W, 3]. Or one prompt's as the path of a video, whose last
                frames are taken, scaled and cropped.
            image: as for a call; of a model that takes no images the first frame, finished: the frames that follow it
                in the first chunk are made with it in sight. A model that needs one takes a beginning's first frame.
            on_latents: shown each chunk's latents before they are decoded, as for a call; it returns None.

        Other arguments as for a call.

        Raises:
            RehyatError: a block of the transformer prevents it (the message names it); an impossible size, number or
                seed; a beginning of another size or length; a file that is no video or picture.
        """
        check_callable(on_latents)
        chunk = 1 + self.vae.config.temporal_factor * (self.transformer.chunk_frames() - 1)
        settings = self.settings(
            num_frames=chunk,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            schedule=schedule,
            solver=solver,
            remember=remember,
            first_chunk_steps=first_chunk_steps,
        )
        size = {"height": settings.height, "width": settings.width}
        if isinstance(beginning, str | os.PathLike):
            factor = self.vae.config.temporal_factor
            each = self.transformer.chunk_frames() * factor
            path = arguments.user_path("beginning", beginning)
            beginning = read_beginning(
                path,
                fps=self.fps,
                most=lambda frames: max(0, (frames + factor - 1) // each * each - factor + 1),
                **size,
            )
        stream = self.start_stream(
            prompt,
            settings,
            negative_prompt=given_or(negative_prompt, self.defaults.negative_prompt),
            seed=seed,
            beginning=beginning,
            images=Images.read(image, None),
        )
        stream.on_latents = on_latents
        return stream

    def real_time_steps(self, prompt: str = "", **options: Any) -> MeasuredSteps:
        """The most denoising steps of the model's list (`Defaults.offered_steps`) with which this machine makes a
        stream as fast as it is shown; measured, compilation apart.

        Args:
            prompt, options: as for `open_stream`.

        Raises:
            RehyatError: as `open_stream`.
        """

        def opened(steps: int) -> Stream:
            return self.open_stream(prompt, **options | {"num_inference_steps": steps})

        offered = self.defaults.offered_steps or (self.defaults.num_inference_steps,)
        return most_steps(opened, offered, fps=self.fps)

    def start_stream(
        self,
        prompt: str | list[str],
        settings: Settings,
        *,
        negative_prompt: str = "",
        seed: int = 0,
        beginning: Shaped[np.ndarray, "..."] | None = None,
        images: Images | None = None,
    ) -> Stream:
        """As `open_stream`, with settings resolved beforehand."""
        images, session = images or Images(), self.session(settings)
        conditioning, count = self._conditioning.of_stream(), len(prompt_list(prompt, negative_prompt))
        size = VideoSize.of(settings, count)
        if beginning is None:
            conditioning.check(images)
            condition = conditioning.condition(images, size, codec=session.codec)
        else:
            if images.first is not None:
                raise RehyatError("a stream begins with an image or goes on from a beginning, not both")
            frames = rows_of(beginning, one=isinstance(prompt, str))
            check_prefix(session, frames, batch=count)
            condition = conditioning.going_on(frames, size, codec=session.codec)
        stream = Stream.start(
            session,
            prompt,
            text=self.text,
            model=self._fingerprint,
            negative_prompt=negative_prompt,
            seed=seed,
            beginning=beginning,
            condition=condition,
        )
        stream.fps = self.fps
        return stream

    #: The same by the name that a loop reads well with: blocks of frames, for as long as one asks.
    stream = open_stream

    def resume_stream(self, folder: str | os.PathLike[str]) -> Stream:
        """A stream that `Stream.save` kept, in this or another process, where it stood.

        Raises:
            CheckpointError: there is none in the folder, it is damaged, or another model made it.
        """
        folder = arguments.user_path("folder", folder)

        def lasting(settings: Settings, count: int) -> Condition:
            size = VideoSize.of(settings, count)
            return self._conditioning.of_stream().lasting(size, codec=self.session(settings).codec)

        stream = Stream.resume(
            folder, session=self._session_of_saved, text=self.text, model=self._fingerprint, condition=lasting
        )
        stream.fps = self.fps
        return stream

    def _session_of_saved(self, settings: Settings) -> Session:
        """
        Raises:
            RehyatError: these are settings that `settings` would never give.
        """
        with warnings.catch_warnings(action="ignore"):
            if self.settings(**vars(settings)) != settings:
                raise RehyatError(f"this model makes no video of {settings.width}x{settings.height}")
        return self.session(settings)

    def _fingerprint(self) -> str:
        return fingerprint(self.transformer, self.vae, self.decoder)
