"""The peers at the same sizes: attention of PyTorch, transformer and VAE of diffusers, linear attention of fla.

    PYTHONPATH=. python -m benchmarks.peers [--lengths 21 41] [--seconds 500] [--tiny]

One JSON line for each case, all of them in ``$OUT/peers.json`` (or the working folder); after a peer comes our own at
the same sizes, in the same process, so that ratios hold. bfloat16, batch 1, random weights and inputs, 480×832, median
of 10 after a warm-up. Needs torch and diffusers; what else is missing (fla) is said in its line.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Before JAX takes the memory that torch needs as well.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import dit, hybrid_operator, vae
from benchmarks.timing import GIB, Case, Report, arguments
from rehyat_jax.models.wan.config import VAEConfig, WanConfig

#: Latent frames that the peers' transformers are given at most: beyond, one forward takes many seconds.
LONGEST_PEER = 41


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(function: Callable[[], Any], *, samples: int = 10) -> dict[str, Any]:
    """Milliseconds, the median, and the peak of torch's memory."""

    def wait() -> None:
        if device() == "cuda":
            torch.cuda.synchronize()

    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        function()
    times = []
    for _ in range(samples):
        wait()
        begun = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - begun)
    figures: dict[str, Any] = {"ms": round(1e3 * statistics.median(times), 3), "torch": torch.__version__}
    if device() == "cuda":
        figures["torch_peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    return figures


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device(), dtype=torch.bfloat16)


def made(make: Callable[..., Any], **fields: Any) -> Any:
    """A model of random weights on the device."""
    with torch.device(device()):
        return make(**fields).to(torch.bfloat16).eval()


def attention(sizes: hybrid_operator.Sizes, backend: str, frames: int) -> dict[str, Any]:
    """Full softmax over all tokens, forward."""
    q, k, v = (random(1, sizes.heads, frames * sizes.frame, sizes.width) for _ in range(3))
    kernels = [getattr(SDPBackend, backend)]
    with torch.no_grad(), sdpa_kernel(kernels):
        return timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))


def linear_attention(sizes: hybrid_operator.Sizes, frames: int) -> dict[str, Any]:
    try:
        from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return {"left_out": "fla (flash-linear-attention) is not installed"}
    q, k = (random(1, frames * sizes.frame, sizes.heads, sizes.features).abs() for _ in range(2))
    v = random(1, frames * sizes.frame, sizes.heads, sizes.width)
    with torch.no_grad():
        return timed(lambda: chunk_linear_attn(q, k, v))


@functools.lru_cache(maxsize=1)
def transformer(config: WanConfig) -> Any:
    from diffusers import WanTransformer3DModel

    fields = {
        name: getattr(config, name)
        for name in (
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "ffn_dim",
            "in_channels",
            "out_channels",
            "text_dim",
            "freq_dim",
            "patch_size",
        )
    }
    return made(WanTransformer3DModel, **fields)


def forward(config: WanConfig, size: tuple[int, int], frames: int, *, compiled: bool) -> dict[str, Any]:
    model = transformer(config).eval()
    call = torch.compile(model) if compiled else model
    inputs = random(1, config.in_channels, frames, *size), torch.full((1,), 500, device=device())
    text = random(1, 512, config.text_dim)
    # Compiled, cuDNN's attention as well: diffusers' best.
    kernels = sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if compiled and device() == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), kernels:
        return timed(lambda: call(*inputs, text, return_dict=False))


def both_ways(config: WanConfig, size: tuple[int, int], frames: int) -> dict[str, Any]:
    """A training step's way, blocks computed anew for the backward pass."""
    model = transformer(config).train()
    model.enable_gradient_checkpointing()
    inputs = random(1, config.in_channels, frames, *size), torch.full((1,), 500, device=device())
    text = random(1, 512, config.text_dim)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(*inputs, text, return_dict=False)[0].float().square().mean().backward()

    figures = timed(step, samples=5)
    model.disable_gradient_checkpointing()
    model.zero_grad(set_to_none=True)
    return figures


def sana(size: tuple[int, int], frames: int, *, tiny: bool) -> dict[str, Any]:
    """A linear video transformer of 2B parameters, trained as one."""
    from diffusers import SanaVideoTransformer3DModel

    less = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 16,
    }
    model = made(SanaVideoTransformer3DModel, **(less if tiny else {}))
    inputs = random(1, 16, frames, *size), random(1, 300, model.config.caption_channels)
    times = torch.full((1,), 500.0, device=device())
    with torch.no_grad():
        return timed(lambda: model(*inputs, times, return_dict=False))


def autoencoder(config: VAEConfig, size: tuple[int, int], frames: int, *, way: str) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan

    fields = {
        "base_dim": config.base_dim,
        "z_dim": config.z_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
    }
    model = made(AutoencoderKLWan, **fields)
    latent = (frames - 1) // config.temporal_factor + 1
    height, width = (config.spatial_factor * side for side in size)
    with torch.no_grad():
        if way == "decode":
            latents = random(1, config.z_dim, latent, *size)
            figures = timed(lambda: model.decode(latents, return_dict=False), samples=5)
        else:
            video = random(1, 3, frames, height, width)
            figures = timed(lambda: model.encode(video, return_dict=False), samples=5)
    return {**figures, "frames_a_second": round(1e3 * frames / figures["ms"], 1)}


def cases(lengths: Sequence[int], *, tiny: bool) -> Iterator[Case]:
    """A peer, then ours."""
    sizes = hybrid_operator.TINY if tiny else hybrid_operator.Sizes()
    config, size = (dit.TINY, (8, 8)) if tiny else (WanConfig.t2v_1_3b(), (60, 104))
    vae_config, frames = (vae.TINY, 9) if tiny else (VAEConfig(), 81)
    ours = dict(hybrid_operator.cases(sizes, lengths))
    ours_dit, ours_vae = dict(dit.cases(config, lengths, size)), dict(vae.cases(vae_config, size, frames))
    short = [length for length in lengths if length <= LONGEST_PEER]
    first = lengths[0]

    for length in short:
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if device() == "cuda" else ("MATH",):
            yield f"torch, softmax, {backend}, {length} frames", functools.partial(attention, sizes, backend, length)
    yield f"fla, linear attention, {first} frames", functools.partial(linear_attention, sizes, first)
    for length in lengths:
        yield f"ours, operator with φ, {length} frames", ours[f"operator with φ, {length} frames"]
    for length in short:
        for compiled in (False, True):
            name = f"diffusers, forward, {'compiled' if compiled else 'eager'}, {length} frames"
            yield name, functools.partial(forward, config, size, length, compiled=compiled)
        yield f"SANA-Video, forward, {length} frames", functools.partial(sana, size, length, tiny=tiny)
        yield f"ours, forward, {length} frames", ours_dit[f"hybrid, forward, {length} frames"]
    yield f"diffusers, forward and backward, {first} frames", functools.partial(both_ways, config, size, first)
    yield f"ours, forward and backward, {first} frames", ours_dit[f"hybrid, forward and backward, {first} frames"]
    for way in ("decode", "encode"):
        name = f"diffusers, {way}, {frames} frames"
        yield name, functools.partial(autoencoder, vae_config, size, frames, way=way)
    yield "ours, decode", ours_vae["decode, bfloat16, 3 latent frames a step"]
    yield "ours, encode", ours_vae[f"encode, bfloat16, {frames} frames"]


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, "peers", argv, lengths=(21, 41))
    Report(given.out, given.seconds).run_all(cases([6] if given.tiny else given.lengths, tiny=given.tiny))


if __name__ == "__main__":
    main()
