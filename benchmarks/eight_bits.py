"""A transformer of Wan-1.3B's sizes kept in eight bits, beside itself in bfloat16: bytes, and how far its velocity is.

    PYTHONPATH=. python -m benchmarks.eight_bits

One JSON line for each kind. Three minutes on two cores and 6 GiB of disk, freed at the end. Random weights of order one
and a random latent frame of 256 tokens: what published weights lose is another number, of this size.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import normal
from rehyat_jax.adapters.linear import stacked_layers
from rehyat_jax.models.checkpoints import load_transformer, save_transformer
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.eight_bits import KINDS, Kind
from rehyat_jax.runtime.variables import ScaleParam, axes_of, map_variables


def order_one(config: WanConfig) -> WanTransformer:
    """Random weights that keep activations of order one: a kernel's by its inputs, the rest a tenth."""
    kinds: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = nnx.eval_shape(lambda: WanTransformer(config, **kinds, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def drawn(variable: Any, leaf: Any) -> jax.Array:
        axes, noise = axes_of(variable), rng.standard_normal(leaf.shape, np.float32)
        if axes is not None and axes.inputs:
            noise /= np.sqrt(np.prod(leaf.shape[-1 - axes.inputs : -1]))
        else:
            noise *= 0.1
        return jnp.asarray(noise, leaf.dtype)

    state = nnx.state(model)
    nnx.update(model, map_variables(drawn, state))
    return model


def rounded_to_int8(model: WanTransformer) -> WanTransformer:
    """The same model with its blocks' kernels rounded to int8, on the device; they are gone as they were."""
    for path, layer in stacked_layers(model).items():
        if path.startswith("blocks."):
            layer.kernel, layer.scale = _rounded(layer.kernel)
            layer.rounds_inputs = True
    return model


def _rounded(kernel: nnx.Param) -> tuple[nnx.Param, ScaleParam]:
    @jax.jit
    def rounded(wide: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = wide.astype(jnp.float32)
        scale = jnp.abs(wide).max(axis=-2) / 127
        return jnp.round(wide / scale[..., None, :]).astype(jnp.int8), scale

    even, scale = rounded(kernel.get_value())
    kernel.set_value(even)
    return kernel, ScaleParam(scale)


def measured(config: WanConfig, folder: Path, *, size: tuple[int, int] = (32, 32)) -> Iterator[dict[str, Any]]:
    """Figures of each kind; ``folder`` takes the weights."""
    save_transformer(order_one(config), folder)
    inputs = normal(0, 1, 1, *size, config.in_channels), jnp.full((1,), 700.0), normal(1, 1, 16, config.text_dim)

    def of(quantize: Kind | None) -> tuple[int, np.ndarray]:
        graph, weights = nnx.split(load_transformer(folder, dtype=jnp.bfloat16, quantize=quantize))
        velocity = jax.jit(lambda weights, *args: nnx.merge(graph, weights)(*args))(weights, *inputs)
        return sum(x.nbytes for x in jax.tree.leaves(weights)), np.asarray(velocity.astype(jnp.float32))

    nbytes, wanted = of(None)
    for kind in KINDS:
        kept, found = of(kind)
        yield {
            "kind": kind,
            "bytes": kept,
            "share_of_bfloat16": round(kept / nbytes, 3),
            "velocity_differs_by": round(float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)), 4),
        }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for figures in measured(WanConfig.t2v_1_3b(), Path(folder) / "wan"):
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
