"""What a caller may name, as types: read before JAX is loaded."""

from __future__ import annotations

from typing import Final, Literal

#: The c of ``exp(q·k/√D − c)``, which the linear part is not divided by: the largest score (ReHyAt, as printed), the
#: logarithm of the softmax part's sum, or 0.
Stabilizer = Literal["row_max", "lse", "none"]

#: What keeps φ's output positive before the powers.
Positive = Literal["softplus", "exp", "none"]

#: By ``jax.ad_checkpoint.checkpoint_name``: attention's output and the rows of its normaliser, with which the backward
#: kernels need no forward one; and φ's features.
KEPT_ATTENTION: Final = "rehyat_attention"
KEPT_FEATURES: Final = "rehyat_features"
