"""A whole Wan checkpoint of tiny, random networks, written by diffusers' own ``WanPipeline.save_pretrained``."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer over letters with T5's special tokens and its final </s>."""
    letters = "▁abcdefghijklmnopqrstuvwxyz.,!0123456789"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -3.0) for c in letters), ("▁a", -1.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_pipeline(*, seed: int = 0, patch: tuple[int, int, int] = (1, 2, 2), shift: float = 3.0) -> WanPipeline:
    """Random networks with activations of order one."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=patch,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
    )
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    for module in (transformer, vae, text_encoder):
        module.eval().requires_grad_(False)
    pipeline = WanPipeline(
        tokenizer=tiny_tokenizer(), text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_checkpoint(folder: Path, **kwargs) -> WanPipeline:
    pipeline = tiny_pipeline(**kwargs)
    pipeline.save_pretrained(folder)
    return pipeline
