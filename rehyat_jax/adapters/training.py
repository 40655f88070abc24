"""Adapters that learn beside frozen kernels: put on, folded into them, and taken out as a LoRA file's tensors."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.adapters.linear import LowRank, linear_layers
from rehyat_jax.adapters.lora import HEADER
from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.variables import axes_of
from rehyat_jax.weights.rows import Row
from rehyat_jax.weights.writing import Outgoing

#: Who names the tensors of a file that is written.
Form = Literal["comfyui", "diffusers"]
_PREFIXES: Mapping[Form, tuple[str, str]] = {
    "comfyui": ("original", "diffusion_model."),
    "diffusers": ("diffusers", "transformer."),
}

#: As PEFT names the linear layers of diffusers' blocks.
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapters of a training: a pair beside each linear layer of the blocks."""

    #: 0: none; the model learns as a whole.
    rank: int = 0
    #: The product is multiplied by alpha / rank.
    alpha: float = 32.0
    #: The words of the captions that call up what is learned, for the file's header.
    trigger: str = ""

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 < self.alpha < float("inf"):
            raise ConfigError(f"a LoRA needs a rank of 0 or more and an alpha above 0, not {self.rank}, {self.alpha}")


def with_adapters(module: Any, config: LoraConfig, *, within: Any, rngs: nnx.Rngs) -> Any:
    """The module, changed: each linear layer within a part of it gets an adapter that adds nothing yet.

    Args:
        within: whose linear layers.
        rngs: the ``params`` stream initialises: down uniformly within ±1/√in, as PEFT does, up with zeros.
    """
    for layer in linear_layers(within).values():
        kernel, axes = layer.kernel.get_value(), axes_of(layer.kernel)
        *stack, inputs, outputs = kernel.shape
        pair = functools.partial(_pair, rngs.params(), (*stack, inputs, config.rank), outputs)
        # For a plan the base is shapes alone.
        down, up = jax.eval_shape(pair) if isinstance(kernel, jax.ShapeDtypeStruct) else pair()
        dimensions = (None, None) if axes is None else axes.dimensions
        layer.adapter = LowRank(down, up, scale=config.alpha / config.rank, dimensions=dimensions)
    return module


def _pair(key: jax.Array, shape: tuple[int, ...], outputs: int) -> tuple[jax.Array, jax.Array]:
    """First values: ``shape`` is down's, [*layers, in, r]."""
    bound = shape[-2] ** -0.5
    down = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return down, jnp.zeros((*shape[:-2], shape[-1], outputs), jnp.float32)


def adapters_of(module: Any) -> dict[str, LowRank]:
    """By the dotted path of their linear layer."""
    return {path: layer.adapter for path, layer in linear_layers(module).items() if layer.adapter is not None}


def folded(module: Any) -> Any:
    """Another module, without adapters: each is added to its kernel, in float32, and cast to the kernel's type."""
    graph, state = nnx.split(module)
    module = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    for layer in linear_layers(module).values():
        if (adapter := layer.adapter) is None:
            continue
        kernel = layer.kernel.get_value()
        product = jnp.matmul(adapter.down.get_value(), adapter.up.get_value(), precision="highest")
        layer.kernel.set_value((kernel.astype(jnp.float32) + adapter.scale * product).astype(kernel.dtype))
        layer.adapter = None
    return module


def lora_tensors(module: Any, rows: tuple[Row, ...], *, form: Form, dtype: Any = np.float32) -> list[Outgoing]:
    """A module's adapters as ``lora_A`` [r, in] and ``lora_B`` [out, r], alpha and all in the latter."""
    dialect, prefix = _PREFIXES[form]
    by_path, target = {row.ours: row for row in rows}, np.dtype(dtype)

    def of(name: str, array: Any, place: int | None, factor: float) -> Outgoing:
        value = np.asarray(array, np.float32) if place is None else np.asarray(array[place], np.float32)
        value = np.ascontiguousarray((value.T * np.float32(factor)).astype(target))
        return Outgoing(name=name, dtype=target, shape=value.shape, blocks=lambda: [value])

    def each() -> Iterator[Outgoing]:
        for path, adapter in adapters_of(module).items():
            row, down, up = by_path[f"{path}.kernel"], adapter.down.get_value(), adapter.up.get_value()
            for place, layer in enumerate(row.numbers(down.shape)):
                name = prefix + row.name(dialect, layer).removesuffix(".weight")
                number = place if row.stacked else None
                yield of(f"{name}.lora_A.weight", down, number, 1.0)
                yield of(f"{name}.lora_B.weight", up, number, adapter.scale)

    return list(each())


def header_of(config: LoraConfig, *, base: str, form: Form) -> dict[str, str]:
    """What a file's header says: what it is of, its rank, and for diffusers what PEFT is to make of it."""
    words = {"format": "pt", "base_model": base, "rank": str(config.rank), "alpha": str(config.rank)}
    words |= {"trigger_words": config.trigger} if config.trigger else {}
    if form == "diffusers":
        # Alpha is in the numbers already.
        peft = {"transformer.r": config.rank, "transformer.lora_alpha": config.rank}
        words[HEADER] = json.dumps(peft | {"transformer.target_modules": list(_TARGETS)})
    return words
