"""Attention with time sharded over devices: each has whole chunks, in order, and all heads or some.

Hybrid attention is recurrent, so a device needs little of the others: the overlap's tokens from its left neighbour, and
the state before its first chunk, which is the exclusive prefix sum of what the devices to its left add to it. Both come
by collective permutes; no keys, values or activations are gathered. Softmax over the whole video has no such form: it
is sharded by heads instead, with two exchanges of tokens for heads.

Without a mesh in force (`rehyat_jax.runtime.mesh`) these functions are those they wrap.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.options import Stabilizer
from rehyat_jax.attention.api import Implementation, hybrid_attention
from rehyat_jax.attention.linear import LinearState
from rehyat_jax.attention.softmax import softmax_attention
from rehyat_jax.attention.state import HybridState
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.runtime.mesh import ALONG, devices_along, mesh_in_force, spec_of

_CONTEXT = "context"

#: The axes of a hybrid attention's state in a stream.
_KEPT: Any = ("batch", None, "stream heads", None)
_SUMS: Any = ("batch", "stream heads", None, None)
STATE = HybridState(s=_SUMS, z=_SUMS[:3], k=_KEPT, v=_KEPT, features_k=_KEPT, seen=())  # type: ignore[arg-type]


def hybrid_over_devices(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    *,
    chunk: int,
    overlap: int,
    causal: bool,
    stabilizer: Stabilizer,
    implementation: Implementation,
    decay: Float[Array, " H"] | None,
) -> Float[Array, "B N H D"]:
    """`hybrid_attention` of a whole video, on every device of the mesh in force.

    Raises:
        ConfigError: time is sharded and ``causal`` is False.
        RehyatError: time is sharded, and not into whole chunks.
    """
    attention = partial(
        hybrid_attention,
        chunk=chunk,
        overlap=overlap,
        causal=causal,
        stabilizer=stabilizer,
        implementation=implementation,
    )
    arrays = q, k, v, features_q, features_k
    if mesh_in_force() is None:
        return attention(*arrays, decay=decay)
    devices = devices_along("time")
    if devices > 1 and not causal:
        raise ConfigError("non-causal blocks see later frames: they need a mesh that does not cut time (context 1)")
    if devices > 1 and q.shape[1] % (devices * chunk):
        raise RehyatError(f"{q.shape[1]} tokens are not whole chunks of {chunk} on each of {devices} devices")

    def local(q: Array, k: Array, v: Array, features_q: Array, features_k: Array, decay: Array | None) -> Array:
        past = None
        if devices > 1:
            past = _past(k, v, features_k, chunk=chunk, overlap=overlap, decay=decay, devices=devices)
        return attention(q, k, v, features_q, features_k, decay=decay, initial_state=past)

    whole = _tokens(q)
    specs = (*[whole] * 5, PartitionSpec(ALONG["heads"]))
    return jax.shard_map(local, in_specs=specs, out_specs=whole, check_vma=False)(*arrays, decay)


def hybrid_step_over_devices(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    features_q: Float[Array, "B N H F"],
    features_k: Float[Array, "B N H F"],
    state: HybridState,
    *,
    decay: Float[Array, " H"] | None,
    **settings: Any,
) -> tuple[Float[Array, "B N H D"], HybridState]:
    """`hybrid_attention` of a stream's next chunks, on every device of the mesh in force: each has some of the heads,
    all tokens of these, and their states. Settings as of `hybrid_over_devices`."""

    def local(
        q: Array, k: Array, v: Array, features_q: Array, features_k: Array, state: HybridState, decay: Array | None
    ) -> tuple[Array, HybridState]:
        arrays = q, k, v, features_q, features_k
        return hybrid_attention(*arrays, **settings, decay=decay, initial_state=state, return_state=True)

    arrays = q, k, v, features_q, features_k, state, decay
    if mesh_in_force() is None:
        return local(*arrays)
    tokens, heads = spec_of(q.shape, "batch", None, "stream heads", None), spec_of(q.shape[2:3], "stream heads")
    states: Any = jax.tree.map(lambda x, axes: spec_of(x.shape, *axes), state, STATE)
    specs = (*[tokens] * 5, states, heads)
    return jax.shard_map(local, in_specs=specs, out_specs=(tokens, states), check_vma=False)(*arrays)


def softmax_over_devices(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B N H D"],
    value: Float[Array, "B N H D"],
    *,
    tokens: int | None = None,
) -> Float[Array, "B N H D"]:
    """`softmax_attention` among a video's tokens, on every device of the mesh in force.

    Heads that do not divide by the devices along time are filled up with empty ones.

    Args:
        tokens: how many there are; those after them are padding, which nothing sees and whose result is 0.
    """
    if mesh_in_force() is None:
        return softmax_attention(query, key, value)
    devices, real = devices_along("time"), query.shape[1] if tokens is None else tokens

    def local(query: Array, key: Array, value: Array) -> Array:
        if devices == 1:
            return softmax_attention(query, key, value)
        heads = query.shape[2]

        def whole(x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, -heads % devices), (0, 0)))
            return jax.lax.all_to_all(x, _CONTEXT, split_axis=2, concat_axis=1, tiled=True)

        query, key, value = (whole(x) for x in (query, key, value))
        y = softmax_attention(query[:, :real], key[:, :real], value[:, :real])
        y = jnp.pad(y, ((0, 0), (0, query.shape[1] - real), (0, 0), (0, 0)))
        return jax.lax.all_to_all(y, _CONTEXT, split_axis=1, concat_axis=2, tiled=True)[:, :, :heads]

    whole = _tokens(query)
    return jax.shard_map(local, in_specs=(whole,) * 3, out_specs=whole, check_vma=False)(query, key, value)


def softmax_to_text(
    query: Float[Array, "B N H D"], key: Float[Array, "B M H D"], value: Float[Array, "B M H D"], *, repeats: int = 1
) -> Float[Array, "B N H D"]:
    """`softmax_attention` of a video's tokens to a text's, which every device along time has whole."""
    attend = partial(softmax_attention, repeats=repeats)
    if mesh_in_force() is None:
        return attend(query, key, value)
    video, text = _tokens(query), spec_of(key.shape, "batch", None, "heads", None)
    sharded = jax.shard_map(attend, in_specs=(video, text, text), out_specs=video, check_vma=False)
    return sharded(query, key, value)


def _tokens(x: Float[Array, "B N H D"]) -> PartitionSpec:
    return spec_of(x.shape, "batch", "time", "heads", None)


def _past(
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    features_k: Float[Array, "B N H F"],
    *,
    chunk: int,
    overlap: int,
    decay: Float[Array, " H"] | None,
    devices: int,
) -> HybridState:
    """Inside ``shard_map``: the state before this device's first token."""
    tokens = k.shape[1]
    past_k, past_v, past_features = (_tokens_before(x, overlap, devices) for x in (k, v, features_k))
    before = LinearState.empty(features_k, v)
    if decay is not None:
        decay = decay.astype(before.s.dtype)
    # What leaves the window while this device's chunks are walked through: first what it holds of its neighbours'.
    count = min(tokens, overlap)
    for features, values, start in [
        (past_features[:, :count], past_v[:, :count], 0),
        (features_k[:, : tokens - count], v[:, : tokens - count], count),
    ]:
        if decay is not None and features.shape[1]:
            later = (tokens - 1 - start - jnp.arange(features.shape[1])) // chunk
            fade = decay[None] ** later[:, None].astype(decay.dtype)
            features = features.astype(decay.dtype) * fade[None, :, :, None]
        before = before.update(features, values)
    # Exclusive prefix sum in log₂ steps; with decay, what comes from further left has faded by every chunk between.
    before = _from_left(before, 1, devices)
    distance = 1
    while distance < devices - 1:
        earlier = _from_left(before, distance, devices)
        if decay is not None:
            earlier = earlier.decayed(decay ** (distance * (tokens // chunk)))
        before = LinearState(before.s + earlier.s, before.z + earlier.z)
        distance *= 2
    seen = jnp.minimum(jax.lax.axis_index(_CONTEXT) * tokens, overlap).astype(jnp.int32)
    return HybridState(before.s, before.z, past_k, past_v, past_features, seen)


def _tokens_before(x: Float[Array, "B N H D"], count: int, devices: int) -> Float[Array, "B count H D"]:
    """The ``count`` tokens before this device's first; zeros before the video's."""
    tokens, parts, hop = x.shape[1], [x[:, :0]], 1
    while count > 0 and hop < devices:
        take = min(count, tokens)
        parts.append(_from_left(x[:, tokens - take :], hop, devices))
        count, hop = count - take, hop + 1
    return jnp.pad(jnp.concatenate(parts[::-1], axis=1), ((0, 0), (count, 0), (0, 0), (0, 0)))


def _from_left(x: Any, distance: int, devices: int) -> Any:
    """What the device ``distance`` to the left has; zeros where there is none."""
    pairs = [(i, i + distance) for i in range(devices - distance)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, _CONTEXT, pairs), x)
