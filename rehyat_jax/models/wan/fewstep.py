"""Few-step models as their authors publish them: which a file is, and how it is run.

A causal family is a softmax model whose blocks of frames see the blocks before them in a window, with the video's first
frames as sinks: here the ``window`` mixer, in every block.

Sources: guandeh17/Self-Forcing ``configs/self_forcing_dmd.yaml``; thu-ml/Causal-Forcing; tianweiy/CausVid
``configs/wan_causal_dmd.yaml``; NVlabs/LongLive ``configs/longlive_inference.yaml``; ModelTC/Wan2.2-Lightning;
NVlabs/rcm.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rehyat_jax.mixers.config import HybridConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStep:
    """A family of published few-step models."""

    name: str
    #: Of a file's name.
    called: re.Pattern[str]
    #: What its models are run with, by the names of ``rehyat_defaults.json``.
    defaults: Mapping[str, Any]
    #: How its blocks attend; None: as the teacher's, to the whole video.
    conversion: HybridConfig | None

    def __str__(self) -> str:
        said = ", ".join(f"{name} {value}" for name, value in self.defaults.items())
        if self.conversion is None:
            return f"{self.name}: {said}; all frames at once"
        window = self.conversion.chunk_frames + self.conversion.overlap_frames
        sinks = f" and {self.conversion.sink_frames} sinks" if self.conversion.sink_frames else ""
        return f"{self.name}: {said}; blocks of {self.conversion.chunk_frames} in a window of {window}{sinks}"


#: 1000, 750, 500, 250, shifted by 5; the finished block, clean, is what later ones see.
_FOUR = {"num_inference_steps": 4, "guidance_scale": 1.0, "grid": "warped", "shift": 5.0}
_FRESH = {"solver": "Renoise", "remember": 0.0}
#: Blocks of three latent frames; the training's videos have 21.
_WINDOW = HybridConfig(kind="window", chunk_frames=3, overlap_frames=18)


def _family(name: str, called: str, defaults: Mapping[str, Any], conversion: HybridConfig | None) -> FewStep:
    return FewStep(name=name, called=re.compile(called, re.IGNORECASE), defaults=defaults, conversion=conversion)


#: The first whose name a file's has; a training's file (`_TRAINED`) of none of them is run as Self-Forcing's.
FAMILIES = (
    _family("Reward-Forcing", r"reward.?forcing", _FOUR | _FRESH, _WINDOW),
    _family("Causal-Forcing", r"causal.?forcing", _FOUR | _FRESH, _WINDOW),
    _family(
        "LongLive",
        r"long.?live",
        _FOUR | _FRESH,
        dataclasses.replace(_WINDOW, overlap_frames=9, sink_frames=3),
    ),
    _family(
        "CausVid",
        r"caus.?vid",
        {"num_inference_steps": 3, "guidance_scale": 1.0, "grid": "causvid", "shift": 8.0} | _FRESH,
        _WINDOW,
    ),
    _family("rCM", r"(?<![a-z])rcm", {"num_inference_steps": 4, "guidance_scale": 1.0, "grid": "rcm"} | _FRESH, None),
    _family("lightx2v", r"lightx2v|lightning|step.?distill", _FOUR | {"solver": "Euler"}, None),
    _family("Self-Forcing", r"self.?forcing", _FOUR | _FRESH, _WINDOW),
)
_TRAINED = re.compile(r"generator(_ema)?\.(model|_fsdp_wrapped_module)\.")


def few_step_family(weights: Path, names: Iterable[str]) -> FewStep | None:
    """The family of a file, by its name and by its tensors' names; None where neither tells."""
    if named := next((family for family in FAMILIES if family.called.search(weights.name)), None):
        return named
    return FAMILIES[-1] if any(_TRAINED.match(name) for name in names) else None
