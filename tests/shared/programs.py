"""Compiled programs that tests keep between processes and runs."""

import hashlib
import os
import platform
from pathlib import Path

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
