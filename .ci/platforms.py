"""Whether each platform and Python that users have can install this package without a compiler.

``make platforms``. For each of them pip resolves the dependencies of pyproject.toml from wheels alone and installs
nothing. pip takes environment markers from the machine that it runs on, so those of our own dependencies are evaluated
here, for the platform that is asked for.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement

_LINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
#: Wheel tags, and what markers are told.
PLATFORMS = {
    "Linux x86-64": ([f"{tag}_x86_64" for tag in _LINUX], {"sys_platform": "linux", "platform_machine": "x86_64"}),
    "Linux arm64": ([f"{tag}_aarch64" for tag in _LINUX], {"sys_platform": "linux", "platform_machine": "aarch64"}),
    "macOS arm64": (["macosx_14_0_arm64"], {"sys_platform": "darwin", "platform_machine": "arm64"}),
    "Windows x86-64": (["win_amd64"], {"sys_platform": "win32", "platform_machine": "AMD64"}),
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def requirements(markers: dict[str, str], python: str) -> list[str]:
    """Our own dependencies on this platform, without their markers."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    environment = markers | {"python_version": python, "python_full_version": f"{python}.0"}
    chosen = []
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            chosen.append(str(requirement))
    return chosen


def why_not(platform: str, python: str) -> str | None:
    """What pip says where it finds no wheels; None where it does."""
    tags, markers = PLATFORMS[platform]
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        argv += ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp", "--target", folder]
        argv += [part for tag in tags for part in ("--platform", tag)]
        done = subprocess.run([*argv, *requirements(markers, python)], capture_output=True, text=True)
    if not done.returncode:
        return None
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or done.stderr.splitlines() or ["pip failed"])[0][:200]


def main() -> int:
    cases = [(platform, python) for platform in PLATFORMS for python in PYTHONS]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda case: why_not(*case), cases))
    for (platform, python), answer in zip(cases, answers, strict=True):
        print(f"{platform:15} Python {python}: {answer or 'ok'}")
    return int(any(answers))


if __name__ == "__main__":
    sys.exit(main())
