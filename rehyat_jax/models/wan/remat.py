"""Rematerialisation: what of a block is kept for the backward pass, and what is computed again there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax

from rehyat_jax.attention.kept import KEPT_ATTENTION, KEPT_FEATURES

#: Of a block beside its input, from the least memory to the least work: nothing; the self-attention's output and rows,
#: so that its forward kernel runs once (a hundred MB a block at 32,760 tokens of Wan-1.3B); these, the results of all
#: products with weights, and φ's features (1.6 GB).
Keeps = Literal["nothing", "attention", "products"]

Layer = TypeVar("Layer", bound=Callable[..., Any])


def rematerialised(layer: Layer, keeps: Keeps, *, in_loop: bool) -> Layer:
    """``layer``, of which the backward pass finds its arguments and what ``keeps`` says, and makes the rest again.

    Args:
        in_loop: it is the body of a loop that the compiler does not undo: nothing outside can then be taken for what
            is computed again, and no barriers are needed to prevent that.
    """
    policies = jax.checkpoint_policies
    policy = {
        "nothing": None,
        "attention": policies.save_only_these_names(KEPT_ATTENTION),
        "products": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT_ATTENTION, KEPT_FEATURES)
        ),
    }[keeps]
    return jax.checkpoint(layer, policy=policy, prevent_cse=not in_loop)  # type: ignore[return-value]
