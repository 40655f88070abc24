"""The one import from JAX's private modules: it is there in the version at hand, and done without where it is not."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import CudnnBackward, cudnn
from pallas_kernels.gpu.windows import Windows

_ROOT = Path(__file__).parents[2]
_WINDOWS = Windows(chunk=32, overlap=16, past=0, length=64)
_Q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)


def test_cudnns_backward_is_where_this_version_of_jax_is_said_to_have_it():
    """A failure here names a JAX to be looked at: its primitive has moved, or takes other arguments. The kernels would
    go on without it, slower."""
    rows = jax.ShapeDtypeStruct((1, 2, 64), jnp.float32)
    assert CudnnBackward().unsupported(_WINDOWS, _Q) is None, f"JAX {jax.__version__}"
    gradients = jax.eval_shape(cudnn.attention_backward, _Q, _Q, _Q, rows, _Q, _Q)
    assert [(x.shape, x.dtype) for x in gradients] == [(_Q.shape, _Q.dtype)] * 3, f"JAX {jax.__version__}"


def test_a_jax_without_it_is_done_without(monkeypatch):
    monkeypatch.setattr(cudnn, "_cudnn", None)
    assert CudnnBackward().unsupported(_WINDOWS, _Q) == "JAX's primitive, which is not where it was"


def test_nothing_else_is_imported_from_where_jax_promises_nothing():
    files = [path for room in ("rehyat_jax", "pallas_kernels", "train") for path in (_ROOT / room).rglob("*.py")]
    private = [path for path in files if re.search(r"^\s*(from|import) jax\._src", path.read_text(), re.MULTILINE)]
    assert [str(path.relative_to(_ROOT)) for path in private] == ["pallas_kernels/gpu/cudnn.py"]
