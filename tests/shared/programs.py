"""How tests compile: for values, not speed, and once for all processes and runs."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

#: jaxlib 0.12 has the newer emitters alone; XLA ends a process over a flag that it does not know.
_OLD_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
#: Of XLA's CPU compiler, which makes programs by LLVM twice as quickly without its newer emitters, and spares a fifth
#: to a third of that where it does not divide each among 32 modules.
XLA_FLAGS = "--xla_cpu_parallel_codegen_split_count=1" + " --xla_cpu_use_fusion_emitters=false" * _OLD_EMITTERS
#: ``compiler_options`` of one program that is compiled as a user's is.
FOR_SPEED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False} | (
    {"xla_cpu_use_fusion_emitters": True} if _OLD_EMITTERS else {}
)

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
    """This process's programs and its children's: without optimisations, unless the fixture ``compiled_for_speed`` or
    the environment says otherwise. Most of a test's time would go into making programs fast that run once or twice."""
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
