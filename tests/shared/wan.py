"""diffusers' Wan transformer with random weights, ours with the same, and the same call of both."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from flax import nnx
from shared.programs import FOR_SPEED

from rehyat_jax.models.checkpoints import load_transformer
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer

TINY = WanConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=37,
    in_channels=4,
    out_channels=4,
    text_dim=19,
    freq_dim=34,
)


@dataclasses.dataclass(frozen=True)
class Case:
    config: WanConfig
    #: T, H, W.
    sizes: tuple[int, int, int]
    text: int
    #: One a sample.
    times: tuple[float, ...]


#: Of three blocks, to be converted: some of them and all.
STUDENT = dataclasses.replace(TINY, num_layers=3)
#: Seven latent frames of 2 × 3 tokens: no multiple of a chunk of three or two.
STUDENT_CASE = Case(STUDENT, (7, 4, 6), 5, (500.0, 31.5))


def reference(config: WanConfig, seed: int) -> WanTransformer3DModel:
    """diffusers' model with every parameter random, such that activations stay of order one."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel.from_config(config.to_dict()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif name.endswith("scale_shift_table"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def ported(model: WanTransformer3DModel, folder: Path, **options) -> WanTransformer:
    model.save_pretrained(folder / "theirs")
    return load_transformer(folder / "theirs", **options)


def abstract(config: WanConfig) -> WanTransformer:
    return nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))


def inputs(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, times and text."""
    rng = np.random.default_rng(seed)
    batch, config = len(case.times), case.config
    return (
        rng.standard_normal((batch, *case.sizes, config.in_channels), np.float32),
        np.asarray(case.times, np.float32),
        rng.standard_normal((batch, case.text, config.text_dim), np.float32),
    )


def by_diffusers(model: WanTransformer3DModel, latents: np.ndarray, times: np.ndarray, text: np.ndarray) -> np.ndarray:
    """The same call, channels last and float32 out; computed in the model's type."""
    with torch.no_grad():
        out = model(
            torch.from_numpy(latents).permute(0, 4, 1, 2, 3).to(model.dtype),
            torch.from_numpy(times),
            torch.from_numpy(text).to(model.dtype),
            return_dict=False,
        )[0]
    return out.float().permute(0, 2, 3, 4, 1).numpy()


def _call(graph: nnx.GraphDef, weights: nnx.State, latents: jax.Array, times: jax.Array, text: jax.Array) -> jax.Array:
    return nnx.merge(graph, weights)(latents, times, text)


compiled = jax.jit(_call, static_argnums=0)
compiled_for_speed = jax.jit(_call, static_argnums=0, compiler_options=FOR_SPEED)


def by_us(
    model: WanTransformer, latents: np.ndarray, times: np.ndarray, text: np.ndarray, *, program=compiled
) -> np.ndarray:
    out = program(*nnx.split(model), latents, times, text)
    assert out.dtype == model.dtype
    return np.asarray(out.astype(jnp.float32))


def streamed(
    model: WanTransformer, latents: np.ndarray, times: np.ndarray, text: np.ndarray, pieces: list[int], **tokens: int
):
    """Velocities of consecutive pieces, and how many programs that took."""
    graph, weights = nnx.split(model)
    read = jax.jit(lambda w, text: nnx.merge(graph, w).precompute_text_kv(text, **tokens))(weights, text)

    @jax.jit
    def piece(weights, latents, state, first_frame):
        return nnx.merge(graph, weights).stream(latents, times, read, state, first_frame=first_frame, **tokens)

    state, out, first = model.init_state(latents.shape[0], *latents.shape[2:4]), [], 0
    for frames in pieces:
        velocity, state = piece(weights, latents[:, first : first + frames], state, first)
        out.append(np.asarray(velocity.astype(jnp.float32)))
        first += frames
    return np.concatenate(out, axis=1), piece._cache_size()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def scans(jaxpr) -> list[int]:
    """Lengths of all scans of a program, inner ones included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation.params["length"])
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                found += scans(inner.jaxpr)
    return found
