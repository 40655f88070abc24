"""What of Wan's models runs on a GPU of 8, 16, 24 or 80 GB, by this program's own estimate, as the documents have it.

    PYTHONPATH=. python -m benchmarks.memory_table

Nothing is loaded and no GPU is needed; ten seconds. Of each memory 0.95 counts: that takes
`XLA_PYTHON_CLIENT_MEM_FRACTION=.95`, for JAX takes 0.75 by itself. The estimate is one: it is compared with XLA's
account of programs to a factor of two (`tests/models/test_memory.py`), and most rows were not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.memory import Making, Networks, VideoShape, blocks_bytes, networks_need, text_blocks_bytes
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.variables import abstract_module

#: In GB, of which so much counts.
MEMORIES, SHARE = (8, 16, 24, 80), 0.95
#: Model, and its video: frames, height, width.
MODELS = (
    ("1.3B", WanConfig.t2v_1_3b(), (81, 480, 832)),
    ("5B", WanConfig.ti2v_5b(), (121, 704, 1280)),
    ("14B", WanConfig.t2v_14b(), (81, 480, 832)),
    ("A14B", WanConfig.t2v_14b(), (81, 480, 832)),
)
#: From the fastest to the smallest: `--quantize int8`, `--vae-tile 256`, `--offload`, and what they are to the
#: estimate.
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bfloat16", {}),
    ("int8", {"eight_bits": True}),
    ("tiles", {"vae_tile": 256}),
    ("int8, tiles", {"eight_bits": True, "vae_tile": 256}),
    ("offload, tiles", {"offload": True, "vae_tile": 256}),
    ("int8, offload, tiles", {"eight_bits": True, "offload": True, "vae_tile": 256}),
)


def count(make: Any, config: Any) -> tuple[int, int]:
    """Numbers of a network in all, and in the matrices of its blocks."""
    leaves = jax.tree.leaves(nnx.state(abstract_module(make, config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)))
    return sum(x.size for x in leaves), sum(x.size for x in leaves if x.ndim == 3)


def networks(model: WanConfig, *, eight_bits: bool = False) -> Networks:
    """In bfloat16, or their blocks' matrices in eight bits."""
    (transformer, matrices), (text, of_text) = count(WanTransformer, model), count(UMT5Encoder, TextEncoderConfig())
    vae = VAEConfig.published_for(model)
    decoder = nnx.eval_shape(lambda: WanVAE(vae, rngs=nnx.Rngs(0)))
    return Networks(
        model=model,
        vae=vae,
        dtype=jnp.bfloat16,
        transformer=2 * transformer - (matrices if eight_bits else 0),
        blocks=blocks_bytes(model, dtype=jnp.bfloat16, eight_bits=eight_bits),
        text_encoder=2 * text - (of_text if eight_bits else 0),
        text_blocks=text_blocks_bytes(TextEncoderConfig(), dtype=jnp.bfloat16, eight_bits=eight_bits),
        text_layers=TextEncoderConfig().num_layers,
        decoder=4 * sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(decoder))),
    )


def rows() -> Iterator[tuple[str, str, list[str]]]:
    """Model, video, and of each memory the fastest way that fits, with its gigabytes."""
    for name, model, (frames, height, width) in MODELS:
        parts = {eight: networks(model, eight_bits=eight) for eight in (False, True)}
        for streams in (False, True):
            size = {"frames": frames, "height": height, "width": width}
            shape = VideoShape(**size, steps=4 if streams else 50, guided=not streams)
            needs = []
            for way, how in WAYS:
                making = Making(
                    hybrid=HybridConfig() if streams else None,
                    streams=streams,
                    remember=0.0,
                    offload=how.get("offload", False),
                    vae_tile=how.get("vae_tile"),
                )
                need = networks_need(parts[how.get("eight_bits", False)], shape, making, on="gpu")
                needs.append((way, need.on_device / 1e9))
            cells = []
            for memory in MEMORIES:
                fits = next(((way, need) for way, need in needs if need <= SHARE * memory), None)
                cells.append("no" if fits is None else f"{fits[0]} ({fits[1]:.1f})")
            what = f"a stream of {width}x{height}" if streams else f"{frames} frames of {width}x{height}"
            yield name, what, cells


def table() -> str:
    """As Markdown."""
    heads = ["model", "video", *(f"{memory} GB" for memory in MEMORIES)]
    lines = [heads, ["---"] * len(heads), *([name, what, *cells] for name, what, cells in rows())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    print(table())


if __name__ == "__main__":
    main()
