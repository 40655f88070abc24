"""The prompts of a run as sampling takes them: embeddings without the zeros that end all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

#: Lengths are rounded up to multiples of this, so that there are few programs to compile.
_BUCKET = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padded:
    """Embeddings of the first tokens of texts, or what a model made of these: zeros stand after them."""

    #: With a leading axis of guidance's evaluations: prompts, then negative prompts.
    values: Any
    #: As many tokens as are attended to, the zeros among them.
    tokens: int = dataclasses.field(metadata={"static": True})


def trimmed(text: Float[Array, "evaluations B L D"]) -> Padded:
    """Without the zeros that all end with, up to a multiple of 64 tokens. They cost one token: a transformer is told
    how many there are."""
    used = np.flatnonzero(np.asarray(jnp.any(text != 0, axis=(0, 1, 3))))
    length = int(used[-1]) + 1 if len(used) else 1
    return Padded(text[..., : -(-length // _BUCKET) * _BUCKET, :], text.shape[-2])
