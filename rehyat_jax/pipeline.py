"""From a sentence to a video, number for number as diffusers' ``WanPipeline`` makes it.

huggingface/diffusers ``src/diffusers/pipelines/wan/pipeline_wan.py`` is what it is measured against.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from rehyat_jax.adapters.loading import HasLoras
from rehyat_jax.adapters.merging import Merged
from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.checkpoints.loading import (
    MergedExperts,
    Quantize,
    load_preview_decoder,
    load_vae,
    open_experts,
    open_transformer,
)
from rehyat_jax.models.clip.features import ImageFeatures
from rehyat_jax.models.folder import Defaults, Traits, find_model, read_defaults, read_scheduler, read_traits
from rehyat_jax.models.memory import student_config
from rehyat_jax.models.own_settings import OwnSettings, given_or
from rehyat_jax.models.wan.conditions import Features, VideoSize, conditioning_of
from rehyat_jax.models.wan.sharding import check_mesh, mesh_for_video
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.models.whole import push_model, save_model
from rehyat_jax.runtime import arguments
from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
from rehyat_jax.runtime.devices import ONE_DEVICE, Devices
from rehyat_jax.runtime.eight_bits import eight_bits_of
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.runtime.notebook import NotebookProgress, in_notebook, not_shown
from rehyat_jax.runtime.record import Phases
from rehyat_jax.sampling import FlowSchedule, Solver
from rehyat_jax.sampling.codec import Codec, Decoder, Pixels, check_decoder, to_float, to_uint8
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.experts import Experts
from rehyat_jax.sampling.noise import ChunkNoise, Shape, video_keys
from rehyat_jax.sampling.rollout import ContextNoise, OnLatents
from rehyat_jax.sampling.session import Session, prompt_list
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.tiles import TiledCodec
from rehyat_jax.streams.pace import MeasuredSteps, most_steps
from rehyat_jax.streams.prefill import check_prefix, rows_of
from rehyat_jax.streams.state import fingerprint
from rehyat_jax.streams.stream import Stream
from rehyat_jax.text.prompt_encoder import PromptEncoder
from rehyat_jax.video.beginning import read_beginning
from rehyat_jax.video.images import Images

#: Called as (phase, steps done, steps in all), from 0 on; phases are "text", "denoise", "decode".
OnStep = Callable[[str, int, int], None]


class TextToVideo(HasLoras):
    """Text to video: a prompt encoder, a diffusion transformer, a video autoencoder, and how to run them.

    Args:
        transformer, vae, text: the three networks, of transformers also two by noise level; the text part turns prompts
            into [B, 512, text_dim].
        schedule, solver: the noise levels and the solver, unless a call names others.
        defaults: sizes, steps and guidance, unless a call names others.
        weights: the transformer's on disk, from which it is had with other LoRAs; without them it has those it has.
        traits: how the networks work together.
        image_features: of images, for transformers that attend to them.
        devices: over which the transformer is sharded.
        vae_tile: frames are decoded by tiles of so many pixels a side, with blended seams.
        decoder: decodes in the autoencoder's place, a smaller one of the same latents.

    Raises:
        CheckpointError: the parts do not fit each other.
    """

    def __init__(
        self,
        *,
        transformer: WanTransformer | Experts,
        vae: WanVAE,
        text: PromptEncoder,
        schedule: FlowSchedule,
        solver: Solver,
        defaults: Defaults,
        weights: Merged | MergedExperts | None = None,
        traits: Traits | None = None,
        image_features: Features | None = None,
        devices: Devices = ONE_DEVICE,
        vae_tile: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.traits = traits or Traits()
        self._conditioning = conditioning_of(
            transformer.config,
            vae.config,
            clean_first_frame=self.traits.clean_first_frame,
            features=image_features,
        )
        if text.text_dim != transformer.config.text_dim:
            raise CheckpointError(
                f"the transformer takes text of {transformer.config.text_dim} features, the encoder has {text.text_dim}"
            )
        #: Of two experts, what stands for both.
        self.transformer: Any = transformer
        if decoder is not None:
            check_decoder(vae, decoder)
        self.vae, self.text, self.decoder = vae, text, decoder
        self.schedule, self.solver, self.defaults = schedule, solver, defaults
        self._weights, self._vae_tile = weights, vae_tile
        if vae_tile is not None:
            TiledCodec(vae, tile=arguments.whole_number("vae_tile", vae_tile, least=1))
        self.devices = devices

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

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: DTypeLike = jnp.float32,
        hybrid: Conversion | Literal["auto"] | None = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        repair_prompts: bool = True,
        loras: Iterable[Any] = (),
        quantize: Quantize | None = None,
        mesh: MeshConfig | None = None,
        offload: bool = False,
        vae_tile: int | None = None,
        decoder: str | os.PathLike[str] | None = None,
    ) -> TextToVideo:
        """A bundled model by name, or a folder in the diffusers or the original layout.

        The text encoder (the largest part of Wan) is read when a prompt is first met that the cache does not hold.

        Args:
            name_or_path: "mini-sprites", a folder, or "hf:OWNER/NAME" to fetch one (needs huggingface_hub).
            dtype: float32, bfloat16 or float16, of the transformer and the text encoder. The autoencoder runs in
                float32, as diffusers advises for Wan.
            hybrid: "auto": the transformer as the folder has it. ``None``: the softmax teacher alone. A configuration:
                the teacher with these blocks converted anew, so that any checkpoint can be streamed.
            cache_dir: folder of compiled programs and prompt embeddings; ``None``: $REHYAT_CACHE_DIR, else the user's
                cache folder. One that cannot be written is done without.
            repair_prompts: have ftfy repair prompts (curly quotes, full-width letters, …), as Wan's own code does.
            loras: as `load_lora` takes them one by one: paths, pairs of a path and a strength, or texts
                ``[high:|low:]FILE[:strength]``.
            quantize: "int8", "int8-weights" or "fp8": the matrices of the transformer's and the text encoder's blocks
                are kept so on the device; with "int8" the transformer's products are made in int8. An
                `rehyat_jax.EightBits` says also which layers are left out.
            mesh: the devices to generate on: the transformer and the text encoder are sharded over them while they are
                read, so that none holds the whole (`rehyat_jax.MeshConfig`). Fewer than there are: the first of them.
                ``automatic``: all, divided as suits streams, or whole videos of the model's own size if it makes none.
            offload: for a device with little memory: the transformer's and the text encoder's blocks stay in the host's
                memory and are fetched one at a time, and the text encoder leaves when a prompt is embedded. Slower.
            vae_tile: for little memory as well: frames are decoded by tiles of so many pixels a side (256 as in
                diffusers), a quarter of which goes over into the next one's.
            decoder: a TAEHV file (``taew2_1``, of Wan2.2's 5B ``taew2_2``) that decodes in the autoencoder's place:
                coarser frames, in a tenth of the memory.

        Raises:
            CheckpointError, ConfigError: no such model, or one that cannot be used; a mesh that does not divide the
                model or the devices.
        """
        dtype = arguments.float_dtype("dtype", dtype, ("float32", "bfloat16", "float16"))
        if decoder is not None:
            decoder = arguments.user_path("decoder", decoder)
        if not isinstance(repair_prompts, bool):
            raise arguments.wrong("repair_prompts", repair_prompts, "True or False")
        if cache_dir is not None:
            cache_dir = arguments.user_path("cache_dir", cache_dir)
        if hybrid not in ("auto", None) and not isinstance(hybrid, Conversion):
            raise arguments.wrong("hybrid", hybrid, '"auto", None or a HybridConfig')
        if mesh is not None and not isinstance(mesh, MeshConfig):
            raise arguments.wrong("mesh", mesh, "a MeshConfig")
        quantize = eight_bits_of(quantize)
        folder = find_model(name_or_path)
        cache = cache_folder(cache_dir)
        keep_compiled(cache)
        student = hybrid == "auto"
        schedule, solver = read_scheduler(folder, student=student)
        traits = read_traits(folder)
        devices = ONE_DEVICE if offload and mesh is None else _devices(mesh, folder, hybrid)
        how: dict[str, Any] = {"dtype": dtype, "hybrid": hybrid, "loras": loras, "quantize": quantize}
        how["mesh"] = devices.mesh
        how["offload"] = offload
        transformer: Any
        weights: Merged | MergedExperts
        if traits.boundary_ratio is None:
            transformer, weights = open_transformer(folder, **how)
        else:
            transformer, weights = open_experts(folder, boundary_ratio=traits.boundary_ratio, **how)
        return cls(
            transformer=transformer,
            weights=weights,
            vae=load_vae(folder),
            text=PromptEncoder(
                folder,
                dtype=dtype,
                cache=cache and cache / "prompts",
                repair=repair_prompts,
                quantize=quantize,
                mesh=devices.mesh,
                offload=offload,
            ),
            schedule=schedule,
            solver=solver,
            defaults=read_defaults(folder, student=student),
            traits=traits,
            image_features=ImageFeatures(folder) if transformer.config.image_dim is not None else None,
            devices=devices,
            vae_tile=vae_tile,
            decoder=None if decoder is None else load_preview_decoder(decoder),
        )

    def __repr__(self) -> str:
        size = self.defaults
        return (
            f"TextToVideo({self.text.folder.name!r}: {self.transformer!r}, {size.width}x{size.height}, "
            f"{size.num_inference_steps} steps)"
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model in the diffusers layout, its transformer as it is now: `from_pretrained` reads it again.

        Args:
            folder: new or empty; it appears whole or not at all.

        Raises:
            CheckpointError: the folder it was read from is gone, or the new one cannot be written.
        """
        save_model(self.text.folder, self.transformer, folder)

    def push_to_hub(self, repository: str, *, private: bool | None = None, message: str | None = None) -> str:
        """Put what `save_pretrained` writes into a repository of the Hugging Face hub, as the user who is logged in
        there; needs huggingface_hub (``rehyat-jax[hub]``).

        Args:
            repository: "OWNER/NAME"; made if need be.
            private: of a repository that is made; the owner's default when not given.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: huggingface_hub is not installed, or the hub refuses.
        """
        return push_model(self.text.folder, self.transformer, repository, private=private, message=message)

    def __call__(
        self,
        prompt: str | list[str],
        *,
        image: Any = None,
        last_image: Any = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | int | None = None,
        guidance_scale_2: float | int | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        noise: Float[Array | np.ndarray, "B T h w z"] | None = None,
        schedule: FlowSchedule | None = None,
        solver: Solver | None = None,
        output: Literal["uint8", "float"] = "uint8",
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> UInt8[np.ndarray, "*B F H W 3"] | Float[np.ndarray, "*B F H W 3"]:
        """Make a video from a prompt, or one from each of a list.

        Args:
            prompt: what to show. Beyond 512 tokens it is cut.
            image, last_image: what the video begins and ends with, for models that take images: uint8 [H, W, 3], a PIL
                image, or a file's path. One of another shape than the video is cropped, with a warning.
            num_frames: cut to 4k + 1, with a warning.
            height, width: in pixels; cut to multiples of what a token covers (16 in Wan), with a warning.
            num_inference_steps: evaluations of the transformer (twice that with guidance).
            guidance_scale: of classifier-free guidance; 1 or less: none.
            guidance_scale_2: of the low-noise expert, for models of two; ``guidance_scale`` when that alone is given.
            negative_prompt: what guidance leads away from; when not given, the model's own.
            seed: of the initial noise, 0 to 2³² − 1; the i-th prompt of a list gets the noise of ``seed + i``.
            noise: the initial noise itself, standard normal, channels last.
            schedule, solver: others than the model's own.
            output: "uint8", or "float" for 0..1 in float32 (diffusers' ``output_type="np"``).
            on_step: called as (phase, done, total) with the phases "text", "denoise", "decode"; in a notebook, a bar
                when not given.
            on_latents: called after each step with a `rehyat_jax.sampling.rollout.LatentsSeen` (diffusers'
                ``callback_on_step_end``): the latents as they are, for `decode` to show or to be kept; what it returns,
                if anything, takes their place. A model that makes its videos chunk by chunk (a few-step student) shows
                each finished chunk, which stays as it is.

        Returns:
            The video [F, H, W, 3]; for a list of prompts [B, F, H, W, 3].

        Raises:
            RehyatError: an impossible size, number, seed or noise.
        """
        settings = self.settings(
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            schedule=schedule,
            solver=solver,
        )
        return self.run(
            prompt,
            settings,
            negative_prompt=given_or(negative_prompt, self.defaults.negative_prompt),
            seed=seed,
            noise=noise,
            images=Images.read(image, last_image),
            output=output,
            on_step=on_step,
            on_latents=on_latents,
        )

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
        _check_callable(on_latents)
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
        size = _video_size(settings, count)
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
            size = _video_size(settings, count)
            return self._conditioning.of_stream().lasting(size, codec=self.session(settings).codec)

        stream = Stream.resume(
            folder, session=self._session_of_saved, text=self.text, model=self._fingerprint, condition=lasting
        )
        stream.fps = self.fps
        return stream

    def decode(self, latents: Float[Array | np.ndarray, "B T h w z"]) -> UInt8[np.ndarray, "B F H W 3"]:
        """Frames of latents as the transformer has them, such as ``on_latents`` is shown; of a preview decoder, if
        there is one.

        Raises:
            RehyatError: they are no array of five axes, or have another number of channels.
        """
        if not isinstance(latents, np.ndarray | Array) or latents.ndim != 5 or not latents.shape[1]:
            raise arguments.wrong("latents", latents, "an array [B, T, h, w, z]")
        codec = Codec(self.vae, decoder=self.decoder)
        frames = [np.asarray(each) for each, _ in codec.decode(jnp.asarray(latents, jnp.float32))]
        return np.concatenate(frames, axis=1)

    def session(self, settings: Settings) -> Session:
        """The networks as they are now, ready to sample with these settings."""
        return Session(
            transformer=self.transformer,
            vae=self.vae,
            settings=settings,
            devices=self.devices,
            vae_tile=self._vae_tile,
            decoder=self.decoder,
        )

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

    @property
    def own_settings(self) -> OwnSettings:
        """How the model is sampled where a call does not say."""
        return OwnSettings(
            transformer=self.transformer.config,
            vae=self.vae.config,
            defaults=self.defaults,
            schedule=self.schedule,
            solver=self.solver,
            two_experts=self.traits.boundary_ratio is not None,
        )

    def settings(self, **asked: Any) -> Settings:
        """What a call is made with; arguments and errors as `OwnSettings.settings`."""
        return self.own_settings.settings(**asked)

    def run(
        self,
        prompt: str | list[str],
        settings: Settings,
        *,
        negative_prompt: str = "",
        seed: int = 0,
        noise: Float[Array | np.ndarray, "B T h w z"] | None = None,
        images: Images | None = None,
        output: Literal["uint8", "float"] = "uint8",
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
        phases: Phases | None = None,
    ) -> UInt8[np.ndarray, "*B F H W 3"] | Float[np.ndarray, "*B F H W 3"]:
        """As a call, with settings resolved beforehand; ``phases`` takes times and memory."""
        arguments.choice("output", output, tuple(_PIXELS))
        if on_step is not None and not callable(on_step):
            raise arguments.wrong("on_step", on_step, "a function of a phase, the steps done and those in all")
        _check_callable(on_latents)
        images = images or Images()
        self._conditioning.check(images)
        session = self.session(settings)
        prompts = prompt_list(prompt, negative_prompt)
        by_chunks = settings.draws_noise and self.transformer.why_not_stream() is None
        if self.devices.mesh is not None and not by_chunks:
            hybrid = getattr(self.transformer, "hybrid", None)
            check_mesh(self.devices.shape, self.transformer.config, hybrid=hybrid, latent_frames=session.shape[0])
        own = noise is None
        noise = _noise(session.shape, count=len(prompts), seed=seed, noise=noise)
        if settings.draws_noise and not own:
            raise RehyatError(
                f"the solver {type(settings.solver).__name__} draws its own noise: give a seed in its place"
            )
        measure: Callable[[str], AbstractContextManager[None]] = phases.measure if phases else lambda _: nullcontext()
        on_step = on_step or (NotebookProgress() if in_notebook() else not_shown)

        with measure("text"):
            text = session.embed(self.text, prompts, negative_prompt, on_prompt=partial(on_step, "text"))
            size = _video_size(settings, len(prompts))
            condition = self._conditioning.condition(images, size, codec=session.codec)
        with measure("denoise"):
            keys = video_keys(seed, count=len(prompts)) if settings.draws_noise else None
            if by_chunks and keys is not None:
                latents = session.denoise_by_chunks(
                    keys, text, condition, on_chunk=partial(on_step, "denoise"), on_latents=on_latents
                )
            else:
                shown: dict[str, Any] = {"on_step": partial(on_step, "denoise"), "on_latents": on_latents}
                latents = session.denoise(noise, text, condition, keys, **shown)
        with measure("decode"):
            total, video = latents.shape[1], []
            on_step("decode", 0, total)
            for frames, _ in session.codec.decode(latents, pixels=_PIXELS[output]):
                video.append(np.asarray(frames))
                on_step("decode", len(video), total)
        whole = np.concatenate(video, axis=1)
        return whole[0] if isinstance(prompt, str) else whole


def _check_callable(on_latents: Any) -> None:
    """
    Raises:
        RehyatError: it can be called by nobody.
    """
    if on_latents is not None and not callable(on_latents):
        raise arguments.wrong("on_latents", on_latents, "a function of latents that are seen")


def _video_size(settings: Settings, count: int) -> VideoSize:
    return VideoSize(count=count, frames=settings.num_frames, height=settings.height, width=settings.width)


def _noise(
    shape: Shape, *, count: int, seed: int, noise: Float[Array | np.ndarray, "..."] | None
) -> Float[Array, "B T h w z"]:
    """What is given, checked, or the seeds' own."""
    if noise is None:
        return ChunkNoise(video_keys(seed, count=count)).initial(shape)
    if not isinstance(noise, np.ndarray | Array):
        raise arguments.wrong("noise", noise, "an array")
    if noise.shape != (count, *shape):
        raise RehyatError(f"the noise has shape {noise.shape}, and these settings need {(count, *shape)}")
    return jnp.asarray(noise, jnp.float32)


def _devices(mesh: MeshConfig | None, folder: Path, hybrid: Conversion | Literal["auto"] | None) -> Devices:
    """
    Raises:
        ConfigError: the mesh does not divide the model, or the devices that there are.
    """
    found = jax.device_count()
    if (found == 1 and (mesh is None or mesh.automatic)) or (mesh is None and jax.process_count() > 1):
        return ONE_DEVICE
    conversion = student_config(folder) if hybrid == "auto" else hybrid
    defaults = read_defaults(folder, student=hybrid == "auto")
    chosen = mesh_for_video(
        # One of several devices is a mesh too: kernels run where a program knows its devices.
        mesh or MeshConfig(fsdp=1),
        folder,
        hybrid=conversion,
        # Videos of other lengths are checked when they are asked for.
        frames=defaults.num_frames if mesh is not None and mesh.automatic else None,
        guided=defaults.guidance_scale > 1,
        streams=True,
        devices=found,
    )
    return Devices.first(chosen)


_PIXELS: dict[str, Pixels] = {"uint8": to_uint8, "float": to_float}
