"""A training of a few numbers, whose loop is the real one."""

from io import StringIO
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from shared.training import problem

from train.engine.loop import Rhythm, run
from train.engine.optimizer import OptimizerConfig

TOY = OptimizerConfig(learning_rate=0.05)


@jax.jit
def toy_step(state, key):
    gradients = jax.tree.map(lambda p: p + jax.random.normal(key, p.shape), state.params)
    return TOY.apply(state, gradients, jnp.float32(0.01)), optax.tree.norm(state.params)


def toy_run(folder: Path, *, steps: int, hook=lambda step: None, checkpoint_seconds: float = 0.0):
    """Rounds of two steps, whose noise depends on the step alone."""
    console = Console(file=StringIO(), width=200)

    def advance(state, step):
        hook(step)
        for i in range(2):
            state, norm = toy_step(state, jax.random.fold_in(jax.random.key(0), step + i))
        return state, {"norm": norm}

    state = run(
        TOY.init(problem()),
        advance,
        Rhythm(steps=steps, steps_per_advance=2, checkpoint_seconds=checkpoint_seconds),
        folder=folder,
        console=console,
    )
    return state, console.file.getvalue()
