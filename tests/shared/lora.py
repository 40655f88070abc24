"""A LoRA of random numbers for a Wan transformer, written as each program writes it, and merged by hand."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rehyat_jax.models.wan.rows import TRANSFORMER
from rehyat_jax.weights.rows import renamed

#: Where trainers put adapters, by the original's names.
PLACES = tuple(f"{attention}.{letter}" for attention in ("self_attn", "cross_attn") for letter in "qkvo") + (
    "ffn.0",
    "ffn.2",
)
RANK, ALPHA = 3, 2.0


@dataclasses.dataclass(frozen=True)
class Pair:
    down: torch.Tensor
    up: torch.Tensor


def diffusers_name(module: str) -> str:
    """Of a module by the original's name."""
    name = renamed(f"{module}.weight", TRANSFORMER, "original", "diffusers")[0]
    assert name is not None, module
    return name.removesuffix(".weight")


def random_lora(shapes: dict[str, torch.Size], modules: Iterable[str], *, seed: int = 0) -> dict[str, Pair]:
    """For these modules, by the original's names; ``shapes`` are of the weights by diffusers' names."""
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for module in modules:
        out, *inputs = shapes[f"{diffusers_name(module)}.weight"]
        scale = (RANK * int(np.prod(inputs))) ** -0.5
        down = torch.randn((RANK, *inputs), generator=generator) * scale
        pairs[module] = Pair(down, torch.randn((out, RANK, *(1 for _ in inputs[1:])), generator=generator))
    return pairs


def everywhere(layers: int) -> list[str]:
    return [f"blocks.{i}.{place}" for i in range(layers) for place in PLACES]


Tensors = dict[str, torch.Tensor]


def ab(lora: dict[str, Pair], name: Callable[[str], str], *, down: str = ".lora_A.weight", up: str = ".lora_B.weight"):
    return {f"{name(m)}{end}": x for m, p in lora.items() for end, x in ((down, p.down), (up, p.up))}


def alphas(lora: dict[str, Pair], name: Callable[[str], str], alpha: float = ALPHA) -> Tensors:
    return {f"{name(module)}.alpha": torch.tensor(alpha) for module in lora}


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def kohya_dotted(module: str) -> str:
    block, number, rest = module.split(".", 2)
    return f"lora_unet_{block}_{number}.{rest}"


def comfy(module: str) -> str:
    return f"diffusion_model.{module}"


#: How each dialect is written into a folder (and the path to load); with the scale that it stands for.
def written(dialect: str, lora: dict[str, Pair], folder: Path) -> tuple[Path, float]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "style.safetensors"
    old = {"down": ".lora_down.weight", "up": ".lora_up.weight"}
    half = ALPHA / RANK
    match dialect:
        case "diffusers":
            save_file(ab(lora, lambda m: f"transformer.{diffusers_name(m)}"), file)
            return file, 1.0
        case "diffusers, header":
            targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
            config = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.target_modules": targets}
            config |= {"transformer.rank_pattern": {}, "transformer.alpha_pattern": {}}
            metadata = {"lora_adapter_metadata": json.dumps(config), "format": "pt"}
            save_file(ab(lora, lambda m: f"transformer.{diffusers_name(m)}"), file, metadata=metadata)
            return file, half
        case "PEFT folder" | "PEFT folder, rslora":
            config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": "rslora" in dialect}
            (folder / "adapter_config.json").write_text(json.dumps(config))
            save_file(ab(lora, lambda m: f"base_model.model.{diffusers_name(m)}"), folder / "adapter_model.safetensors")
            return folder, ALPHA / RANK**0.5 if "rslora" in dialect else half
        case "ComfyUI":
            save_file(ab(lora, comfy), file)
            return file, 1.0
        case "ComfyUI, alpha":
            save_file(ab(lora, comfy, **old) | alphas(lora, comfy), file)
            return file, half
        case "kohya":
            save_file(ab(lora, kohya, **old) | alphas(lora, kohya), file)
            return file, half
        case "kohya, alpha 0":
            save_file(ab(lora, kohya, **old) | alphas(lora, kohya, 0.0), file)
            return file, 1.0
        case "kohya, dotted":
            save_file(ab(lora, kohya_dotted, **old) | alphas(lora, kohya_dotted), file)
            return file, half
        case "original names":
            save_file(ab(lora, str), file)
            return file, 1.0
        case "transformer. and original names":
            save_file(ab(lora, lambda m: f"transformer.{m}"), file)
            return file, 1.0
        case ".lora.down":
            save_file(ab(lora, comfy, down=".lora.down.weight", up=".lora.up.weight"), file)
            return file, 1.0
        case "_lora.down":
            save_file(ab(lora, comfy, down="_lora.down.weight", up="_lora.up.weight"), file)
            return file, 1.0
        case "lora_A.default":
            ends = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}
            save_file(ab(lora, lambda m: f"base_model.model.{m}", **ends), file)
            return file, 1.0
        case "generator_lora":
            file = file.with_suffix(".pt")
            inner = ab(lora, lambda m: f"base_model.model.model.{m}")
            torch.save({"generator_lora": inner, "critic_lora": ab(lora, lambda m: f"x.{m}"), "step": 7}, file)
            return file, 1.0
    raise AssertionError(dialect)


#: Those that diffusers loads too, and as they are meant.
BY_DIFFUSERS = (
    "ComfyUI",
    "kohya",
    "diffusers",
    "diffusers, header",
    "ComfyUI, alpha",
)
OTHERS = (
    "PEFT folder, rslora",
    "kohya, dotted",
    "generator_lora",
    "PEFT folder",
    "kohya, alpha 0",
    "original names",
    "transformer. and original names",
    ".lora.down",
    "_lora.down",
    "lora_A.default",
)


def merged(
    weights: Tensors, lora: dict[str, Pair], strength: float, differences: Tensors | None = None
) -> dict[str, np.ndarray]:
    """Weights by diffusers' names with a LoRA in them, in float64; ``differences`` are by diffusers' names too."""
    out = {name: tensor.double() for name, tensor in weights.items()}
    for module, pair in lora.items():
        name = f"{diffusers_name(module)}.weight"
        product = pair.up.double().flatten(1) @ pair.down.double().flatten(1)
        out[name] = out[name] + strength * product.reshape(out[name].shape)
    for name, difference in (differences or {}).items():
        out[name] = out[name] + strength * difference.double()
    return {name: tensor.numpy() for name, tensor in out.items()}
