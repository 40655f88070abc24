"""Functions of test files, run in a process of their own on several virtual CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from shared import tiers
from shared.programs import XLA_FLAGS


def environment(devices: int) -> dict[str, str]:
    """This one's, for a process of so many virtual CPU devices."""
    folder = Path(__file__).parents[1]
    return {
        **os.environ,
        # A collective holds a thread until the last device has arrived; fewer threads than that wait for ever.
        "NPROC": "64",
        "XLA_FLAGS": " ".join(
            (
                XLA_FLAGS,
                f"--xla_force_host_platform_device_count={devices}",
                "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
            )
        ),
        "JAX_PLATFORMS": "cpu",
        "REHYAT_TEST_TIER": tiers.tier,
        "PYTHONPATH": os.pathsep.join(map(str, [folder.parent, folder, *filter(Path.is_dir, folder.iterdir())])),
    }


def on_devices(module: str, function: str, *, devices: int = 8) -> Any:
    """What a function of a test file returns, as JSON; types checked and promotion strict as in every test."""
    program = f"import conftest, json, {module}; print(json.dumps({module}.{function}()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(devices))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def largest_difference(one: Any, other: Any, *, least: float = 0.0) -> float:
    """Of two trees of arrays: an array's largest difference as a share of its largest number; NaN if there is one.

    Or of ``least`` times the tree's largest, where that is more: a gradient so small is a sum whose terms cancel, and
    the roundings are the terms'.
    """
    sizes = [np.max(np.abs(x)) for x in jax.tree.leaves(one)]
    apart = [np.max(np.abs(x)) for x in jax.tree.leaves(jax.tree.map(np.subtract, one, other))]
    return float(np.max(np.divide(apart, np.maximum(sizes, least * np.max(sizes)))))
