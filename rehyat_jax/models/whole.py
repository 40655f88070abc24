"""A model as it is run, written as a folder that is loaded again, or put on the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.checkpoints import convert, save_transformer
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.arguments import user_path
from rehyat_jax.weights.writing import whole_folder


def save_model(source: Path, transformer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a model in the diffusers layout: the parts of the folder that it was read from, and its transformer as it
    is now (converted on loading, with LoRAs in its weights, trained).

    Args:
        folder: new or empty; it appears whole or not at all.

    Raises:
        CheckpointError: the source is no whole model any more, the folder is not empty or cannot be written, or the
            transformer is of a kind that has no form on disk.
    """
    if not isinstance(transformer, WanTransformer):
        raise CheckpointError("a model of two experts is written by rehyat convert, with its LoRAs")
    with whole_folder(user_path("folder", folder)) as partial:
        convert(source, partial / "model")
        for part in (partial / "model").iterdir():
            part.rename(partial / part.name)
        (partial / "model").rmdir()
        shutil.rmtree(partial / "transformer")
        save_transformer(transformer, partial / "transformer")


def push_model(
    source: Path, transformer: Any, repository: str, *, private: bool | None = None, message: str | None = None
) -> str:
    """Put a model into a repository of the Hugging Face hub, which is made if need be, as the user who is logged in.

    Args:
        repository: "OWNER/NAME".
        private: None: as the owner's default is; an existing repository stays as it is.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: as `save_model`; huggingface_hub is not installed, or the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        how = "pip install 'rehyat-jax[hub]'"
        raise CheckpointError(f"to push {repository}, install huggingface_hub ({how})") from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        save_model(source, transformer, folder)
        try:
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message or "A model of rehyat_jax"
            )
        except Exception as error:  # the client's own kinds of error, its network library's, and OSErrors
            why = str(error).strip().split("\n")[0][:300]
            raise CheckpointError(f"cannot push to {repository} on the Hugging Face hub: {why}") from error
    return str(commit.commit_url)
