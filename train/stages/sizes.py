"""What a configuration says of its model, against the model that is there."""

from __future__ import annotations

from pathlib import Path

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.folder import find_model
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


def whole_model(name: Path) -> Path:
    """The folder of a bundled model's name or a path.

    Raises:
        CheckpointError: it is no whole model.
    """
    folder = find_model(name)
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is no whole model in the diffusers layout; rehyat convert can make one")
    return folder
