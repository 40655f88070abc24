"""What a client asks for, as it is checked before anything is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rehyat_jax.errors import RehyatError

_NUMBERS: dict[str, type] = {
    "seed": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "width": int,
    "height": int,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """How a new video is to be made; what is None is the model's own."""

    prompt: str
    #: By its name; None: the server's first.
    model: str | None = None
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | int | None = None
    width: int | None = None
    height: int | None = None
    #: The first frame, uint8 [H, W, 3] of any size.
    image: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Wish:
        """From a client's message; what else it holds is not looked at.

        Raises:
            RehyatError: a value is not of its kind.
        """
        numbers: dict[str, Any] = {}
        for name, kind in _NUMBERS.items():
            value = message.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
                raise RehyatError(f"{name} must be a number, not {str(value)[:80]!r}")
            numbers[name] = value
        if message.get("image_reference") is not None:
            raise RehyatError("a live stream takes no image_reference; POST /v1/videos takes an input_reference")
        texts = {
            name: message[name] for name in ("prompt", "negative_prompt", "model") if message.get(name) is not None
        }
        if "prompt" not in texts:
            raise RehyatError("a prompt is missing")
        for name, text in texts.items():
            if not isinstance(text, str):
                raise RehyatError(f"{name} must be a text, not {str(text)[:80]!r}")
        return cls(**texts, **numbers)
