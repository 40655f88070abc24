"""Arrays and states that do not fit one another, refused in one sentence."""

from __future__ import annotations

from typing import Any

import jax

from rehyat_jax.errors import RehyatError


def check_alike(**arrays: jax.Array) -> None:
    """[batch, tokens, heads, width] and of one shape; raises RehyatError."""
    (first, like), *others = arrays.items()
    if like.ndim != 4 or like.shape[1] < 1:
        raise RehyatError(f"{first} must be [batch, tokens, heads, width] with at least one token, not {like.shape}")
    for name, array in others:
        if array.shape != like.shape:
            raise RehyatError(f"{name} is {array.shape} where {first} is {like.shape}")


def check_state(state: Any, empty: Any) -> None:
    """Shapes and dtypes of ``empty``, where there is a state; raises RehyatError."""
    if state is None:
        return
    for name, got, want in zip(empty._fields, state, empty, strict=True):
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise RehyatError(
                f"the state's {name} is {got.dtype}{list(got.shape)} where {want.dtype}{list(want.shape)} was expected"
            )
