"""What a client asks for, as it is checked before anything is made."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
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
_TEXTS = ("prompt", "negative_prompt", "model")
#: Names that `frames_of` and `check_rate` read.
LENGTH = ("num_frames", "seconds", "fps")


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
    def from_message(cls, message: Mapping[str, Any], *, also: Collection[str] = ()) -> Wish:
        """From a client's message; ``also`` are names that its reader knows beside a wish's own.

        Raises:
            RehyatError: a value is not of its kind, or a name is none that is known.
        """
        given = {name: value for name, value in message.items() if value is not None and name not in also}
        if given.pop("image_reference", None) is not None:
            raise RehyatError("a live stream takes no image_reference; POST /v1/videos takes an input_reference")
        known = (*_TEXTS, *_NUMBERS, "size")
        if unknown := sorted(given.keys() - set(known)):
            raise RehyatError(
                f"there is no setting {unknown[0][:80]!r} here, only {', '.join(sorted({*known, *also}))}"
            )
        if "size" in given:
            given["width"], given["height"] = _size(given.pop("size"))
        if "prompt" not in given:
            raise RehyatError("a prompt is missing")
        for name, value in given.items():
            if name in _TEXTS:
                if not isinstance(value, str):
                    raise RehyatError(f"{name} must be a text, not {str(value)[:80]!r}")
            elif isinstance(value, bool) or not isinstance(value, (int, float) if _NUMBERS[name] is float else int):
                raise RehyatError(f"{name} must be a number, not {str(value)[:80]!r}")
        return cls(**given)


def frames_of(message: Mapping[str, Any], fps: int) -> int | None:
    """As many as ``num_frames`` says, else ``seconds`` (a number, or a text as OpenAI's clients have it), else None.

    Raises:
        RehyatError: they are not numbers, or below one frame.
    """
    frames = message.get("num_frames")
    if frames is None:
        seconds = message.get("seconds")
        if seconds is None:
            return None
        with suppress(ValueError):
            seconds = float(seconds) if isinstance(seconds, str) else seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e6:
            raise RehyatError(f"seconds must be a number above 0, not {str(seconds)[:80]!r}")
        return max(1, round(seconds * fps))
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise RehyatError(f"num_frames must be a whole number from 1, not {str(frames)[:80]!r}")
    return frames


def check_rate(message: Mapping[str, Any], fps: int) -> None:
    """
    Raises:
        RehyatError: another number of frames a second is asked for than the model's.
    """
    if message.get("fps") not in (None, fps):
        raise RehyatError(f"fps must be {fps}, the model's own, not {str(message['fps'])[:80]!r}")


def _size(size: Any) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(size))
    if not match:
        raise RehyatError(f"size must be a width and a height as 832x480, not {str(size)[:80]!r}")
    return int(match[1]), int(match[2])
