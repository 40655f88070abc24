"""What a made video says of how it was made, by the names that other programs look for.

``parameters`` is the text that A1111's readers know, ``comment`` the same as JSON, which players and VideoHelperSuite
show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

#: A1111's words for settings, in its order.
_WORDS = {
    "num_inference_steps": "Steps",
    "solver": "Sampler",
    "grid": "Schedule type",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "loras": "LoRA",
    "shift": "Shift",
    "num_frames": "Frames",
}


def generation_metadata(
    *,
    prompt: str,
    negative_prompt: str,
    seed: int,
    model: str,
    settings: Mapping[str, Any],
    loras: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, str]:
    """The entries ``parameters`` and ``comment``.

    Args:
        settings: resolved ones, by the names of :class:`~rehyat_jax.sampling.settings.Settings`; whatever JSON does
            not know is told as text.
        loras: strengths by name.
    """
    schedule = settings.get("schedule")
    told = {
        **(schedule if isinstance(schedule, Mapping) else {}),
        **settings,
        "seed": seed,
        "model": model,
        "loras": ", ".join(f"{name}:{strength:g}" for name, strength in loras.items()) or None,
        "size": f"{settings.get('width')}x{settings.get('height')}",
    }
    lines = [prompt, *([f"Negative prompt: {negative_prompt}"] if negative_prompt else [])]
    lines.append(", ".join(f"{word}: {told[name]}" for name, word in _WORDS.items() if told.get(name) is not None))
    entries = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "model": model,
        **({"loras": dict(loras)} if loras else {}),
        "settings": dict(settings),
        "made_by": "rehyat",
    }
    texts = {"parameters": "\n".join(lines), "comment": json.dumps(entries, default=str, ensure_ascii=False)}
    # Neither half a surrogate nor a zero can stand in a file's text.
    return {name: text.encode("utf-8", "replace").decode().replace("\0", "") for name, text in texts.items()}
