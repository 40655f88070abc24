"""The three networks' weights in every form that people have them in, and the same bytes told from others."""

import json

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from shared.checkpoint import tiny_tokenizer
from transformers import UMT5Config, UMT5EncoderModel

from rehyat_jax.models.checkpoints import (
    load_text_encoder,
    load_transformer,
    load_vae,
    save_text_encoder,
    save_transformer,
    save_vae,
)
from rehyat_jax.weights.registry import REGISTRY
from rehyat_jax.weights.rows import renamed

LOAD = {"transformer": load_transformer, "vae": load_vae, "text_encoder": load_text_encoder}
SAVE = {"transformer": save_transformer, "vae": save_vae, "text_encoder": save_text_encoder}
CLASSES = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel}
COMPONENTS = list(LOAD)
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What the release's config.json says of the transformer below.
ORIGINAL = {
    "model_type": "t2v",
    "dim": 256,
    "ffn_dim": 48,
    "freq_dim": 32,
    "in_dim": 16,
    "num_heads": 2,
    "num_layers": 2,
    "out_dim": 16,
    "text_len": 512,
    "eps": 1e-6,
    "text_dim": 32,
}


def release_networks():
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


def tensors_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"}


def original(component, tensors):
    sizes = {"num_res_blocks": 1} if component == "vae" else {}
    rows = REGISTRY[component].rows(REGISTRY[component].config_type(**sizes))
    return {renamed(name, rows, "diffusers", "original")[0]: tensor for name, tensor in tensors.items()}


def as_dtype(tensors, dtype):
    return {name: tensor.to(TORCH[dtype]) for name, tensor in tensors.items()}


def write_release(folder, models, dtype="float32"):
    """The original release's folder: names, files and formats."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ORIGINAL))
    parts = {name: as_dtype(original(name, tensors_of(model)), dtype) for name, model in models.items()}
    save_file(parts["transformer"], folder / "diffusion_pytorch_model.safetensors")
    torch.save(parts["vae"], folder / "Wan2.1_VAE.pth")
    torch.save(parts["text_encoder"], folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tiny_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    return folder


def write_few_step_file(model, path):
    """As these trainings write: a generator and its average under FSDP's names, beside a critic."""
    named = original("transformer", model.state_dict())
    average = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in named.items()}
    other = {name: tensor + 1 for name, tensor in average.items()}
    torch.save({"generator": other, "generator_ema": average, "critic": other, "step": 600}, path)


def as_stored(tensors):
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def assert_same_bytes(found, expected):
    assert found.keys() == expected.keys()
    assert as_stored(found) == as_stored(expected)


def read_folder(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
