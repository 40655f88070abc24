"""The diffusion transformer of Wan2.1 and Wan2.2.

Sources: Wan-Video/Wan2.1 ``wan/modules/model.py``; diffusers ``models/transformers/transformer_wan.py``.

Dtypes follow diffusers: layer norms, modulation and gated residuals in float32, the stream between them in the compute
dtype, the time embedder and modulation tables stored in float32 always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from rehyat_jax.adapters.linear import Linear
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.mixers.base import Mixer
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.wan.block import Block, TextKV, modulate, modulation_table
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.embedding import ConditionEmbedder
from rehyat_jax.models.wan.mixing import Mixing, scan_layers, take_parameters
from rehyat_jax.models.wan.positions import CosSin, rotary_embedding, timestep_embedding
from rehyat_jax.models.wan.remat import Keeps, rematerialised
from rehyat_jax.runtime.mesh import constrain_sharding, frames_on_devices
from rehyat_jax.runtime.offload import fetched, keep_on_host
from rehyat_jax.runtime.variables import described, kernel

_xavier = nnx.initializers.xavier_uniform()


class Embedded(NamedTuple):
    """A call's latents and times as the blocks take them, and what the last projection needs."""

    #: Tokens, time-major.
    x: Float[Array, "B N C"]
    #: Of all tokens (M = 1), or of each frame's.
    modulation: Float[Array, "B M 6 C"]
    rotary: CosSin
    time: Float[Array, "B M C"]
    #: Frames, rows, columns of tokens.
    grid: tuple[int, int, int]


class WanTransformer(nnx.Module):
    """Velocity of a noisy latent video under a text.

    The blocks are one module whose parameters have a leading axis of ``num_layers``; the forward pass scans over it.
    The mixers of the converted blocks are another, ``hybrid_blocks``, with a leading axis of these blocks, or a list of
    such where blocks have different mixers (`Mixing`): without it the model is the teacher, name by name.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        hybrid: Conversion | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """
        Raises:
            ConfigError: ``hybrid`` is not of a model of this depth.
        """
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        self.patch_embedding = nnx.Conv(
            config.in_channels,
            config.dim,
            config.patch_size,
            strides=config.patch_size,
            padding="VALID",
            kernel_init=_xavier,
            kernel_metadata=kernel(None, None, None, None, "width"),
            rngs=rngs,
            **kinds,
        )
        self.condition_embedder = ConditionEmbedder(config, rngs=rngs, **kinds)
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r, **kinds), in_axes=0, out_axes=0)(
            rngs.split(config.num_layers)
        )
        self.scale_shift_table = nnx.Param(modulation_table(rngs, 2, config.dim))
        out = config.out_channels * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.proj_out = Linear(
            config.dim,
            out,
            kernel_init=nnx.initializers.zeros_init(),
            kernel_metadata=kernel("width", None),
            rngs=rngs,
            **kinds,
        )
        # Last, so that a student's other parameters are the teacher's of the same seed.
        self.hybrid = hybrid
        self.mixing = Mixing.of(hybrid, config.num_layers)
        self.hybrid_blocks = nnx.data(self.mixing.make(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs))
        #: Whether the blocks stay in the host's memory (`keep_blocks_on_host`).
        self.offloaded = False

    def keep_blocks_on_host(self) -> None:
        """Of a model of shapes alone: its blocks will be filled into the host's memory, each to be fetched when the
        loop over blocks comes to it.

        Raises:
            ConfigError: the device cannot read the host's memory.
        """
        keep_on_host(self.blocks)
        self.offloaded = True

    def _here(self, layer: Any) -> Any:
        return fetched(layer) if self.offloaded else layer

    @property
    def converted(self) -> tuple[bool, ...]:
        """For each block: is it converted?"""
        return self.mixing.converted

    def with_hybrid(
        self,
        hybrid: Conversion | None,
        *,
        rngs: nnx.Rngs | None = None,
        blocks: Any = None,
    ) -> WanTransformer:
        """This model's teacher (the same arrays) with other hybrid blocks, or None.

        Args:
            rngs: initialise the hybrid blocks newly.
            blocks: where ``rngs`` is not given: whose parameters the hybrid blocks have; this model's by default, so
                that the chunks, the stabiliser or the implementation of a student can be changed.

        Raises:
            ConfigError: ``hybrid`` is not of a model of this depth, or the parameters do not fit it.
        """
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mixing = Mixing.of(hybrid, self.config.num_layers)
        if rngs is not None:
            made = mixing.make(self.config, **kinds, rngs=rngs)
        else:
            made = nnx.eval_shape(lambda: mixing.make(self.config, **kinds, rngs=nnx.Rngs(0)))
            if hybrid is not None and blocks is None and mixing.pattern != self.mixing.pattern:
                raise ConfigError("other blocks than this model's are to be hybrids: initialise them anew, with rngs")
            if hybrid is not None:
                take_parameters(made, self.hybrid_blocks if blocks is None else blocks)
        graph, state = nnx.split(self)
        # Whatever the teacher's kernels are kept as, and in variables of its own.
        student = nnx.merge(graph, jax.tree.map(lambda x: x, state))
        student.hybrid, student.mixing, student.hybrid_blocks = hybrid, mixing, nnx.data(made)
        return student

    def __call__(
        self,
        latents: Float[Array, "B T H W {self.config.in_channels}"],
        timesteps: Num[Array, "B *frames"],
        text: Float[Array, "B L {self.config.text_dim}"],
        *,
        text_tokens: int | None = None,
        image: Float[Array, "B I {self.config.image_dim}"] | None = None,
        remat: Keeps | None = None,
        unroll: bool = False,
    ) -> Float[Array, "B T H W {self.config.out_channels}"]:
        """The velocity (noise − video) in the compute dtype.

        On a mesh in force (`rehyat_jax.runtime.mesh`) the batch, time and heads are sharded over its devices; a video
        is padded at its end where its chunks do not divide by the devices, which changes nothing.

        Args:
            latents: normalised latents, channels last; T, H, W multiples of the patch.
            timesteps: diffusion time in 0…1000, whole or fractional: a video's, or [B, T], each latent frame's own (as
                Wan2.2's 5B, and diffusers with a time a token).
            text: the encoder's output, zero beyond the prompt.
            text_tokens: as many tokens as are attended to, zeros after ``text``'s (Wan: 512); by default those that it
                has. The zeros cost one token: the rest have its keys and values.
            image: features of one or two images, for models that attend to them.
            remat: for training: compute each block again in the backward pass, from its input and what is named.
            unroll: every block in the program in place of a loop over blocks. For training a small model: what a loop
                keeps for the backward pass is copied in and out of its arrays. The larger program compiles longer.

        Raises:
            RehyatError: T, H or W is not a multiple of the patch, or T of the chunk where time is sharded; there are
                not as many times as frames.
        """
        frames = latents.shape[1]
        chunk = self.config.patch_size[0] * self.mixing.whole_chunks
        padding = frames_on_devices(frames, chunk) - frames
        if timesteps.ndim == 2:
            timesteps = jnp.pad(timesteps, ((0, 0), (0, padding)), mode="edge")
        inputs = self.embed(jnp.pad(latents, ((0, 0), (0, padding), *[(0, 0)] * 3)), timesteps)
        embedded = self.embed_text(text, text_tokens)
        how = {"text_repeats": text_repeats(embedded.shape[1], text_tokens), "image": self.embed_image(image)}
        tokens = inputs.x.shape[1] * frames // (frames + padding)
        graph, layers = nnx.split(self.blocks)

        def step(mixer_graph: Any) -> Callable[..., tuple[Array, None]]:
            def layer(x: Array, params: tuple[Any, Any]) -> tuple[Array, None]:
                x, block = constrain_sharding(x, "batch", "time", None), nnx.merge(graph, self._here(params[0]))
                mixer = nnx.merge(mixer_graph, params[1])

                def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
                    return mixer(q, k, v, frame=inputs.grid[1] * inputs.grid[2], tokens=tokens), None

                return block.attending(x, embedded, inputs.modulation, inputs.rotary, attend, **how)

            return layer if remat is None else rematerialised(layer, remat, in_loop=self._loops and not unroll)

        graphs, mixers = zip(*map(nnx.split, self._mixers()), strict=True)
        x, _ = scan_layers(
            [step(g) for g in graphs], inputs.x, layers, mixers, pattern=self.mixing.pattern, unroll=unroll
        )
        return self.unembed(x, inputs)[:, :frames]

    def init_state(self, batch: int, height: int, width: int) -> Any:
        """The mixer states before a video's first chunk: every block's, stacked over a leading axis of layers.

        Its size depends on the batch and on the latents' height and width, and on no number of frames but the overlap.

        Raises:
            RehyatError: the model cannot stream, or height or width is not a multiple of the patch.
        """
        self._check_streams()
        _, rows, columns = self._grid((self.config.patch_size[0], height, width))

        def stacked(mixer: Mixer, blocks: int) -> Any:
            state = mixer.sharded(mixer.init_state(batch=batch, frame=rows * columns, dtype=self.dtype))
            return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (blocks, *x.shape)), state)

        counts = [len(self.mixing.blocks(mixer)) for mixer in self.mixing.groups]
        return self.mixing.joined([stacked(*each) for each in zip(self._mixers(), counts, strict=True)])

    def precompute_text_kv(
        self,
        text: Float[Array, "B L {self.config.text_dim}"],
        text_tokens: int | None = None,
        image: Float[Array, "B I {self.config.image_dim}"] | None = None,
    ) -> TextKV:
        """A text as `stream` takes it: what every block sees of it, stacked over a leading axis of layers.

        It depends on the text alone, so that all steps of all chunks share it. Its size is 2 · layers · L · width
        numbers a text in the compute dtype: 94 MB for Wan-1.3B's 512 tokens in bfloat16; with ``text_tokens``, as in a
        call on a whole video, only what differs.
        """
        embedded, features = self.embed_text(text, text_tokens), self.embed_image(image)
        graph, layers = nnx.split(self.blocks)

        def read(layer: Any) -> TextKV:
            seen = nnx.merge(graph, self._here(layer)).precompute_text_kv(embedded, features)
            return jax.tree.map(lambda x: constrain_sharding(x, "batch", None, "heads", None), seen)

        return jax.lax.map(read, layers)

    def state_specs(self, states: Any, *, leading: int) -> Any:
        """How stream states are sharded over the mesh in force: `init_state`'s, with so many axes before the layers'.

        States are by heads: they neither meet nor move while a stream goes on.
        """
        parts = zip(self._mixers(), self.mixing.parted(states), strict=True)
        return self.mixing.joined([mixer.state_specs(part, leading=leading + 1) for mixer, part in parts])

    def stream(
        self,
        latents: Float[Array, "B T H W {self.config.in_channels}"],
        timesteps: Num[Array, "B *frames"],
        text: TextKV,
        state: Any,
        *,
        first_frame: int | Int[Array, ""],
        text_tokens: int | None = None,
    ) -> tuple[Float[Array, "B T H W {self.config.out_channels}"], Any]:
        """The velocity of the next frames of a video, and the state after them.

        Calls on consecutive pieces, each of whole chunks save a last one, equal one call on the whole video at the same
        time and text.

        Args:
            latents: one chunk, or several; as in a call on a whole video.
            text: `precompute_text_kv`'s, which may change between calls.
            state: of the frames before: `init_state`'s, or what the call before this one returned.
            first_frame: the first of these latent frames, counted from the video's beginning; may be traced, so that
                one compilation serves every chunk. Exact up to 2²⁴.
            text_tokens: what `precompute_text_kv` was told.

        Raises:
            RehyatError: the model cannot stream; the sizes are not multiples of the patch; more than one chunk that
                are no whole number of chunks.
        """
        self._check_streams()
        inputs, chunk = self.embed(latents, timesteps, first_frame=first_frame), self.mixing.chunk_frames
        frames, rows, columns = inputs.grid
        if frames > chunk and frames % chunk:
            raise RehyatError(f"{frames} frames are not a whole number of chunks of {chunk}")
        first = jnp.asarray(first_frame, jnp.int32) // self.config.patch_size[0]

        def attend(mixer: Mixer, state: Any, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            q, k, v = (constrain_sharding(each, "batch", None, "stream heads", None) for each in (q, k, v))
            return mixer.step(q, k, v, mixer.sharded(state), frame=rows * columns, first=first)

        x, states = self.recur(inputs, text, state, attend, text_tokens=text_tokens)
        return self.unembed(x, inputs), states

    def recur(
        self,
        inputs: Embedded,
        text: TextKV,
        state: Any,
        attend: Callable[[Mixer, Any, Array, Array, Array], tuple[Array, Any]],
        *,
        text_tokens: int | None,
        text_rows: Callable[[Array], Array] = lambda x: x,
        remat: Keeps | None = None,
    ) -> tuple[Float[Array, "B N C"], Any]:
        """The blocks on embedded tokens, each with its mixer state: what they make of the tokens, and the states after.

        Args:
            attend: a block's self-attention, from its mixer, its state, q, k and v to v's shape and the state after.
            text_rows: the rows of a block's text that the tokens' rows read.
            remat: as in a call on a whole video.
        """
        how = {"text_repeats": text_repeats(text.k.shape[2], text_tokens)}
        graph, layers = nnx.split(self.blocks)

        def step(mixer_graph: Any) -> Callable[..., tuple[Array, Any]]:
            def layer(x: Array, params: tuple[tuple[Any, TextKV], tuple[Any, Any]]) -> tuple[Array, Any]:
                (block, text), (own, state) = params
                x, mixer = constrain_sharding(x, "batch", "time", None), nnx.merge(mixer_graph, own)

                def attention(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
                    y, after = attend(mixer, state, q, k, v)
                    return y, mixer.sharded(after)

                read: TextKV = jax.tree.map(text_rows, text)
                return nnx.merge(graph, self._here(block)).attending(
                    x, read, inputs.modulation, inputs.rotary, attention, **how
                )

            return layer if remat is None else rematerialised(layer, remat, in_loop=self._loops)

        graphs, mixers = zip(*map(nnx.split, self._mixers()), strict=True)
        own = list(zip(mixers, self.mixing.parted(state), strict=True))
        x, states = scan_layers([step(g) for g in graphs], inputs.x, (layers, text), own, pattern=self.mixing.pattern)
        return x, self.mixing.joined(states)

    def __repr__(self) -> str:
        kind = "a teacher" if self.hybrid is None else "a student"
        return described(self, f"{kind} of {self.config.num_layers} blocks of {self.config.dim}, {self.dtype}")

    def why_not_stream(self) -> str | None:
        """None for a model that can stream; else one sentence that names the blocks that prevent it."""
        return self.mixing.why_not_stream()

    def chunk_frames(self) -> int:
        """Latent frames of a stream's chunk.

        Raises:
            RehyatError: the model cannot stream.
        """
        self._check_streams()
        return self.mixing.chunk_frames * self.config.patch_size[0]

    def _check_streams(self) -> None:
        if why := self.why_not_stream():
            raise RehyatError(why)

    @property
    def _loops(self) -> bool:
        """Whether every block is in a loop, as `scan_layers` makes it."""
        return len(self.mixing.groups) == 1 and self.config.num_layers > 1

    def _mixers(self) -> tuple[Mixer, ...]:
        """The stacked module of every group of blocks."""
        return self.mixing.modules(self.hybrid_blocks)

    def embed(
        self,
        latents: Float[Array, "B T H W {self.config.in_channels}"],
        timesteps: Num[Array, "B *frames"],
        *,
        first_frame: int | Int[Array, ""] = 0,
    ) -> Embedded:
        """All that comes before the blocks but the text, see `embed_text`; ``first_frame`` as in `stream`.

        Raises:
            RehyatError: T, H or W is not a multiple of the patch; there are not as many times as frames.
        """
        batch, frames, height, width = latents.shape[:4]
        grid = self._grid((frames, height, width))
        first = jnp.asarray(first_frame, jnp.int32) // self.config.patch_size[0]
        positions = first + jnp.arange(grid[0], dtype=jnp.int32)

        x = self.patch_embedding(latents.astype(self.dtype)).reshape(batch, -1, self.config.dim)
        condition = self.condition_embedder
        if timesteps.shape not in ((batch,), (batch, frames)):
            raise RehyatError(f"{batch} videos of {frames} frames cannot have times of shape {timesteps.shape}")
        # [B, M]: of frames that share a patch, the first one's.
        times = timesteps.reshape(batch, -1)[:, :: self.config.patch_size[0]]
        time = condition.time_embedder(timestep_embedding(times, self.config.freq_dim)).astype(self.dtype)
        modulation = condition.time_proj(jax.nn.silu(time)).astype(jnp.float32)
        return Embedded(
            x=x,
            modulation=modulation.reshape(*times.shape, 6, -1),
            rotary=rotary_embedding(self.config.attention_head_dim, positions, *grid[1:]),
            time=time,
            grid=grid,
        )

    def embed_text(
        self, text: Float[Array, "B L {self.config.text_dim}"], text_tokens: int | None = None
    ) -> Float[Array, "B K C"]:
        """The text as the blocks read it, and one token of zeros after it where there are to be more ``text_tokens``.

        Raises:
            RehyatError: the text has more.
        """
        if text_tokens is not None and text_tokens < text.shape[1]:
            raise RehyatError(f"a text of {text.shape[1]} tokens does not fit into {text_tokens}")
        if text_tokens is not None and text_tokens > text.shape[1]:
            text = jnp.pad(text, ((0, 0), (0, 1), (0, 0)))
        return self.condition_embedder.text_embedder(text.astype(self.dtype))

    def embed_image(self, image: Float[Array, "B I {self.config.image_dim}"] | None) -> Float[Array, "B M C"] | None:
        """Image features as the blocks read them.

        Raises:
            RehyatError: there are none for a model that has use for them, or some for one that has not.
        """
        if (image is None) != (self.config.image_dim is None):
            need = "needs the features of an image" if image is None else "has no use for the features of an image"
            raise RehyatError(f"this transformer {need}")
        return None if image is None else self.condition_embedder.image_embedder(image.astype(self.dtype))

    def unembed(self, x: Float[Array, "B N C"], inputs: Embedded) -> Float[Array, "B T H W {self.config.out_channels}"]:
        """All that comes after the blocks: their output into the velocity."""
        shift, scale = (
            self.scale_shift_table[...][None, i : i + 1] + inputs.time.astype(jnp.float32) for i in range(2)
        )
        out = self.proj_out(modulate(x, shift, scale, self.config.eps))
        return _unpatchify(out, inputs.grid, self.config.patch_size)

    def _grid(self, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
        patch = self.config.patch_size
        if any(size % p for size, p in zip(sizes, patch, strict=True)):
            raise RehyatError(f"latents of {[*sizes]} frames, rows, columns are not divisible into patches of {patch}")
        frames, rows, columns = (size // p for size, p in zip(sizes, patch, strict=True))
        return frames, rows, columns


def text_repeats(embedded: int, text_tokens: int | None) -> int:
    """How many of these the last of the embedded tokens stands for."""
    return 1 if text_tokens is None else text_tokens - embedded + 1


def _unpatchify(
    x: Float[Array, "B N C"], grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> Float[Array, "B T H W D"]:
    """Tokens, time-major, each the values of its patch (patch time, row, column, channel), back to a latent video."""
    x = x.reshape(x.shape[0], *grid, *patch, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], *(size * p for size, p in zip(grid, patch, strict=True)), -1)
