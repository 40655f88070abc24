"""Functions of test files, run in a process of their own on several virtual CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def on_devices(module: str, function: str, *, devices: int = 8) -> Any:
    """What a function of a test file returns, as JSON; types checked and promotion strict as in every test."""
    folder = Path(__file__).parent
    program = f"import conftest, json, {module}; print(json.dumps({module}.{function}()))"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{folder.parent}{os.pathsep}{folder}",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
