"""How tests compile: for values, not speed, and once for all processes and runs."""

import hashlib
import os
import platform
from pathlib import Path

#: Of XLA's CPU compiler. Most of a test's time would go into making programs fast that run once or twice: with these,
#: compiling `tests/models/test_hybrid_dit.py` takes a third of the time.
FOR_VALUES = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
#: The same as options of one program that is compiled as a user's is.
FOR_SPEED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}

FOLDER = Path(__file__).parents[2] / ".cache" / "xla"


def keep_programs() -> None:
    """Have JAX keep what takes long to compile, in a folder that git ignores, for this process and its children.

    A CPU program is of one kind of processor, which JAX's key of an entry does not name: the folder does.
    """
    info = Path("/proc/cpuinfo")
    flags = (
        next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.exists() else ""
    )
    kind = hashlib.sha256(f"{platform.machine()} {platform.processor()} {flags}".encode()).hexdigest()[:12]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER / kind))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def compile_for_values() -> None:
    """For this process and its children, unless the variable is set."""
    os.environ.setdefault("XLA_FLAGS", " ".join(FOR_VALUES))
