"""A session: a model and its settings made ready to sample, once; all that makes video asks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime import arguments
from rehyat_jax.runtime.devices import ONE_DEVICE, Devices, PictureDevices
from rehyat_jax.runtime.mesh import mesh_in_force
from rehyat_jax.runtime.platform import platform, precision
from rehyat_jax.sampling import programs, rollout
from rehyat_jax.sampling.chunks import Chunks
from rehyat_jax.sampling.codec import Codec
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.experts import Experts
from rehyat_jax.sampling.noise import Shape
from rehyat_jax.sampling.rollout import Sampler, States
from rehyat_jax.sampling.schedule import SamplingSteps
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.sampling.shown import LatentsSeen, OnLatents
from rehyat_jax.sampling.text import trimmed
from rehyat_jax.sampling.tiles import TiledCodec

#: A prompt's embedding.
Embed: TypeAlias = Callable[[str], Float[Array, "1 L D"]]


def prompt_list(prompt: Any, negative_prompt: Any) -> list[str]:
    """One prompt as a list of one, several as they are.

    Raises:
        RehyatError: it is neither a text nor a list of texts, or the negative prompt is no text.
    """
    arguments.text("negative_prompt", negative_prompt)
    return arguments.texts("prompt", prompt)


class Session:
    """The networks as they are now, split into graphs and weights; the geometry of latents and chunks; the compiled
    programs. Float32 is computed as float32, whatever the platform's default.

    Args:
        transformer: a `rehyat_jax.sampling.rollout.Transformer`, or several by noise level.
        vae: a `rehyat_jax.sampling.codec.Autoencoder`.
        settings: every value resolved.
        devices: over which the transformer's weights are sharded, and which its programs run on. What goes in and comes
            out (noise, texts, latents) is on this process's default device; a stream's states stay sharded.
        vae_tile: frames are decoded by tiles of so many pixels a side (`rehyat_jax.sampling.tiles`).
        decoder: a `rehyat_jax.sampling.codec.Decoder` in the place of the autoencoder's.
        picture: the autoencoder's devices, on which its weights lie, and the decoder's.
    """

    def __init__(
        self,
        *,
        transformer: Any,
        vae: Any,
        settings: Settings,
        devices: Devices = ONE_DEVICE,
        vae_tile: int | None = None,
        decoder: Any = None,
        picture: PictureDevices | None = None,
    ) -> None:
        self.settings, compute = settings, transformer.dtype
        self.codec = Codec(vae, decoder=decoder, compute=compute, devices=picture)
        if vae_tile is not None:
            self.codec = TiledCodec(vae, tile=vae_tile, decoder=decoder, compute=compute)
        self.devices = devices
        #: Whether frames are decoded on devices that have no part in the latents.
        self.decodes_apart = picture is not None and picture.apart
        self._transformer = transformer
        self._experts = transformer if isinstance(transformer, Experts) else Experts.of_one(transformer)
        # Both of guidance's evaluations in one batch where a batch is sharded, else in the memory of one.
        forward: dict[str, Any] = {"forward": "one"} if devices.batch_pieces > 1 else {}
        self.samplers = tuple(
            Sampler(
                solver=settings.solver,
                guidance=dataclasses.replace(guidance, **forward),
                context_noise=settings.remember,
                noise_scale=settings.schedule.noise_scale,
            )
            for guidance in settings.guidances[: len(self._experts.members)]
        )

    @property
    def graph(self) -> Any:
        """Of the transformer: of several, the one of the highest noise level."""
        return self._experts.at(1000.0).graph

    @property
    def weights(self) -> Any:
        """As `graph`."""
        return self._experts.at(1000.0).weights

    @property
    def sampler(self) -> Sampler:
        """As `graph`."""
        return self.samplers[0]

    @cached_property
    def steps(self) -> SamplingSteps:
        """On the devices."""
        return self.devices.replicate(jax.tree.map(jnp.asarray, self.settings.steps()))

    @cached_property
    def first_chunk_steps(self) -> SamplingSteps:
        """As `steps`: of a stream's first chunk, where it has more."""
        return self.devices.replicate(jax.tree.map(jnp.asarray, self.settings.steps(of_first_chunk=True)))

    def _steps_from(self, first_frame: Int[Array, ""]) -> SamplingSteps:
        more = (self.settings.first_chunk_steps or 0) > self.settings.num_inference_steps
        return self.first_chunk_steps if more and not int(first_frame) else self.steps

    @property
    def shape(self) -> Shape:
        """Of the latents of the settings' video."""
        size = self.settings
        return self.codec.latent_shape(num_frames=size.num_frames, height=size.height, width=size.width)

    @cached_property
    def _chunks(self) -> Chunks:
        steps = self.settings.steps(), self.settings.steps(of_first_chunk=True)  # on the host: `init_state` is traced
        return Chunks(self._experts, self.samplers, steps=steps[0], first_steps=steps[1])

    @property
    def decodes_beside(self) -> bool:
        """Whether frames and the next chunk's latents are sooner made at once than one after the other: by devices of
        their own, or by a CPU, whose cores neither fills alone."""
        return self.decodes_apart or (self.devices.mesh is None and platform() == "cpu")

    @property
    def takes_rows(self) -> bool:
        """Whether `denoise_chunks` is for it: one transformer takes all steps, and whole frames are decoded."""
        return self._chunks.alone and self.codec.takes_rows

    @cached_property
    def chunk_shape(self) -> Shape:
        """Of a chunk's latents.

        Raises:
            RehyatError: the transformer cannot stream.
        """
        return self._transformer.chunk_frames(), *self.shape[1:]

    @property
    def text_dim(self) -> int:
        """Width of a prompt's embedding."""
        return self._transformer.config.text_dim

    @property
    def evaluations(self) -> int:
        """Embeddings of each video: the prompt's and, where it counts, the negative prompt's."""
        return max(sampler.guidance.evaluations for sampler in self.samplers)

    def embed(
        self,
        text: Embed,
        prompts: Sequence[str],
        negative_prompt: str,
        *,
        on_prompt: Callable[[int, int], None] = lambda done, total: None,
    ) -> Float[Array, "evaluations B L D"]:
        """The prompts' embeddings and, where it counts, the negative prompt's for each of them.

        Args:
            on_prompt: called with the embeddings made and all that there are.
        """
        wanted, rows = [*prompts, negative_prompt] if self.evaluations > 1 else list(prompts), []
        on_prompt(0, len(wanted))
        with precision(self._transformer.dtype):
            for done, prompt in enumerate(wanted, start=1):
                rows.append(text(prompt))
                on_prompt(done, len(wanted))
            evaluations = [jnp.concatenate(rows[: len(prompts)])]
            if len(rows) > len(prompts):
                evaluations.append(jnp.repeat(rows[-1], len(prompts), axis=0))
            return jnp.stack(evaluations)

    def denoise(
        self,
        noise: Float[Array, "B T h w z"],
        text: Float[Array, "evaluations B L D"],
        condition: Condition | None = None,
        keys: Key[Array, " B"] | None = None,
        *,
        on_step: Callable[[int, int], None] = lambda done, total: None,
        on_latents: OnLatents | None = None,
    ) -> Float[Array, "B T h w z"]:
        """The latents of whole videos, all frames at each step.

        Args:
            keys: of the noise that a stochastic solver takes on the way.
            on_step: called with the steps done and all that there are.
        """
        short, noise, condition = self.devices.replicate((trimmed(text), noise, condition or Condition()))
        keys = None if keys is None else self.devices.replicate(keys)
        with self.computing():

            def advance(state: Any, step: SamplingSteps) -> Any:
                expert = self._experts.at(float(step.timestep))
                sampler = self.samplers[expert.number]
                return programs.denoise_step(
                    expert.weights, state, step, short, condition, keys, graph=expert.graph, sampler=sampler
                )

            steps, solver = self.settings.steps(), self.sampler.solver
            total = len(steps.timestep)
            on_step(0, total)
            latents = rollout.per_step(
                advance,
                self.sampler.scaled(noise),
                steps=steps,
                solver=solver,
                on_step=lambda done: on_step(done, total),
                on_latents=on_latents,
            )
            return self.devices.local(condition.finished(latents))

    def denoise_by_chunks(
        self,
        keys: Key[Array, " B"],
        text: Float[Array, "evaluations B L D"],
        condition: Condition | None = None,
        *,
        on_chunk: Callable[[int, int], None] = lambda done, total: None,
        on_latents: OnLatents | None = None,
    ) -> Float[Array, "B T h w z"]:
        """The latents of whole videos, one chunk after the other, as streams make them.

        Args:
            on_chunk: called with the chunks done and all that there are.

        Raises:
            RehyatError: the transformer cannot stream.
        """
        frames, chunk = self.shape[0], self.chunk_shape[0]
        states, text_kv, parts = self.init_state(len(keys)), self.precompute_text_kv(text, condition), []
        total = -(-frames // chunk)
        on_chunk(0, total)
        for number in range(total):
            first_frame = jnp.asarray(number * chunk, jnp.int32)
            latents, states = self.denoise_chunk(states, keys, text_kv, first_frame, condition)
            parts.append(jax.block_until_ready(latents))
            self.show(latents, first_frame=number * chunk, to=on_latents)
            on_chunk(number + 1, total)
        return jnp.concatenate(parts, axis=1)[:, :frames]

    def show(self, latents: Float[Array, "B T h w z"], *, first_frame: int, to: OnLatents | None) -> None:
        """A finished chunk's latents, to whoever asked for them.

        Raises:
            RehyatError: others are returned.
        """
        if to is None:
            return
        more = (self.settings.first_chunk_steps or 0) if not first_frame else 0
        steps = max(self.settings.num_inference_steps, more)
        if to(LatentsSeen(np.array(latents), first_frame=first_frame, step=steps, steps=steps)) is not None:
            raise RehyatError("on_latents must return None here: later chunks have seen this one as it is")

    def init_state(self, batch: int) -> States:
        """The transformer's states before the first chunk of so many videos (of several transformers, each one's).

        Raises:
            RehyatError: the transformer cannot stream.
        """
        _, height, width, _ = self.shape

        def made() -> States:
            return self._chunks.init_state(batch, height=height, width=width)

        if self.devices.mesh is None or mesh_in_force() is not None:
            return made()
        with self.computing():  # as one program, which makes on each device what is its own
            return jax.jit(made)()

    def placed(self, states: Any) -> States:
        """States of the host, on the devices as `init_state`' are."""
        if self.devices.mesh is None:
            return jax.tree.map(jnp.asarray, states)
        with self.computing():
            return self.devices.placed(states, self._chunks.state_specs(states))

    def computing(self) -> AbstractContextManager[Any]:
        """In which programs of the transformer run."""
        stack = ExitStack()
        stack.enter_context(precision(self._transformer.dtype))
        stack.enter_context(self.devices.in_force())
        return stack

    def init_decoder(self, batch: int) -> Any:
        """The decoder's state before the first latent frame of so many videos."""
        _, height, width, _ = self.shape
        return self.codec.init_state(batch, height=height, width=width)

    def precompute_text_kv(self, text: Float[Array, "evaluations B L D"], condition: Condition | None = None) -> Any:
        """The prompts as `denoise_chunk` and `commit_chunk` take them, and the image features of the condition."""
        given = self.devices.replicate((trimmed(text), None if condition is None else condition.image))
        with self.computing():
            return self._chunks.precompute_text_kv(*given)

    def denoise_chunk(
        self,
        states: States,
        keys: Key[Array, " B"],
        text_kv: Any,
        first_frame: Int[Array, ""],
        condition: Condition | None = None,
    ) -> tuple[Float[Array, "B T h w z"], States]:
        """The latents of the next chunk, and the states after it; ``states`` is donated, ``condition`` is the
        video's."""
        steps = self._steps_from(first_frame)
        given = self.devices.replicate((keys, first_frame, self._of_chunk(condition, first_frame)))
        with self.computing():
            latents, states = self._chunks.denoise(
                states,
                given[0],
                text_kv,
                given[1],
                steps,
                given[2],
                shape=self.chunk_shape,
            )
        # What is decoded elsewhere goes there from the device, so that nobody waits for it here.
        return (self.devices.one_of(latents) if self.decodes_apart else self.devices.local(latents)), states

    def _of_chunk(self, condition: Condition | None, first_frame: Int[Array, ""]) -> Condition:
        return Condition() if condition is None else condition.chunk(first_frame, self.chunk_shape[0])

    def denoise_chunks(
        self, states: tuple[States, ...], rows: tuple[programs.Row, ...]
    ) -> tuple[Float[Array, "rows B T h w z"], tuple[States, ...]]:
        """As `denoise_chunk`, the next chunk of each of several streams, none of which stands at its first."""
        rows = tuple(
            row._replace(keys=self.devices.replicate(row.keys), first_frame=self.devices.replicate(row.first_frame))
            for row in rows
        )
        with self.computing():
            latents, states = programs.denoise_chunks(
                self.weights,
                states,
                rows,
                self.steps,
                graph=self.graph,
                shape=self.chunk_shape,
                sampler=self.sampler,
            )
        return self.devices.local(latents), states

    def is_as(self, other: Session) -> bool:
        """Whether the other makes the same of the same state: equal settings, and weights that are the same arrays."""
        if self is other:
            return True
        if (
            self.settings != other.settings
            or self.devices.mesh != other.devices.mesh
            or self.graph != other.graph
            or not self.codec.is_as(other.codec)
        ):
            return False
        mine, others = (jax.tree.leaves(s.weights) for s in (self, other))
        return all(a is b for a, b in zip(mine, others, strict=True))

    def commit_chunk(
        self,
        states: States,
        latents: Float[Array, "B T h w z"],
        keys: Key[Array, " B"],
        text_kv: Any,
        first_frame: Int[Array, ""],
        condition: Condition | None = None,
    ) -> States:
        """The states after a chunk that is given; ``states`` is donated, ``condition`` is the video's."""
        seen = self._of_chunk(condition, first_frame)
        latents, keys, first_frame, seen = self.devices.replicate((latents, keys, first_frame, seen))
        with self.computing():
            return self._chunks.commit(states, latents, keys, text_kv, first_frame, self.steps, seen)
