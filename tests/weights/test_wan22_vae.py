"""Wan2.2's autoencoder in every dialect: byte-equal tensors out, and recognised without a configuration."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from shared.tiers import breadth

from rehyat_jax.models.checkpoints import convert, describe, load_vae, save_vae
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.models.wan.vae_rows import vae_rows
from rehyat_jax.weights.rows import renamed

#: As the original file holds it, without a configuration: Wan2.2's widths are read from its shapes.
CONFIG = dataclasses.replace(VAEConfig.wan22(), base_dim=4, decoder_base_dim=6, num_res_blocks=1)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return AutoencoderKLWan.from_config(CONFIG.to_dict()).requires_grad_(False)


def original(tensors):
    rows = vae_rows(CONFIG)
    return {renamed(name, rows, "diffusers", "original")[0]: tensor for name, tensor in tensors.items()}


def in_diffusers_layout(model, folder):
    model.save_pretrained(folder)
    return folder


def as_the_original_file(model, folder):
    folder.mkdir()
    torch.save(original(model.state_dict()), folder / "Wan2.2_VAE.pth")
    return folder / "Wan2.2_VAE.pth"


def as_one_file_in_diffusers_names(model, folder):
    folder.mkdir()
    save_file({f"vae.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "vae.safetensors")
    return folder / "vae.safetensors"


@pytest.mark.parametrize(
    "form", breadth([as_the_original_file, in_diffusers_layout, as_one_file_in_diffusers_names], test=2)
)
def test_every_dialect_comes_out_byte_equal(form, theirs, tmp_path):
    source = form(theirs, tmp_path / "in")
    assert describe(source).components[0].config == CONFIG
    save_vae(load_vae(source), tmp_path / "saved")
    convert(source, tmp_path / "converted")
    for folder in ("saved", "converted"):
        found = load_file(tmp_path / folder / "diffusion_pytorch_model.safetensors")
        expected = theirs.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        # Its configuration is whole: diffusers opens it.
        assert AutoencoderKLWan.from_pretrained(tmp_path / folder).config.is_residual
