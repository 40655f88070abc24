"""What a caller may name, as types: read before JAX is loaded."""

from __future__ import annotations

from typing import Literal

#: The c of ``exp(q·k/√D − c)``, which the linear part is not divided by: the largest score (ReHyAt, as printed), the
#: logarithm of the softmax part's sum, or 0.
Stabilizer = Literal["row_max", "lse", "none"]

#: What keeps φ's output positive before the powers.
Positive = Literal["softplus", "exp", "none"]
