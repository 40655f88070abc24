"""A stream without a model, for tests of what serves streams."""

import numpy as np

from rehyat_jax.errors import RehyatError

FRAMES = 4


class Numbered:
    """A stream whose frames depend on the sentence, the seed and all that came before, as a model's do."""

    def __init__(self, prompt: str, seed: int = 0, past: int = 0) -> None:
        self.prompt, self.state, self._seed, self._past = prompt, (np.zeros(8, np.float32),), seed, past

    def __next__(self) -> np.ndarray:
        self._past = hash((self.prompt, self._seed, self._past)) % 1_000_003
        colours = np.random.default_rng(self._past).integers(0, 256, (FRAMES, 1, 1, 3), dtype=np.uint8)
        return np.broadcast_to(colours, (FRAMES, 32, 32, 3)).copy()

    def fork(self, *, seed: int | None = None) -> "Numbered":
        return Numbered(self.prompt, self._seed if seed is None else seed, self._past)

    def change_prompt(self, prompt: str) -> None:
        self.prompt = prompt

    def save(self, folder) -> None:
        raise RehyatError("this stream cannot be saved")
