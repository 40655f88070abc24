"""ComfyUI's folders as one model: each network's file in the folder that ComfyUI keeps it in."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from shared.checkpoint import save_tiny_checkpoint

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.checkpoints import describe, load_text_encoder, load_transformer, load_vae
from rehyat_jax.text.prompt_encoder import PromptEncoder

FOLDERS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny checkpoint in the diffusers layout, and its files as ComfyUI keeps them."""
    plain, comfy = (tmp_path_factory.mktemp(name) for name in ("plain", "comfy"))
    save_tiny_checkpoint(plain)
    for part, folder in FOLDERS.items():
        (comfy / folder).mkdir()
        (weights,) = (plain / part).glob("*.safetensors")
        shutil.copyfile(weights, comfy / folder / f"wan_tiny_{part}.safetensors")
        shutil.copyfile(plain / part / "config.json", comfy / folder / "config.json")
    shutil.copyfile(plain / "tokenizer" / "tokenizer.json", comfy / "tokenizer.json")
    (comfy / "loras").mkdir()
    return plain, comfy


@pytest.mark.parametrize("load", [load_transformer, load_vae, load_text_encoder])
def test_each_network_is_found_in_its_folder(folders, load):
    plain, comfy = (nnx.state(load(folder)) for folder in folders)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, plain, comfy)))


def test_the_folder_is_a_whole_model(folders):
    plain, comfy = folders
    assert (
        PromptEncoder(comfy).tokenizer.encode("a cat").ids.tolist()
        == PromptEncoder(plain).tokenizer.encode("a cat").ids.tolist()
    )
    assert {part.name for part in describe(comfy).components} == set(FOLDERS)


def test_several_models_are_told_apart_by_keeping_one(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "two")
    files = tmp_path / "two" / "diffusion_models"
    (files / "config.json").unlink()
    shutil.copyfile(files / "wan_tiny_transformer.safetensors", files / "other_transformer.safetensors")
    with pytest.raises(
        CheckpointError, match=r"diffusion_models holds more than one set of weights for a Wan transformer"
    ):
        load_transformer(tmp_path / "two")
