"""What LoRA files call their tensors: one grammar for all dialects.

A name is prefixes, a module's name and a kind (``lora_A.weight``, ``alpha``, ``diff_b``, …). Modules are looked up in a
table made of the model's own names, its dots as underscores: so ``k_img`` is never cut at its underscore, and dotted,
underscored and mixed forms are found alike.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from rehyat_jax.weights.registry import unwrapped

#: Of a low-rank pair ``down`` [r, in] and ``up`` [out, r], and ``alpha``, by which it is scaled; of differences that
#: are added as they are: ``diff`` to a weight, ``diff_b`` to a bias, ``diff_m`` to a modulation.
Kind = Literal["down", "up", "alpha", "diff", "diff_b", "diff_m"]

#: PEFT puts an adapter's name ("default") before ``.weight``.
_END = r"(\.(?!weight$|bias$)[\w-]+)?(\.weight)?"
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("down", re.compile(rf"[._]lora(_A|_down|_linear_layer\.down|\.down){_END}", re.ASCII)),
    ("up", re.compile(rf"[._]lora(_B|_up|_linear_layer\.up|\.up){_END}", re.ASCII)),
    ("alpha", re.compile(r"([._]lora)?\.alpha", re.ASCII)),
    ("diff_b", re.compile(r"\.diff_b")),
    ("diff_m", re.compile(r"\.diff_m")),
    ("diff", re.compile(r"\.diff")),
)
#: What a module's name goes on with in the model, for a kind: the first that is there.
TARGETS: Mapping[Kind, tuple[str, ...]] = {
    "down": ("_weight",),
    "up": ("_weight",),
    "alpha": ("_weight",),
    "diff": ("_weight", ""),
    "diff_b": ("_bias",),
    "diff_m": ("_modulation",),
}
#: Put before modules' names by programs, in any order and number.
_PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "generator_lora_",
    "generator_ema_",
    "generator_",
    "base_model_model_",
    "diffusion_model_",
    "transformer_",
    "module_",
    "model_",
    "unet_",
    "pipe_",
    "dit_",
    "net_",
)
#: Adapters that are no LoRA, by their tensors' names.
OTHERS = {
    "a LoHa": re.compile(r"[._]hada_"),
    "a LoKr": re.compile(r"[._]lokr_"),
    "a DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "an OFT": re.compile(r"[._](oft|boft)_"),
}


@dataclasses.dataclass(frozen=True)
class Name:
    """A tensor's name, parsed."""

    #: Prefixes and all, as the file has it.
    module: str
    kind: Kind


def parse(name: str) -> Name | None:
    """None: no tensor of a LoRA."""
    for kind, pattern in _KINDS:
        for match in pattern.finditer(name):
            if match.end() == len(name) and match.start():
                return Name(name[: match.start()], kind)
    return None


def is_lora(names: Iterable[str]) -> bool:
    """Does a file with tensors of these names change a network, in the place of being one?"""
    return any(
        any(pattern.search(name) for pattern in OTHERS.values())
        or ((found := parse(name)) is not None and found.kind != "alpha")
        for name in names
    )


def spelled(module: str) -> Iterator[str]:
    """What a module may be called in a table of `underscored` names: with all its prefixes, with one fewer, …"""
    name = underscored(module)
    while name:
        yield name
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return
        name = name.removeprefix(prefix)


def underscored(name: str) -> str:
    return unwrapped(name).replace(".", "_")


def dialect_of(names: Iterable[str], *, configured: bool) -> str:
    """A file's way of naming, in words.

    Args:
        configured: an ``adapter_config.json`` belongs to it.
    """
    names = list(names)
    every = "\n".join(names)
    parsed = [found for name in names if (found := parse(name)) is not None]
    alpha = ", with alpha" if any(found.kind == "alpha" for found in parsed) else ""
    differences = ", with differences" if any(found.kind.startswith("diff") for found in parsed) else ""
    if "generator_lora." in every:
        return "PEFT names under generator_lora"
    if any(name.startswith("lora_unet_") for name in names):
        dotted = any("." in found.module for found in parsed)
        return f"kohya{', dotted' if dotted else ''}{alpha}{differences}"
    if "diffusion_model." in every:
        return f"ComfyUI{alpha}{differences}"
    if configured or "base_model.model." in every:
        return f"PEFT{alpha}{differences}"
    own = (
        "diffusers" if ".attn1." in every or ".attn2." in every or "condition_embedder." in every else "original names"
    )
    return f"{own}{alpha}{differences}"
