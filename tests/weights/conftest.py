"""The three networks, small enough to be written and read often."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel


@pytest.fixture(scope="module")
def models():
    """Random networks with Wan's heads of 128 and Wan's VAE stages, so that the original release can hold them."""
    torch.manual_seed(0)
    made = {
        "transformer": WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=48, num_layers=2
        ),
        "vae": AutoencoderKLWan(base_dim=4, num_res_blocks=1),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
    }
    for module in made.values():
        module.eval().requires_grad_(False)
        for tensor in module.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.2)
    return made
