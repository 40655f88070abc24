"""What memory training takes, from sizes alone: before weights are read.

A fit to XLA's own account of the compiled rounds, as `rehyat_jax.models.memory` is; honest to a factor of three
(``tests/train/test_training_memory.py``): what a backward pass keeps depends on how the compiler schedules it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.remat import Keeps
from train.engine.optimizer import OptimizerConfig

#: Arrays [B, N, dim] that a block keeps for its backward pass, beside two of its feed-forward's width.
_KEPT = 45.0
#: The same, where it is computed again: by what is kept of it (`Keeps`), its input among them; of products, also one of
#: its feed-forward's width.
_REMATERIALISED: dict[Keeps, float] = {"nothing": 1.0, "attention": 2.0, "products": 13.0}


def learner_bytes(parameters: int, optimizer: OptimizerConfig) -> int:
    """Float32 parameters, their averages, gradients and moments; and the parameters in the dtype of the computation."""
    moments = 1 if optimizer.method == "muon" else 2
    return parameters * 4 * (4 + moments)


def adapted_learner_bytes(
    model: WanConfig, parameters: int, optimizer: OptimizerConfig, *, rank: int, base: int = 4
) -> int:
    """As `learner_bytes`, or of adapters of a rank above 0 beside frozen parameters of so many bytes each: a pair for
    each of a block's eight square layers and the two of its feed-forward."""
    if not rank:
        return learner_bytes(parameters, optimizer)
    wide = model.num_layers * (8 * 2 * model.dim + 2 * (model.dim + model.ffn_dim)) * rank
    return base * parameters + learner_bytes(wide, optimizer)


def backward_bytes(
    model: WanConfig, *, tokens: int, clips: int, dtype: DTypeLike, remat: Keeps | None, text_tokens: int = 512
) -> int:
    """What a pass with its gradient keeps.

    Args:
        tokens: of a clip.
        clips: that go through together on one device.
        remat: what is kept of each block beside its input, one of which at a time is computed again; None: all.
    """
    size = jnp.dtype(dtype).itemsize
    block = clips * tokens * (_KEPT * model.dim + 2 * model.ffn_dim) * size
    scores = clips * model.num_attention_heads * tokens * text_tokens * 4  # of the text's attention
    if remat is None:
        return int(model.num_layers * (block + scores))
    kept = _REMATERIALISED[remat] * model.dim + (model.ffn_dim if remat == "products" else 0)
    return int(model.num_layers * clips * tokens * kept * size + block + scores)
