"""What a configuration says of its model, against the model that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.folder import find_model, read_traits
from rehyat_jax.models.wan.config import WanConfig


def check_sizes(said: WanConfig | None, found: WanConfig, *, where: Path) -> None:
    """
    Raises:
        ConfigError: the model at ``where`` is of other sizes than the configuration says.
    """
    for name in ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim"):
        if said is not None and getattr(said, name) != getattr(found, name):
            raise ConfigError(
                f"{where} has {name} {getattr(found, name)}, and the configuration's model {getattr(said, name)}"
            )


def whole_model(name: Path, *, expert: Literal["high", "low"] | None = None) -> Path:
    """The folder of a bundled model's name or a path.

    Args:
        expert: of a model of two, the one that is to learn.

    Raises:
        CheckpointError: it is no whole model.
        ConfigError: it has two experts and none is named, or one is named and it has one transformer.
    """
    folder = find_model(name)
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is no whole model in the diffusers layout; rehyat convert can make one")
    two = read_traits(folder).boundary_ratio is not None
    if two and expert is None:
        raise ConfigError(
            f"{folder} has two experts by noise level, of which rehyat distill and finetune train one: "
            "--expert high or low"
        )
    if expert is not None and not two:
        raise ConfigError(f"{folder} has one transformer: leave expert out")
    return folder
