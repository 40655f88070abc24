"""transformers' UMT5 encoder with random weights, and ours with the same."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import UMT5Config, UMT5EncoderModel

from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder


def reference(config: TextEncoderConfig, seed: int) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    model = UMT5EncoderModel(UMT5Config(**config.to_dict())).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm scales that differ from one, biases large enough to matter.
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def ported(model: UMT5EncoderModel, config: TextEncoderConfig, **options) -> UMT5Encoder:
    """Our encoder with the weights of theirs."""
    theirs = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def stacked(name: str, *, transpose: bool = False) -> jax.Array:
        layers = [theirs[f"encoder.block.{i}.layer.{name}.weight"] for i in range(config.num_layers)]
        return jnp.asarray(np.stack([layer.T if transpose else layer for layer in layers]))

    encoder = nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0), **options))
    block = encoder.block
    encoder.shared.embedding.set_value(jnp.asarray(theirs["shared.weight"]))
    encoder.final_layer_norm.scale.set_value(jnp.asarray(theirs["encoder.final_layer_norm.weight"]))
    block.self_attention_norm.scale.set_value(stacked("0.layer_norm"))
    block.ffn_norm.scale.set_value(stacked("1.layer_norm"))
    block.self_attention.relative_attention_bias.embedding.set_value(stacked("0.SelfAttention.relative_attention_bias"))
    for name in "qkvo":
        getattr(block.self_attention, name).kernel.set_value(stacked(f"0.SelfAttention.{name}", transpose=True))
    for name in ("wi_0", "wi_1", "wo"):
        getattr(block.ffn, name).kernel.set_value(stacked(f"1.DenseReluDense.{name}", transpose=True))
    return encoder


def by_us(encoder: UMT5Encoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    graph, weights = nnx.split(encoder)
    return np.asarray(jax.jit(lambda weights: nnx.merge(graph, weights)(ids, mask))(weights))
