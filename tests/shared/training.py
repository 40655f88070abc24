"""A tiny model of random numbers, a teacher folder of it, and a finetuning of that: what tests of training share."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.checkpoints import save_text_encoder, save_transformer, save_vae
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.variables import kernel, table
from rehyat_jax.sprites.world import NAMES
from rehyat_jax.text.tokenizer import Tokenizer
from train.data.clips import Bucket
from train.data.rollouts import Rollouts
from train.data.sources import Source
from train.data.tokenizer import build_sprite_tokenizer
from train.engine.optimizer import OptimizerConfig
from train.engine.stage import Models
from train.stages.diffusion import complete_folder
from train.stages.distill import DistillTraining
from train.stages.finetune import FinetuneTraining
from train.stages.forcing import ForcingTraining

WAN = WanConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=32,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    patch_size=(1, 8, 8),
)
#: Frames of 16 tokens: three in the short clips, so that one leaves the window, and five in the long.
HYBRID = HybridConfig(chunk_frames=1, overlap_frames=1, decay=True, length_norm=True)


def random_module(make, seed: int):
    """A module of random kernels, also where training would start from zeros, that keep activations of order one."""
    rng = np.random.default_rng(seed)

    def numbers(path, leaf):
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        if not {"kernel", "embedding"} & set(names):
            return (jnp.ones if "scale" in names else jnp.zeros)(leaf.shape, leaf.dtype)
        fan_in = np.prod(leaf.shape[1 if {"blocks", "block"} & set(names) else 0 : -1])
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(numbers, state))


def write_teacher(folder: Path) -> Path:
    """A whole model of random numbers; its VAE halves sides and time once. Made once in a process, and copied."""
    shutil.copytree(_written_teacher(), folder, dirs_exist_ok=True)
    return folder


@functools.cache
def _written_teacher() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build_sprite_tokenizer(folder / "tokenizer", list(NAMES))
    vocabulary = Tokenizer.from_folder(folder / "tokenizer").vocab_size
    text = TextEncoderConfig(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = VAEConfig(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 1),
        temperal_downsample=(True,),
        num_res_blocks=1,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    save_text_encoder(random_module(lambda: UMT5Encoder(text, rngs=nnx.Rngs(0)), 0), folder / "text_encoder")
    save_vae(random_module(lambda: WanVAE(vae, rngs=nnx.Rngs(0)), 0), folder / "vae")
    save_transformer(random_module(lambda: WanTransformer(WAN, rngs=nnx.Rngs(0)), 1), folder / "transformer")
    defaults = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0}
    complete_folder(folder, shift=3.0, defaults=defaults)
    return folder


def problem() -> dict:
    """Parameters of every kind, for an optimiser without a network."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layer": {
            "kernel": nnx.Param(jax.random.normal(keys[0], (5, 3)), **kernel(None, None)),
            "bias": nnx.Param(jax.random.normal(keys[1], (3,))),
        },
        "table": {"embedding": nnx.Param(jax.random.normal(keys[2], (4, 2)), **table())},
    }


def finetuning(model: Path, out: Path, **options) -> FinetuneTraining:
    return FinetuneTraining(
        **{
            "out": out,
            "source": model,
            "hybrid": HYBRID,
            "teacher": model,
            "teacher_weight": 0.1,
            "teacher_frames": 5,
            "buckets": (Bucket(kind="plain", frames=5, batch=4), Bucket(kind="plain", frames=9, batch=2)),
            "steps": 48,
            "steps_per_round": 8,
            "dtype": "float32",
            "checkpoint_seconds": 0.0,
            "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=4, ema_decay=0.5),
            "hybrid_rate": 2.0,
            "gate_rate": 5.0,
        }
        | options
    )


def forcing(model: Path, out: Path, **options) -> ForcingTraining:
    """Windows of two chunks of two latent frames."""
    return ForcingTraining(
        **{
            "out": out,
            "source": model,
            "teacher": model,
            "hybrid": HybridConfig(chunk_frames=2, overlap_frames=1, length_norm=True),
            "buckets": (Rollouts(clips=Bucket(kind="plain", frames=7, batch=4)),),
            "steps": 4,
            "steps_per_round": 2,
            "every": 2,
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
            "dtype": "float32",
            "checkpoint_seconds": 0.0,
            "keep_last": 9,
            "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=0, beta1=0.0, ema_decay=0.5),
            "critic_optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=0, beta1=0.0, ema_decay=0.0),
        }
        | options
    )


DISTILLED = HybridConfig(chunk_frames=1, overlap_frames=1)


def distillation(folder: Path, out: Path, **options) -> DistillTraining:
    return DistillTraining(
        **{
            "out": out,
            "teacher": folder,
            "hybrid": DISTILLED,
            "sources": (Source(frames=9, height=32, width=32, batch=4),),
            "num_inference_steps": 4,
            "guidance_scale": 2.0,
            "steps": 64,
            "updates_per_point": 2,
            "minibatches": 2,
            "held_out": 2,
            "measure_rounds": 8,
            "dtype": "float32",
            "optimizer": OptimizerConfig(learning_rate=5e-2, warmup_steps=4, weight_decay=0.0, ema_decay=0.8),
            "checkpoint_seconds": 0.0,
        }
        | options
    )


def models_of(**modules: nnx.Module) -> Models:
    """Networks by role, none of which learns."""
    split = {role: nnx.split(module) for role, module in modules.items()}
    graphs = {role: graph for role, (graph, _) in split.items()}
    return Models(graphs, frozen={role: variables for role, (_, variables) in split.items()})


def log_of(training: FinetuneTraining) -> list[dict[str, float]]:
    return [json.loads(line) for line in (training.train_folder / "metrics.jsonl").read_text().splitlines()]
