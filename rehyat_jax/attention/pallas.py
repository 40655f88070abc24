"""Attention by the Pallas kernels: what they can do, and the state carried in and out of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.options import Stabilizer
from rehyat_jax.attention.state import HybridState
from rehyat_jax.runtime.platform import device_kind, platform


def unsupported(*arrays: jax.Array) -> str | None:
    """What the kernels lack for arrays like these on this machine; None where they can be used."""
    if any(a.dtype not in (jnp.float32, jnp.bfloat16) for a in arrays):
        return f"arrays other than float32 and bfloat16, as {', '.join(sorted({str(a.dtype) for a in arrays}))}"
    if platform() not in ("tpu", "gpu", "cpu"):
        return f"the platform {platform()}: there are kernels for TPU, interpreted on a CPU, and for CUDA"
    return None


def pallas(
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
    decay: Float[Array, " H"],
    state: HybridState,
    begins: bool = False,
) -> tuple[Float[Array, "B N H D"], HybridState]:
    """Arguments and results of ``reference``. Compiled on TPU and CUDA; TPU's interpreted, for tests, on a CPU.

    ``begins``: the state is known to be empty.

    Raises:
        NotImplementedError: the kernels lack something, which is named.
    """
    if lack := unsupported(q, v, features_q):
        raise NotImplementedError(f"hybrid attention's Pallas kernels lack {lack}")
    from pallas_kernels import gpu, tpu  # here: Pallas takes half a second to import, and a CPU has no use for it

    device = device_kind()

    def run(hybrid: Callable[..., tuple[Array, Array, Array]], *arrays: Any) -> tuple[Array, Array, Array]:
        q, k, v, features_q, features_k, state, decay = arrays
        return hybrid(
            q,
            k,
            v,
            features_q,
            features_k,
            s=state.s,
            z=state.z,
            past_k=state.k,
            past_v=state.v,
            past_features_k=state.features_k,
            seen=state.seen,
            decay=decay,
            chunk=chunk,
            causal=causal,
            stabilizer=stabilizer,
        )

    blocks = tpu.tuned(device, dtype=q.dtype, head_dim=q.shape[3], features=features_q.shape[3])
    on_tpu, on_cpu = (functools.partial(tpu.hybrid, blocks=blocks, interpret=here) for here in (False, True))
    kernels = gpu.kernels(device, q, chunk=chunk, overlap=overlap)
    on_gpu = functools.partial(gpu.hybrid, kernels=kernels, begins=begins)

    # By the platform compiled for, which need not be this machine's.
    out, s, z = jax.lax.platform_dependent(
        q,
        k,
        v,
        features_q,
        features_k,
        state,
        decay,
        tpu=functools.partial(run, on_tpu),
        cuda=functools.partial(run, on_gpu),
        cpu=functools.partial(run, on_cpu),
    )
    new = q.shape[1]
    last_k, last_v, last_features = (
        jnp.concatenate([past, now], axis=1)[:, new:]
        for past, now in [(state.k, k), (state.v, v), (state.features_k, features_k)]
    )
    seen = jnp.minimum(state.seen + new, overlap)
    return out, HybridState(s, z, last_k, last_v, last_features, seen)
