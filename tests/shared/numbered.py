"""A stream without a model, for tests of what serves streams."""

import json
import zlib
from pathlib import Path

import numpy as np

from rehyat_jax.errors import RehyatError

FRAMES = 4


class Numbered:
    """A stream whose frames depend on the sentence, the seed and all that came before, as a model's do."""

    how = {"model": "numbered", "width": 32, "height": 32, "num_inference_steps": 1, "guidance_scale": 1.0}  # noqa: RUF012

    def __init__(self, prompt: str, seed: int = 0, past: int = 0, frames: int = 0) -> None:
        self.frames_done = frames
        self.prompt, self.state, self._seed, self._past = prompt, (np.zeros(8, np.float32),), seed, past

    def __next__(self) -> np.ndarray:
        self.frames_done += FRAMES
        self._past = zlib.crc32(repr((self.prompt, self._seed, self._past)).encode())
        colours = np.random.default_rng(self._past).integers(0, 256, (FRAMES, 1, 1, 3), dtype=np.uint8)
        return np.broadcast_to(colours, (FRAMES, 32, 32, 3)).copy()

    def fork(self, *, seed: int | None = None) -> "Numbered":
        return Numbered(self.prompt, self._seed if seed is None else seed, self._past, self.frames_done)

    def snapshot(self) -> "Numbered":
        return self.fork()

    def change_prompt(self, prompt: str) -> None:
        self.prompt = prompt

    def save(self, folder) -> None:
        Path(folder).mkdir(exist_ok=True)
        content = {"prompt": self.prompt, "seed": self._seed, "past": self._past, "frames": self.frames_done}
        Path(folder, "stream.safetensors").write_text(json.dumps(content))


def resumed(folder: Path) -> Numbered:
    """What `Numbered.save` kept."""
    try:
        content = json.loads(Path(folder, "stream.safetensors").read_bytes())
        return Numbered(content["prompt"], content["seed"], content["past"], content["frames"])
    except (ValueError, TypeError, KeyError) as error:
        raise RehyatError("that is no saved stream") from error
