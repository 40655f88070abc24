"""What programs are compiled for is asked in one place."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import rehyat_jax
from rehyat_jax.runtime.platform import (
    INFERENCE_OPTIONS,
    accepted_options,
    device_kind,
    inference_jit,
    platform,
    precision,
)


def test_without_a_mesh_it_is_the_default_devices():
    assert (platform(), device_kind()) == (jax.default_backend(), jax.devices()[0].device_kind)


def test_a_mesh_in_force_is_what_is_compiled_for(monkeypatch):
    """Also inside a program, and where its devices are another machine's: jax.sharding.AbstractDevice's two words."""
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("the local devices were asked"))
    with jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]), ("data",))):
        seen = []
        jax.jit(lambda x: seen.append((platform(), device_kind())) or x)(1.0)
        assert seen == [(jax.local_devices()[0].platform, jax.local_devices()[0].device_kind)]


def test_float32_is_multiplied_as_float32_alone():
    with jax.default_matmul_precision("bfloat16"):
        with precision(np.float32):
            assert jax.config.jax_default_matmul_precision == "highest"
        with precision(jax.numpy.bfloat16):
            assert jax.config.jax_default_matmul_precision == "bfloat16"


def test_nowhere_else_is_a_platform_asked_for():
    """In the package; a record names the machine's own devices, whatever was compiled, and a mesh takes those that
    there are."""
    package = Path(rehyat_jax.__file__).parent
    asked = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("jax.default_backend", "jax.devices")
    }
    meshes = {"runtime/devices.py", "runtime/mesh_config.py"}
    assert asked == {"runtime/platform.py", "runtime/record.py", *meshes}


def test_inference_on_gpus_is_compiled_by_options_that_this_compiler_knows():
    """They are XLA's, whatever the platform: here the CPU's compiler is asked, which refuses a name that is none."""
    options = tuple(INFERENCE_OPTIONS["gpu"].items())
    assert accepted_options("cpu", options) == options
    assert accepted_options("cpu", (("xla_gpu_enable_nothing", True), *options)) == options


def test_a_program_of_inference_is_jax_jit():
    @inference_jit(static_argnames="times", donate_argnames="x")
    def scaled(x, *, times):
        """Told."""
        return x * times

    assert (scaled.__name__, scaled.__doc__) == ("scaled", "Told.")
    x = jax.numpy.arange(3.0)
    assert scaled.eval_shape(x, times=2).shape == (3,)
    assert "jit_scaled" in scaled.lower(x, times=2).as_text()
    np.testing.assert_array_equal(scaled(x, times=2), [0, 2, 4])
    assert x.is_deleted()
    assert scaled.for_platform("gpu") is not scaled.for_platform("cpu")
