"""What programs are compiled for: the platform, its kind of device, the precision of its products, the compiler's
options.

This is the one place that asks. Kernels and layers that differ by platform ask it while they are traced.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_log = logging.getLogger(__name__)


def platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: where a program that is traced now will run.

    That is the platform of the mesh in force, whose devices need not be this machine's (a topology that is compiled
    for ahead of time), else of JAX's default device.
    """
    return _device().platform


def device_kind() -> str:
    """As ``jax.Device.device_kind``, of a device of `platform`: ``"NVIDIA H200"``, ``"TPU v5 lite"``, …"""
    return _device().device_kind


def precision(dtype: DTypeLike) -> AbstractContextManager[None]:
    """Float32 means float32: accelerators would otherwise multiply it in TF32 or bfloat16."""
    return jax.default_matmul_precision("highest") if jnp.dtype(dtype) == jnp.float32 else nullcontext()


#: By platform. On GPUs the feed-forward's GELU becomes the end of cuBLAS's product, in place of a pass of its own, once
#: Triton's products are off; and arrays cut out of stacked ones are read where they lie. Training is slower with them.
INFERENCE_OPTIONS = MappingProxyType(
    {
        "gpu": {
            "xla_gpu_enable_cublaslt": True,
            "xla_gpu_enable_triton_gemm": False,
            "xla_gpu_enable_dynamic_slice_fusion": True,
        }
    }
)


class InferenceProgram:
    """``jax.jit`` of a function that is run and not differentiated, with the compiler's options for that.

    Args:
        function: as of ``jax.jit``.
        how: its static and donated arguments, as of ``jax.jit``.
    """

    def __init__(self, function: Callable[..., Any], **how: Any) -> None:
        functools.update_wrapper(self, function)
        self.function, self._how = function, how
        self._compiled: dict[str, Any] = {}

    def for_platform(self, name: str) -> Any:
        """The ``jax.jit`` for a platform, whose own options these are."""
        if name not in self._compiled:
            options = accepted_options(name, tuple(INFERENCE_OPTIONS.get(name, {}).items()))
            self._compiled[name] = jax.jit(self.function, compiler_options=dict(options) or None, **self._how)
        return self._compiled[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.for_platform(platform())(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As of ``jax.jit``."""
        return self.for_platform(platform()).lower(*args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """As of ``jax.jit``."""
        return self.for_platform(platform()).eval_shape(*args, **kwargs)


def inference_jit(
    *, static_argnames: str | Sequence[str] = (), donate_argnames: str | Sequence[str] = ()
) -> Callable[[Callable[..., Any]], InferenceProgram]:
    """A decorator: see `InferenceProgram`."""
    return functools.partial(InferenceProgram, static_argnames=static_argnames, donate_argnames=donate_argnames)


@functools.cache
def accepted_options(name: str, options: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """Those that this version's compiler knows: XLA's options come and go. What is left out is told at debug level."""
    return tuple(option for option in options if _accepted(name, *option))


def _accepted(name: str, option: str, value: Any) -> bool:
    here = [device for device in jax.local_devices() if device.platform == name]
    if not here:  # compiled for another machine
        return True
    try:
        jax.jit(lambda: jnp.zeros((), jnp.int32), compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        _log.debug("the compiler has no option %s: %s", option, error)
        return False
    return True


def _device() -> Any:
    """Something with a ``platform`` and a ``device_kind``."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if described is None else described
