"""Whole checkpoints of models beside Wan2.1's text-to-video, tiny and random, as diffusers' pipelines write them."""

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from shared.checkpoint import tiny_pipeline
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from rehyat_jax.models.wan.config import VAEConfig

#: Of Wan2.1's image-to-video models.
CLIP = {
    "image_dim": 20,
    "added_kv_proj_dim": 24,
}


def tiny_i2v(folder, *, experts=False, **more):
    """Wan2.1's image-to-video models (``CLIP``), or Wan2.2's two experts."""
    pipeline, options = tiny_pipeline(seed=7, shift=5.0), {}
    config = {name: value for name, value in pipeline.transformer.config.items() if name[0] != "_"}
    torch.manual_seed(8)
    transformers = [
        WanTransformer3DModel.from_config(config | {"in_channels": 36} | more).eval()
        for _ in range(2 if experts else 1)
    ]
    for transformer in transformers:
        for name, parameter in transformer.named_parameters():
            if "image_embedder" in name or "add_" in name:  # these would hardly count
                parameter.requires_grad_(False).copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    if "image_dim" in more:
        sizes = {"hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = CLIPVisionConfig(**sizes, image_size=28, patch_size=14, hidden_act="gelu")
        options["image_encoder"] = CLIPVisionModel(config).eval()
        options["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    if experts:
        options |= {"transformer_2": transformers[1], "boundary_ratio": 0.9}
    parts = {**pipeline.components, "transformer": transformers[0], **options}
    made = WanImageToVideoPipeline(**parts)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made


def tiny_ti2v(folder):
    """The 5B's parts at its channels: 48 of latents, 4x16x16."""
    pipeline = tiny_pipeline(seed=3, shift=5.0)
    torch.manual_seed(4)
    pipeline.register_modules(
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=48,
            out_channels=48,
            text_dim=32,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
        ).eval(),
        vae=AutoencoderKLWan.from_config(
            VAEConfig.wan22().to_dict() | {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1}
        ).eval(),
    )
    pipeline.register_to_config(expand_timesteps=True)
    pipeline.vae_scale_factor_spatial = 16
    pipeline.save_pretrained(folder)
    return pipeline


def tiny_a14b(folder):
    """Wan2.2's two experts."""
    pipeline = tiny_pipeline(seed=5)
    torch.manual_seed(6)
    pipeline.register_modules(transformer_2=WanTransformer3DModel.from_config(pipeline.transformer.config).eval())
    pipeline.register_to_config(boundary_ratio=0.875)
    pipeline.save_pretrained(folder)
    return pipeline
