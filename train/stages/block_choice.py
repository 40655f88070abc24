"""Which blocks to convert, and how: from what each loses by it and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from rehyat_jax.errors import ConfigError


def choose_blocks(errors: Sequence[float], count: int) -> tuple[int, ...]:
    """The ``count`` blocks whose errors are smallest, ascending; of equal ones the first.

    Args:
        errors: of each block, as distillation measures it on prompts held out.

    Raises:
        ConfigError: there are not so many, or an error is no number.
    """
    if not 1 <= count <= len(errors):
        raise ConfigError(f"the best {count} of {len(errors)} blocks cannot be chosen")
    _check(np.asarray(errors, float), "errors")
    return tuple(sorted(int(i) for i in np.argsort(np.asarray(errors, float), kind="stable")[:count]))


def choose_candidates(
    errors: Float[np.ndarray, "blocks candidates"],
    milliseconds: Float[np.ndarray, "blocks candidates"],
    *,
    budget: float,
) -> tuple[int, ...]:
    """For each block the number of a candidate, so that their errors' sum is least and their time is within the budget.

    Attention Surgery's choice (arXiv 2509.24899), exact to the microsecond: times are rounded up to whole ones, and a
    table over all times is filled block by block.

    Args:
        errors: of each block as each candidate, such as softmax (0) and several (T_c, T_o).
        milliseconds: measured, of the same; none is negative.
        budget: milliseconds of all blocks together.

    Raises:
        ConfigError: no choice is within the budget, or an entry is no number.
    """
    _check(errors, "errors")
    _check(milliseconds, "milliseconds")
    # The tiny allowance: 0.3 ms times 1000 is 300.00000000000006 in binary.
    cost = np.ceil(milliseconds * 1000 - 1e-6).astype(int)
    most = int(min(math.floor(budget * 1000 + 1e-6), cost.max(axis=1).sum()))
    if most < cost.min(axis=1).sum():
        raise ConfigError(
            f"no choice takes {budget} ms or less: the fastest takes {cost.min(axis=1).sum() / 1000:g} ms"
        )
    # Least error of the blocks so far in at most so many microseconds, and the last block's candidate there.
    best = np.zeros(most + 1)
    chosen = np.zeros((len(errors), most + 1), np.min_scalar_type(errors.shape[1]))
    for block, row in enumerate(errors):
        after = np.full(most + 1, np.inf)
        for candidate, (error, time) in enumerate(zip(row, cost[block], strict=True)):
            if time <= most:
                with_this = best[: most + 1 - time] + error
                better = with_this < after[time:]
                after[time:][better] = with_this[better]
                chosen[block, time:][better] = candidate
        best = after
    answer, left = [], most
    for block in reversed(range(len(errors))):
        answer.append(int(chosen[block, left]))
        left -= cost[block, answer[-1]]
    return tuple(reversed(answer))


def _check(values: np.ndarray, name: str) -> None:
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ConfigError(f"{name} must be numbers of at least 0")
