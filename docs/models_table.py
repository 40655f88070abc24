"""The table of models and settings in ``docs/how-to/models.md``, from the program's own.

``python docs/models_table.py`` writes it anew; a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from rehyat_jax.models.folder import bundled_models, read_defaults, read_scheduler
from rehyat_jax.models.wan.advice import ADVICE
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.variables import abstract_module

PAGE = Path(__file__).parent / "how-to" / "models.md"
_BEGIN, _END = "<!-- made by docs/models_table.py -->\n", "<!-- end -->\n"
_CONFIGS = {
    "Wan2.1-T2V-1.3B": WanConfig.t2v_1_3b,
    "Wan2.1-T2V-14B": WanConfig.t2v_14b,
    "Wan2.1-I2V-14B": WanConfig.i2v_14b,
    "Wan2.1-FLF2V-14B": WanConfig.flf2v_14b,
    "Wan2.2-TI2V-5B": WanConfig.ti2v_5b,
    "Wan2.2-T2V-A14B": WanConfig.t2v_14b,
    "Wan2.2-I2V-A14B": WanConfig.i2v_a14b,
}
_HEAD = (*("model", "size", "frames", "a second", "steps", "guidance", "shift", "transformer", "command"),)


def rows() -> Iterator[tuple[str, ...]]:
    """The bundled models, then the published ones as their authors run them."""
    for name, folder in bundled_models().items():
        defaults, (schedule, _) = read_defaults(folder), read_scheduler(folder)
        guidance = f"{defaults.guidance_scale:g}" if defaults.guidance_scale > 1 else "none"
        offered = f" ({', '.join(map(str, defaults.offered_steps))})" if defaults.offered_steps else ""
        yield (
            name,
            f"{defaults.width}x{defaults.height}",
            str(defaults.num_frames),
            str(defaults.fps),
            f"{defaults.num_inference_steps}{offered}",
            guidance,
            f"{schedule.shift:g}",
            _gigabytes(WanConfig.mini_sprites(), 4),
            f'`rehyat generate "…" --model {name}`',
        )
    for advice in ADVICE:
        first = next(each for each in ADVICE if each.model == advice.model) is advice
        second = "" if advice.guidance_scale_2 is None else f", then {advice.guidance_scale_2:g}"
        image = " --image a.png" if "-I2V" in advice.model or "FLF2V" in advice.model else ""
        image += " --last-image b.png" if "FLF2V" in advice.model else ""
        yield (
            advice.model,
            f"{advice.width}x{advice.height}",
            str(advice.num_frames),
            str(advice.fps),
            str(advice.num_inference_steps),
            f"{advice.guidance_scale:g}{second}",
            f"{advice.shift:g}",
            ("2 × " if advice.boundary_ratio else "") + _gigabytes(_CONFIGS[advice.model](), 2),
            f'`rehyat generate "…" --model ~/{advice.model} --dtype bfloat16'
            f"{image}{'' if first else f' --size {advice.width}x{advice.height}'}`",
        )


def _gigabytes(config: WanConfig, each: int) -> str:
    kinds = {"dtype": jnp.dtype(jnp.float32), "param_dtype": jnp.dtype(jnp.float32)}
    module = abstract_module(WanTransformer, config, **kinds)
    size = sum(leaf.size for leaf in jax.tree.leaves(module))
    return f"{each * size / 1e9:.2g} GB"


def table() -> str:
    lines = [_HEAD, ("---",) * len(_HEAD), *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def written(page: str) -> str:
    """The page with the table as it is now."""
    return re.sub(f"{_BEGIN}.*?{_END}", lambda _: f"{_BEGIN}\n{table()}\n{_END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), encoding="utf-8")
