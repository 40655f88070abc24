"""Compiled programs kept on disk, so that a second run starts at once; and the folder all caches live in."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder for everything that may be thrown away: ``folder``, or $REHYAT_CACHE_DIR, or the user's cache folder.

    Returns:
        The folder, made if it was missing, or None (said at debug level) when it cannot be written: a cache is a
        convenience, and its absence no reason to fail.
    """
    wanted = folder or os.environ.get("REHYAT_CACHE_DIR")
    try:
        if not wanted:
            wanted = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rehyat_jax"
        path = Path(wanted).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _log.debug("no cache at %s: %s", wanted, error)
        return None


def keep_compiled(folder: Path | None) -> None:
    """Have JAX keep every compiled program under ``folder``/xla (the persistent compilation cache).

    A cache that was configured by other means (``JAX_COMPILATION_CACHE_DIR``, or an earlier call) stays as it is.
    """
    import jax

    if folder is None or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    # The bundled model's programs are many and small; by default JAX keeps those alone that took a second or more.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A damaged entry is compiled anew, not an error.
    jax.config.update("jax_raise_persistent_cache_errors", False)
