"""Networks of checkpoints as modules, with the LoRAs and in the eight bits that are asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rehyat_jax.adapters.linear import keep_in_eight_bits, stacked_layers
from rehyat_jax.adapters.lora import Into, Lora, loras_of, of_expert
from rehyat_jax.adapters.merging import Merged, with_loras
from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.mixers.config import Conversion
from rehyat_jax.models.folder import find_checkpoint
from rehyat_jax.models.networks import make_plan
from rehyat_jax.models.taehv.decoder import TinyDecoder
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.eight_bits import EightBits, Kind, eight_bits_of
from rehyat_jax.runtime.variables import abstract_module
from rehyat_jax.sampling.experts import Expert, Experts
from rehyat_jax.weights.convert import attached_to
from rehyat_jax.weights.files import EIGHT_BITS, FINE_FP8, KINDS
from rehyat_jax.weights.load import filled, known_dtype, on_mesh
from rehyat_jax.weights.plan import LoadPlan

#: In which eight bits the matrices of blocks are kept.
Quantize = Kind | EightBits


def load_transformer(
    path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    hybrid: Conversion | Literal["auto"] | None = "auto",
    loras: Iterable[Any] = (),
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
    offload: bool = False,
) -> WanTransformer:
    """A Wan text-to-video transformer: the softmax teacher, or the student where the folder has a ``rehyat`` part.

    Args:
        path: a bundled model's name, a whole checkpoint's folder, the transformer's own, a weights file, or
            ``hf:OWNER/NAME``; diffusers or original layout,
            whichever prefixes. A file without ``config.json`` beside it is taken to have heads of 128, as all of Wan's.
        dtype: of computation and storage: float32, bfloat16 or float16. What diffusers keeps in float32 (the time
            embedder, the modulation tables, the affine norms) stays float32; so does the hybrid blocks' decay.
        hybrid: ``"auto"``: as the folder is. None: the teacher alone. A configuration: the teacher with these blocks
            converted and newly initialised (from seed 0; `WanTransformer.with_hybrid` takes another), where a
            conversion begins.
        loras: LoRA files or folders of any dialect, merged into the weights in this order: each a path, a path and a
            strength, or a text ``FILE[:strength]``.
        quantize: "int8", "int8-weights" or "fp8": the blocks' matrices are kept so on the device, with a scale for each
            output: half of what bfloat16 takes. A file of the same kind is kept as it is; other weights, and those with
            a LoRA, are rounded (to ``float8_e3m4``, which loses half of what a file's ``float8_e4m3fn`` does). With
            "int8" products are made in int8 too, which is what accelerators are fast at. An `EightBits` also says
            which layers are left out.
        mesh: of the axes of `rehyat_jax.runtime.mesh`: the weights are sharded over it while they are read. Calls are
            then made with it in force (``jax.set_mesh``).
        offload: the blocks stay in the host's memory; each comes to the device when the loop over blocks needs it. Not
            on a mesh.

    Raises:
        CheckpointError: missing, truncated, foreign, incomplete, misshapen or not finite, in either part.
        ConfigError: a configuration is impossible or another architecture's, or ``hybrid`` names a block too many.
    """
    how: dict[str, Any] = {"dtype": dtype, "hybrid": hybrid, "loras": loras, "quantize": quantize, "mesh": mesh}
    return open_transformer(path, **how, offload=offload)[0]


def open_transformer(
    path: str | os.PathLike[str],
    name: Literal["transformer", "transformer_2"] = "transformer",
    *,
    expert: Into | None = None,
    dtype: Any = jnp.float32,
    hybrid: Conversion | Literal["auto"] | None = "auto",
    loras: Iterable[Any] = (),
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
    offload: bool = False,
) -> tuple[WanTransformer, Merged]:
    """As `load_transformer`, and the weights on disk, from which it can be had with other LoRAs; ``name`` and
    ``expert`` are which of two experts."""
    dtype = known_dtype(dtype)
    plan = make_plan(find_checkpoint(path), name, dtype=dtype)
    student = attached_to(name, plan, dtype=dtype) if hybrid == "auto" else None
    base = (student and student.instead) or plan
    if (how := eight_bits_of(quantize)) is not None:
        keep_in_eight_bits(base.abstract, how, kept_on_device(base, how))
    if offload and mesh is not None:
        raise ConfigError("blocks come from the host to one device: leave offload or the mesh out")
    if offload:
        base.abstract.keep_blocks_on_host()
    chosen = of_expert(loras_of(loras), expert)
    merged = Merged(base=dataclasses.replace(base, abstract=None), dtype=dtype, loras=chosen)
    module = cast(WanTransformer, filled(with_loras(base, merged.loras), dtype=dtype, mesh=mesh))
    if isinstance(hybrid, Conversion):
        module = module.with_hybrid(hybrid, rngs=nnx.Rngs(0))
        if mesh is not None:
            on_mesh(module, mesh)
        return module, merged
    if student is None:
        return module, merged
    blocks = cast(Any, filled(student.plan, dtype=dtype, mesh=mesh))
    return module.with_hybrid(student.plan.config, blocks=blocks), merged


EXPERTS: dict[Literal["transformer", "transformer_2"], Into] = {"transformer": "high", "transformer_2": "low"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedExperts:
    """As `Merged`, of two experts, each of which is read when a step asks for it."""

    open: Callable[[tuple[Lora, ...]], Experts]
    loras: tuple[Lora, ...]

    def changed(self, experts: Experts, loras: tuple[Lora, ...]) -> tuple[Experts, MergedExperts]:
        """The experts with other LoRAs; those that are on the device are read again.

        Raises:
            CheckpointError: as `with_loras`.
        """
        return self.open(loras), dataclasses.replace(self, loras=loras)


def open_experts(
    path: str | os.PathLike[str],
    *,
    boundary_ratio: float,
    dtype: Any,
    hybrid: Conversion | Literal["auto"] | None,
    loras: Iterable[Any] = (),
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
    offload: bool = False,
) -> tuple[Experts, MergedExperts]:
    """Two transformers by noise level, each read when a step first asks for it. Arguments as `open_transformer`.

    Raises:
        CheckpointError: their files are incomplete or damaged, or the two are of different sizes; a LoRA that does not
            fit.
        ConfigError: as `load_transformer`.
    """
    folder, dtype = find_checkpoint(path), known_dtype(dtype)
    plans = {name: make_plan(folder, name) for name in EXPERTS}
    if plans["transformer"].config != plans["transformer_2"].config:
        raise CheckpointError(f"the two experts in {folder} are of different sizes")

    def outline(name: Literal["transformer", "transformer_2"]) -> Any:
        part = attached_to(name, plans[name], dtype=dtype) if hybrid == "auto" else None
        conversion = hybrid if part is None else part.plan.config
        kinds = {"hybrid": None if conversion == "auto" else conversion, "dtype": dtype, "param_dtype": dtype}
        return abstract_module(WanTransformer, plans[name].config, **kinds)

    outlines = {name: outline(name) for name in EXPERTS}
    if (how := eight_bits_of(quantize)) is not None:
        how.check(stacked_layers(outlines["transformer"]))  # now, not when a step asks for it

    def opened(chosen: tuple[Lora, ...]) -> Experts:
        def member(name: Literal["transformer", "transformer_2"], least: float) -> Expert:
            own = of_expert(chosen, EXPERTS[name])
            with_loras(plans[name], own)  # now, not when a step asks for it
            how: dict[str, Any] = {"dtype": dtype, "hybrid": hybrid, "loras": own, "quantize": quantize, "mesh": mesh}
            how |= {"expert": EXPERTS[name], "offload": offload}
            return Expert(
                name=name,
                least=least,
                load=lambda: open_transformer(folder, name, **how)[0],
                outline=outlines[name],
            )

        members = member("transformer", 1000 * boundary_ratio), member("transformer_2", 0.0)
        return Experts(*members, config=plans["transformer"].config, dtype=dtype)

    chosen = loras_of(loras)
    return opened(chosen), MergedExperts(open=opened, loras=chosen)


def open_denoiser(
    folder: Path, *, boundary_ratio: float | None, **how: Any
) -> tuple[WanTransformer | Experts, Merged | MergedExperts]:
    """`open_experts` of a folder whose traits have a boundary between two, else `open_transformer`."""
    if boundary_ratio is None:
        return open_transformer(folder, **how)
    return open_experts(folder, boundary_ratio=boundary_ratio, **how)


def kept_on_device(plan: LoadPlan, how: EightBits) -> np.dtype:
    """What the matrices of a plan's blocks are kept as: the file's own eight bits where it has such, which are exact;
    of wide ones, in "fp8", the finer."""
    kind = EIGHT_BITS[how.file_kind]
    if not how.keeps_files:
        return kind
    stored = (KINDS[name] for slot in plan.slots if (name := plan.info(slot).stored) in KINDS)
    return kind if kind in stored else FINE_FP8


def load_vae(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> WanVAE:
    """A Wan2.1 or Wan2.2 VAE. Arguments and errors as `load_transformer`; an original file has its release's latent
    statistics."""
    dtype = known_dtype(dtype)
    return cast(WanVAE, filled(make_plan(find_checkpoint(path), "vae", dtype=dtype), dtype=dtype))


def load_preview_decoder(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> TinyDecoder:
    """A TAEHV decoder (``taew2_1``, ``taew2_2``), as published. Arguments and errors as `load_transformer`."""
    dtype = known_dtype(dtype)
    return cast(TinyDecoder, filled(make_plan(find_checkpoint(path), "preview_decoder", dtype=dtype), dtype=dtype))


def load_text_encoder(
    path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
    offload: bool = False,
) -> UMT5Encoder:
    """A UMT5 encoder. Arguments and errors as `load_transformer`; an embedding of zeros alone is refused as well. Its
    products are never in eight bits, and no layer is left out."""
    dtype = known_dtype(dtype)
    plan = make_plan(find_checkpoint(path), "text_encoder", dtype=dtype)
    if (how := eight_bits_of(quantize)) is not None:
        keep_in_eight_bits(plan.abstract, how.of_text, kept_on_device(plan, how))
    if offload:
        plan.abstract.keep_blocks_on_host()
    return cast(UMT5Encoder, filled(plan, dtype=dtype, mesh=mesh))
