"""What a converted block has beside the teacher's: feature maps, decay, and how it attends, whole and in a stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rehyat_jax.attention.api import hybrid_attention
from rehyat_jax.attention.baselines import WindowState, linear_attention, window_attention
from rehyat_jax.attention.features import FeatureMap
from rehyat_jax.attention.scan import Sums
from rehyat_jax.attention.sharded import hybrid_over_devices
from rehyat_jax.attention.state import HybridState
from rehyat_jax.errors import ConfigError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.runtime.mesh import devices_along
from rehyat_jax.runtime.variables import GateParam

#: What one converted block carries from chunk to chunk, by kind: hybrid, window, linear.
BlockState = HybridState | WindowState | Sums


class HybridAttention(nnx.Module):
    """The attention of a converted block: takes the teacher's q, k and v, after norm and positions, and so do φ."""

    def __init__(
        self, config: WanConfig, hybrid: HybridConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.hybrid = hybrid
        if hybrid.kind != "window":
            self.phi_q, self.phi_k = (
                FeatureMap(
                    config.num_attention_heads,
                    config.attention_head_dim,
                    layers=hybrid.layers,
                    degree=hybrid.degree,
                    activation=hybrid.activation,
                    positive=hybrid.positive,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for _ in range(2)
            )
        if hybrid.decay:
            self.decay_rate = GateParam(jnp.zeros(config.num_attention_heads, jnp.float32))
        if hybrid.length_norm:
            self.length_power = GateParam(jnp.zeros(config.num_attention_heads, jnp.float32))

    @property
    def decay(self) -> Float[Array, " H"] | None:
        """γ of each head, in (0, 1]: what is left of the state after each chunk. None: all.

        γ = exp(−max(λ, 0)), λ the parameter, 0 at the start. At λ = 0 a gradient that would lower it is dropped and
        one that would raise it passes whole, so that descent leaves γ = 1 freely and never ends beyond it.
        """
        return jnp.exp(-_not_below_zero(self.decay_rate[...])) if self.hybrid.decay else None

    def past_weight(self, tokens: int, *, frame: int, first: int | Int[Array, ""]) -> Float[Array, "{tokens} H"]:
        """What φ_q·φ_k counts for queries of the frames from ``first`` on: (1 + n / T_c)^−p, n the frames before the
        softmax window and p ≥ 0 the head's power, 0 at the start and with the gradient of `decay`'s λ.

        n_L is a sum over the past and grows with it where the softmax part does not: at p = 0 it drowns the window in
        the end, at p = 1 it is a mean and keeps its share at every length. Other than by decay, nothing is forgotten.
        """
        chunk = self.hybrid.chunk_frames
        frames = jnp.asarray(first, jnp.int32) + jnp.arange(tokens, dtype=jnp.int32) // frame
        past = jnp.maximum(frames // chunk * chunk - self.hybrid.overlap_frames, 0).astype(jnp.float32)
        return jnp.exp(-jnp.log1p(past / chunk)[:, None] * _not_below_zero(self.length_power[...])[None])

    def __call__(
        self, q: Float[Array, "B N H D"], k: Float[Array, "B N H D"], v: Float[Array, "B N H D"], *, frame: int
    ) -> Float[Array, "B N H D"]:
        """A whole video; ``frame`` is its tokens a frame. On a mesh in force, its time is cut over the devices.

        Raises:
            ConfigError: time is cut, and these blocks have no form for that.
        """
        if self.hybrid.kind != "hybrid" and devices_along("time") > 1:
            raise ConfigError(f"blocks of kind {self.hybrid.kind!r} need a mesh that does not cut time (context 1)")
        return self._of(q, k, v, frame, 0, hybrid_over_devices)()

    def stream(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        state: BlockState,
        *,
        frame: int,
        first: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B N H D"], BlockState]:
        """The next chunks of a video, from its frame ``first`` on, and the state after them."""
        return self._of(q, k, v, frame, first, hybrid_attention)(initial_state=state, return_state=True)

    def _of(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        frame: int,
        first: int | Int[Array, ""],
        hybrid_attention: Callable[..., Any],
    ) -> Callable[..., Any]:
        """The attention, ready but for its state."""
        hybrid = self.hybrid
        chunk, overlap = hybrid.chunk_frames * frame, hybrid.overlap_frames * frame
        if hybrid.kind == "window":
            return partial(window_attention, q, k, v, chunk=chunk, overlap=overlap, sink=hybrid.sink_frames * frame)
        weight = self.past_weight(q.shape[1], frame=frame, first=first) if hybrid.length_norm else None
        implementation = hybrid.implementation
        features = self.phi_q(q, weight, implementation=implementation), self.phi_k(k, implementation=implementation)
        if hybrid.kind == "linear":
            return partial(linear_attention, *features, v, chunk=chunk, causal=hybrid.causal, decay=self.decay)
        return partial(
            hybrid_attention,
            q,
            k,
            v,
            *features,
            chunk=chunk,
            overlap=overlap,
            causal=hybrid.causal,
            stabilizer=hybrid.stabilizer,
            implementation=implementation,
            decay=self.decay,
        )


@jax.custom_vjp
def _not_below_zero(rate: Float[Array, " H"]) -> Float[Array, " H"]:
    return jnp.maximum(rate, 0)


def _forward(rate: Float[Array, " H"]) -> tuple[Float[Array, " H"], Float[Array, " H"]]:
    return _not_below_zero(rate), rate


def _backward(rate: Float[Array, " H"], gradient: Float[Array, " H"]) -> tuple[Float[Array, " H"]]:
    return (jnp.where((rate <= 0) & (gradient > 0), 0, gradient),)


_not_below_zero.defvjp(_forward, _backward)


def hybrid_blocks(
    config: WanConfig, hybrid: HybridConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> HybridAttention:
    """One module for all converted blocks: its parameters have a leading axis of these, in order.

    Raises:
        ConfigError: ``hybrid`` names a block that there is not.
    """
    count = sum(hybrid.converted(config.num_layers))

    def make(keys: nnx.Rngs) -> HybridAttention:
        return HybridAttention(config, hybrid, dtype=dtype, param_dtype=param_dtype, rngs=keys)

    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


def take_parameters(target: HybridAttention, source: HybridAttention | None) -> None:
    """The parameters of ``source`` into ``target``, which may attend in another way with them.

    Raises:
        ConfigError: they are of other blocks, or of another size.
    """
    theirs = nnx.to_flat_state(nnx.state(source))
    ours = {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(nnx.state(target))}
    if ours != {path: leaf.get_value().shape for path, leaf in theirs}:
        raise ConfigError("the parameters of the hybrid blocks do not fit their configuration: initialise them anew")
    nnx.update(target, nnx.from_flat_state(theirs))


def empty_state(config: WanConfig, hybrid: HybridConfig, *, batch: int, frame: int, dtype: DTypeLike) -> BlockState:
    """One block's state before the first chunk of a video of ``frame`` tokens a frame."""
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    overlap = hybrid.overlap_frames * frame
    if hybrid.kind == "window":
        return WindowState.zeros(
            batch, heads=heads, head_dim=head_dim, overlap=overlap, sink=hybrid.sink_frames * frame, dtype=dtype
        )
    state = HybridState.zeros(
        batch, heads=heads, head_dim=head_dim, feature_dim=hybrid.degree * head_dim, overlap=overlap, dtype=dtype
    )
    return Sums(state.s, state.z) if hybrid.kind == "linear" else state


def why_not_stream(hybrid: HybridConfig | None, converted: tuple[bool, ...]) -> str | None:
    """None, or one sentence that names the blocks that prevent a model from being run chunk by chunk."""
    if not all(converted) or hybrid is None:
        softmax = listed([i for i, hybrid_block in enumerate(converted) if not hybrid_block])
        return f"the model cannot stream: {softmax} of {len(converted)} attend to the whole video by softmax"
    if not hybrid.causal:
        return f"the model cannot stream: {listed(range(len(converted)))} are not causal, they attend to later frames"
    return None


def listed(blocks: Sequence[int]) -> str:
    """Blocks in few words: ``[0, 2, 3, 4]`` as ``blocks 0, 2-4``."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    names = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"block{'s' if len(blocks) > 1 else ''} {names}"


#: A layer of a scan over (x, parameters).
Step = Callable[[Array, Any], tuple[Array, None]]


def scan_layers(
    teacher: Step, student: Step, x: Array, layers: Any, hybrids: Any, converted: tuple[bool, ...], *, unroll: bool
) -> Array:
    """``x`` through the layers in order: ``teacher(x, layer)``, or ``student(x, (layer, hybrid))`` where converted.

    A pattern that repeats (all, none, every third) is one scan over its repetitions, whose body holds a scan for each
    run of layers of a kind: no parameter is copied, and each kind of layer is compiled once a run, not once a layer.

    Args:
        layers, hybrids: parameters with a leading axis: of all layers, of the converted ones.
        unroll: no loop, but every layer in the program.
    """
    depth = len(converted)
    period = next(p for p in range(1, depth + 1) if depth % p == 0 and converted == converted[:p] * (depth // p))

    def unit(x: Array, params: tuple[Any, Any]) -> tuple[Array, None]:
        layer = hybrid = 0
        for is_hybrid, run in itertools.groupby(converted[:period]):
            count = len(list(run))
            these = _cut(params[0], layer, count)
            if is_hybrid:
                x = _scan(student, x, (these, _cut(params[1], hybrid, count)), count, unroll=unroll)
                hybrid += count
            else:
                x = _scan(teacher, x, these, count, unroll=unroll)
            layer += count
        return x, None

    repeats = depth // period
    folded = jax.tree.map(lambda p: p.reshape(repeats, -1, *p.shape[1:]), (layers, hybrids))
    return _scan(unit, x, folded, repeats, unroll=unroll)


def _cut(params: Any, start: int, count: int) -> Any:
    return jax.tree.map(lambda p: p[start : start + count], params)


def _scan(step: Step, x: Array, params: Any, count: int, *, unroll: bool) -> Array:
    if count == 1:
        return step(x, jax.tree.map(lambda p: p[0], params))[0]
    return jax.lax.scan(step, x, params, unroll=unroll)[0]
