"""Every test runs with array types checked (jaxtyping + beartype), promotion strict, and warnings as errors."""

import gc

from jaxtyping import install_import_hook

# Before the packages are imported: their annotated signatures become checks.
install_import_hook(["rehyat_jax", "pallas_kernels", "train"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Parity with float32 references is parity of float32 arithmetic, on every backend.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def x64():
    """float64 for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Compiled programs end with their file.

    Each holds a few dozen memory mappings, of which Linux gives a process 65,530; beyond, XLA dies of a segmentation
    fault. And a file's programs do not depend on which ran before it.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs compiled for their values, not their speed, in child processes too: for a file of tests that mostly
    compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
