"""φ: the feature map whose inner product stands for ``exp(q·k/√D)`` outside the softmax window."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.devices import is_hopper
from pallas_kernels.options import KEPT_FEATURES, Positive
from rehyat_jax.attention.state import accumulator
from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.mesh import whole_on_each_device
from rehyat_jax.runtime.platform import device_kind
from rehyat_jax.runtime.variables import MixerParam, kernel, sharded

Activation = Literal["gelu", "silu", "relu"]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
_POSITIVES: dict[str, Callable[[Array], Array]] = {"softplus": jax.nn.softplus, "exp": jnp.exp, "none": lambda x: x}
_INVERSES: dict[str, Callable[[float], float]] = {
    "softplus": lambda y: math.log(math.expm1(y)),
    "exp": math.log,
    "none": lambda y: y,
}

#: Spread of the output layer's answer at the start, for an input of order one: φ is nearly its bias, not quite.
_OUTPUT_SPREAD = 0.1


class HeadLinear(nnx.Module):
    """A linear layer of its own for every head."""

    def __init__(
        self,
        heads: int,
        inputs: int,
        outputs: int,
        *,
        spread: float,
        bias: Float[Array, " outputs"],
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        normal = jax.random.normal(rngs.params(), (heads, inputs, outputs), param_dtype)
        self.kernel = MixerParam(normal * (spread * inputs**-0.5), **kernel("heads", "channels", "features", inputs=1))
        self.bias = MixerParam(jnp.tile(bias.astype(param_dtype), (heads, 1)), **sharded("heads", None))

    def __call__(self, x: Float[Array, "H B N I"]) -> Float[Array, "H B N O"]:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return jnp.einsum("hbni,hio->hbno", x.astype(self.dtype), kernel) + bias[:, None, None]


class FeatureMap(nnx.Module):
    """φ of ReHyAt (arXiv 2601.04342): an MLP per head, made positive, part i of its output to the power i.

    Widths D → P·D → … → P·D in P parts: F = P·D features for each token and head. Two layers of degree P = 2 are the
    published size (1.186 M parameters at 12 heads of 128); the activation and what keeps odd powers positive are this
    project's choice.

    **At the start** φ is nearly constant: the output bias alone sets it, every part giving an equal share, so that
    ``φ_q(q)·φ_k(k) ≈ level`` for every pair. A past token then weighs ``level`` where the softmax window's largest
    weight is 1 (stabiliser ``row_max``). By default a thousand of them weigh a tenth of that one: the model begins as
    its window, which is the least disturbed that it can be without training (``docs/notebook/results.md``), and learns
    as fast as from higher levels. The output kernel is small and not zero: the gradient reaches every layer from the
    first step.

    Args:
        layers: at least 1.
        degree: P.
        activation: between layers; GELU is the tanh approximation, as in Wan's feed-forward.
        positive: applied to the output before the powers. With ``"none"`` odd powers may be negative, and the
            attention's normaliser is no longer sure to be positive.
        level: φ_q·φ_k of a pair at the start, for two maps of equal options.
        dtype: of the matrix products and the result; the positive function and the powers are computed in float32.

    Raises:
        ConfigError: an impossible or unknown option.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        layers: int = 2,
        degree: int = 2,
        activation: Activation = "gelu",
        positive: Positive = "softplus",
        level: float = 1e-4,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        for name, number in {"heads": heads, "head_dim": head_dim, "layers": layers, "degree": degree}.items():
            if number < 1:
                raise ConfigError(f"{name} of a feature map must be at least 1, not {number}")
        for name, value, known in [
            ("activation", activation, get_args(Activation)),
            ("positive", positive, get_args(Positive)),
        ]:
            if value not in known:
                raise ConfigError(f"{name} of a feature map must be one of {', '.join(known)}, not {value!r}")
        if not (math.isfinite(level) and level > 0):
            raise ConfigError(f"level of a feature map must be a positive number, not {level}")
        self.degree, self.activation, self.positive, self.dtype = degree, activation, positive, dtype

        width = degree * head_dim
        # D numbers u, the same in φ_q and φ_k, give Σ (u·u)^i = level / P.
        parts = [(level / width) ** (0.5 / i) for i in range(1, degree + 1)]
        start = jnp.repeat(jnp.array([_INVERSES[positive](u) for u in parts], jnp.float32), head_dim)
        self.layers = nnx.List(
            HeadLinear(
                heads,
                head_dim if i == 0 else width,
                width,
                spread=_OUTPUT_SPREAD * (min(parts) if positive == "none" else 1) if i == layers - 1 else 1.0,
                bias=start if i == layers - 1 else jnp.zeros(width),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for i in range(layers)
        )

    def __call__(
        self, x: Float[Array, "B N H D"], weight: Float[Array, "N H"] | None = None, *, implementation: str = "auto"
    ) -> Float[Array, "B N H F"]:
        """φ of queries or keys as attention sees them: after q/k norm and rotary positions.

        Args:
            weight: of each token and head, that φ is multiplied by.
            implementation: of the attention that φ is for. ``"auto"`` and ``"pallas"`` take one kernel forward where
                there is one: on Hopper, where each device has its whole part, for two layers with GELU, softplus or
                exp, in bfloat16, of heads of 16 to 128 (``pallas_kernels.gpu.FeatureKernels.unsupported``). XLA has the
                rest, and all else that may be named.
        """
        x = x.astype(self.dtype)
        if implementation not in ("auto", "pallas") or not (kernels := self._kernels(x)):
            return checkpoint_name(self._plain(x, weight), KEPT_FEATURES)
        from pallas_kernels import gpu

        layers = gpu.Layers(*(p[...].astype(self.dtype) for layer in self.layers for p in (layer.kernel, layer.bias)))

        def fused(x: Array, layers: Any, weight: Array | None) -> Array:
            return gpu.feature_map(kernels, self.degree, self.positive, x, layers, weight)

        features = jax.lax.platform_dependent(
            x, layers, weight, cuda=fused, default=lambda x, layers, weight: self._plain(x, weight)
        )
        return checkpoint_name(features, KEPT_FEATURES)

    def _kernels(self, x: Float[Array | jax.ShapeDtypeStruct, "B N H D"]) -> Any:
        """A `pallas_kernels.gpu.FeatureKernels`, or None where there is none."""
        published = len(self.layers) == 2 and self.activation == "gelu" and self.positive in ("softplus", "exp")
        if not published or not is_hopper(device_kind()) or not whole_on_each_device():
            return None
        from pallas_kernels import gpu  # here: Pallas takes half a second to import

        return gpu.feature_kernels(device_kind(), x, degree=self.degree)

    def _plain(self, x: Float[Array, "B N H D"], weight: Float[Array, "N H"] | None) -> Float[Array, "B N H F"]:
        x = x.transpose(2, 0, 1, 3)  # heads outermost, as the products have them: else a CPU turns each one's result
        for layer in self.layers[:-1]:
            x = _ACTIVATIONS[self.activation](layer(x))
        x = _POSITIVES[self.positive](self.layers[-1](x).astype(accumulator(self.dtype)))
        parts = jnp.split(x, self.degree, axis=-1)
        x = jnp.concatenate([part**i for i, part in enumerate(parts, 1)], axis=-1).transpose(1, 2, 0, 3)
        return (x if weight is None else x * weight[None, :, :, None]).astype(self.dtype)
