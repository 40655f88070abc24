"""From a sentence to a video, number for number as diffusers' ``WanPipeline`` makes it.

huggingface/diffusers ``src/diffusers/pipelines/wan/pipeline_wan.py`` is what it is measured against.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from rehyat_jax.adapters.loading import HasLoras
from rehyat_jax.adapters.merging import Merged
from rehyat_jax.errors import CheckpointError, RehyatError
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.checkpoints.loading import (
    MergedExperts,
    Quantize,
    load_preview_decoder,
    load_vae,
    open_denoiser,
)
from rehyat_jax.models.clip.features import ImageFeatures
from rehyat_jax.models.folder import Defaults, Traits, find_model, read_defaults, read_scheduler, read_traits
from rehyat_jax.models.own_settings import OwnSettings, given_or
from rehyat_jax.models.wan.conditions import Features, VideoSize, conditioning_of
from rehyat_jax.models.wan.sharding import check_mesh, checked_vae_devices, devices_for
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.models.whole import push_model, save_model
from rehyat_jax.runtime import arguments
from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
from rehyat_jax.runtime.devices import ONE_DEVICE, Devices, PictureDevices
from rehyat_jax.runtime.eight_bits import eight_bits_of
from rehyat_jax.runtime.mesh_config import MeshConfig, VaeDevices
from rehyat_jax.runtime.notebook import NotebookProgress, in_notebook, not_shown
from rehyat_jax.runtime.record import Phases
from rehyat_jax.sampling import FlowSchedule, Solver
from rehyat_jax.sampling.codec import Codec, Decoder, Pixels, check_decoder, moved, to_float, to_uint8
from rehyat_jax.sampling.experts import Experts
from rehyat_jax.sampling.noise import initial_noise, video_keys
from rehyat_jax.sampling.session import Session, prompt_list
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.shown import OnLatents, check_callable
from rehyat_jax.sampling.tiles import TiledCodec
from rehyat_jax.streams.opening import OpensStreams
from rehyat_jax.text.prompt_encoder import PromptEncoder
from rehyat_jax.video.images import Images

#: Called as (phase, steps done, steps in all), from 0 on; phases are "text", "denoise", "decode".
OnStep = Callable[[str, int, int], None]


class TextToVideo(HasLoras, OpensStreams):
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
        picture: the devices that these two are put on.

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
        picture: PictureDevices | None = None,
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
        if picture is not None:
            vae, decoder = moved(vae, picture), decoder and moved(decoder, picture)
        self.vae, self.text, self.decoder, self.picture = vae, text, decoder, picture
        self.schedule, self.solver, self.defaults = schedule, solver, defaults
        self._weights, self._vae_tile = weights, vae_tile
        if vae_tile is not None:
            TiledCodec(vae, tile=arguments.whole_number("vae_tile", vae_tile, least=1))
        self.devices = devices

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
        vae_devices: VaeDevices | None = None,
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
            vae_devices: the autoencoder's own devices, so many after those of ``mesh``: a stream's frames are decoded
                there while its next chunk is made. "mesh": those of ``mesh``, once the latents are made. Of several
                each has some rows and columns of the picture. When not given, the first device.

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
        vae_devices = checked_vae_devices(vae_devices, mesh, vae_tile=vae_tile)
        quantize = eight_bits_of(quantize)
        folder = find_model(name_or_path)
        cache = cache_folder(cache_dir)
        keep_compiled(cache)
        student = hybrid == "auto"
        schedule, solver = read_scheduler(folder, student=student)
        traits = read_traits(folder)
        devices = ONE_DEVICE if offload and mesh is None else devices_for(mesh, folder, hybrid=hybrid, vae=vae_devices)
        picture = PictureDevices.of(vae_devices, beside=devices)
        how: dict[str, Any] = {"dtype": dtype, "hybrid": hybrid, "loras": loras, "quantize": quantize}
        how["mesh"] = devices.mesh
        how["offload"] = offload
        transformer, weights = open_denoiser(folder, boundary_ratio=traits.boundary_ratio, **how)
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
            picture=picture,
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
            on_latents: called after each step with a `rehyat_jax.sampling.shown.LatentsSeen` (diffusers'
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

    def decode(self, latents: Float[Array | np.ndarray, "B T h w z"]) -> UInt8[np.ndarray, "B F H W 3"]:
        """Frames of latents as the transformer has them, such as ``on_latents`` is shown; of a preview decoder, if
        there is one.

        Raises:
            RehyatError: they are no array of five axes, or have another number of channels.
        """
        if not isinstance(latents, np.ndarray | Array) or latents.ndim != 5 or not latents.shape[1]:
            raise arguments.wrong("latents", latents, "an array [B, T, h, w, z]")
        codec = Codec(self.vae, decoder=self.decoder, devices=self.picture)
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
            picture=self.picture,
        )

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
        check_callable(on_latents)
        images = images or Images()
        self._conditioning.check(images)
        session = self.session(settings)
        prompts = prompt_list(prompt, negative_prompt)
        by_chunks = settings.draws_noise and self.transformer.why_not_stream() is None
        if self.devices.mesh is not None and not by_chunks:
            hybrid = getattr(self.transformer, "hybrid", None)
            check_mesh(self.devices.shape, self.transformer.config, hybrid=hybrid, latent_frames=session.shape[0])
        own = noise is None
        noise = initial_noise(session.shape, count=len(prompts), seed=seed, noise=noise)
        if settings.draws_noise and not own:
            raise RehyatError(
                f"the solver {type(settings.solver).__name__} draws its own noise: give a seed in its place"
            )
        measure: Callable[[str], AbstractContextManager[None]] = phases.measure if phases else lambda _: nullcontext()
        on_step = on_step or (NotebookProgress() if in_notebook() else not_shown)

        with measure("text"):
            text = session.embed(self.text, prompts, negative_prompt, on_prompt=partial(on_step, "text"))
            size = VideoSize.of(settings, len(prompts))
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


_PIXELS: dict[str, Pixels] = {"uint8": to_uint8, "float": to_float}
