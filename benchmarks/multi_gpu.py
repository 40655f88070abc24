"""Several accelerators of one host: the sharded forward pass, finetune step and distillation beside one device's.

    python -m benchmarks.multi_gpu                               # on 1, 2, 4, … of all devices there are
    python -m benchmarks.multi_gpu --devices 1 8 --only forward --out forward.json
    python -m benchmarks.multi_gpu --compile                     # nothing but the programs, into JAX's cache
    python -m benchmarks.multi_gpu --lines forward.json finetune.json --plot scaling.png --out all.json
    XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=64 python -m benchmarks.multi_gpu --tiny   # anywhere

Wan-1.3B shapes at 480x832, random weights, all blocks converted. One JSON line a case:

- ``forward``: the DiT on one clip of 81 or 321 latent frames, its time cut over the devices (strong scaling:
  ``of_ideal`` is the first line's time over n times this one's);
- ``finetune``: a step with its gradient and AdamW, a clip a device by fsdp, and by fsdp x context (weak scaling:
  ``of_ideal`` is the first line's time for each clip a device over this one's);
- ``distill``: a round of the teacher and the blocks' updates, two points a device;
- ``past``: what a block's overlap and prefix sum of states cost: its attention on all devices beside each device's own
  part without them;
- ``equal``: forward and gradient beside one device's, ‖x − y‖ / ‖x‖; of the gradient also the worst of its arrays,
  each judged by its own norm or a thousandth of the whole gradient's, whichever is more; and how many arrays are below
  the whole's rounding, so that their own digits say nothing. ``--dtype float32`` has the highest product precision.

``received_gib``: of each device, by the program's own collectives, from its text. From a profile of one more call:
``nccl_ms``, what the first device spends in NCCL's kernels, waiting for others included; and ``kernels_ms``, in all.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from benchmarks import kernels
from rehyat_jax.attention.api import hybrid_attention
from rehyat_jax.attention.sharded import hybrid_over_devices
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.compilation import cache_folder, keep_compiled
from rehyat_jax.runtime.devices import Devices
from rehyat_jax.runtime.hlo import work
from rehyat_jax.runtime.mesh import spec
from rehyat_jax.runtime.mesh_config import MeshConfig
from rehyat_jax.sampling import FlowSchedule, UniPC
from train.data.sources import OwnTrajectories, Source
from train.engine.optimizer import OptimizerConfig
from train.engine.stage import Models, State
from train.stages.distill import DistillTraining
from train.stages.flow import flow_loss

GIB = 2**30
KINDS = ("forward", "finetune", "distill", "past", "equal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of all cases; ``frames`` are latent."""

    model: WanConfig = dataclasses.field(default_factory=WanConfig.t2v_1_3b)
    hybrid: HybridConfig = HybridConfig()
    #: Latent frames of the forward pass; ``clip`` has those of everything else.
    frames: tuple[int, ...] = (81, 321)
    clip: int = 21
    side: tuple[int, int] = (60, 104)
    text: int = 512
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    #: 0: programs are compiled and nothing is run.
    samples: int = 5

    @classmethod
    def tiny(cls) -> Sizes:
        """For virtual devices: every program, in seconds."""
        model = WanConfig(
            num_layers=2, num_attention_heads=4, attention_head_dim=16, ffn_dim=64, text_dim=16, freq_dim=16
        )
        return cls(model=model, frames=(24,), clip=12, side=(4, 6), text=8, dtype="float32", samples=1)

    def made(self, make: Callable[..., Any], *arrays: Any, cut: Callable[[Any], Any]) -> Any:
        """What ``make`` makes of the arrays, on the devices as ``cut`` has it; shapes alone where nothing is run."""
        shapes = jax.eval_shape(make, *arrays)
        shardings = cut(shapes)
        if self.samples:
            return jax.jit(make, out_shardings=shardings)(*arrays)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def mesh_of(count: int, *, fsdp: int | None = None, context: int = 1) -> Devices:
    """The first so many devices."""
    return Devices(MeshConfig(fsdp=fsdp, context=context).make(jax.devices()[:count]))


def timed(program: jax.stages.Compiled, arrays: tuple[Any, ...], samples: int, *, carries: int = 0) -> dict[str, float]:
    """Milliseconds of one call: the median, after a warm-up. Its first ``carries`` results are its next arguments."""
    if not samples:
        return {}

    def call() -> Any:
        nonlocal arrays
        result = jax.block_until_ready(program(*arrays))
        arrays = (*result[:carries], *arrays[carries:])
        return result[carries:] if carries else result

    times = []
    for sample in range(samples + 1):
        begun = time.perf_counter()
        call()
        if sample:
            times.append(time.perf_counter() - begun)
    figures = {"ms": round(1e3 * statistics.median(times), 3)}
    if each := kernels.times(call):
        nccl = sum(ms for name, ms in each.items() if "nccl" in name.lower())
        figures.update(kernels_ms=round(sum(each.values()), 3), nccl_ms=round(nccl, 3))
    return figures


def line(kind: str, devices: Devices, program: jax.stages.Compiled, **more: Any) -> dict[str, Any]:
    """A case's figures."""
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    stats = jax.devices()[0].memory_stats() or {}
    moved = work(program.as_text() or "", devices=devices.count).bytes_by_kind()
    mesh = {axis: size for axis, size in devices.shape.items() if size > 1}
    return {
        "case": kind,
        "devices": devices.count,
        "mesh": mesh,
        **more,
        "program_gib": round((held + memory.temp_size_in_bytes) / GIB, 3),
        "peak_gib": round(stats["peak_bytes_in_use"] / GIB, 3) if "peak_bytes_in_use" in stats else None,
        "received_gib": {name: round(size / GIB, 4) for name, size in moved.items()},
    }


def model_of(sizes: Sizes, devices: Devices, *, param_dtype: Any) -> tuple[Any, Any]:
    """Graph, and parameters of a spread of 0.02 on the devices."""
    make = functools.partial(
        WanTransformer, sizes.model, hybrid=sizes.hybrid, dtype=jnp.dtype(sizes.dtype), param_dtype=param_dtype
    )
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param)

    def draw() -> Any:
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
        return jax.tree.map(lambda x: (0.02 * jax.random.normal(next(keys), x.shape)).astype(x.dtype), shapes)

    return graph, sizes.made(draw, cut=devices.parameter_shardings)


def inputs_of(sizes: Sizes, devices: Devices, *, clips: int, frames: int) -> tuple[jax.Array, ...]:
    """Noisy latents, times, text, and what is to be learned."""
    video, dtype = (clips, frames, *sizes.side, sizes.model.in_channels), jnp.dtype(sizes.dtype)

    def draw() -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(1), 3)
        times = jnp.linspace(50.0, 950.0, clips)
        text = jax.random.normal(keys[1], (clips, sizes.text, sizes.model.text_dim), dtype)
        return jax.random.normal(keys[0], video), times, text, jax.random.normal(keys[2], video)

    return sizes.made(draw, cut=devices.batch_shardings)


def forward(sizes: Sizes, count: int) -> Iterator[dict[str, Any]]:
    """One clip, its time over all devices."""
    for frames in sizes.frames:
        devices = mesh_of(count, fsdp=1, context=count)
        graph, params = model_of(sizes, devices, param_dtype=jnp.dtype(sizes.dtype))
        arrays = (params, *inputs_of(sizes, devices, clips=1, frames=frames)[:3])
        program = devices.lower(lambda params, *x, graph=graph: nnx.merge(graph, params)(*x), *arrays).compile()
        yield line("forward", devices, program, latent_frames=frames, **timed(program, arrays, sizes.samples))


def finetune(sizes: Sizes, count: int) -> Iterator[dict[str, Any]]:
    """A clip a device; and where time is cut in two, a clip for two."""
    optimizer, frames = OptimizerConfig(), sizes.clip
    for context in (1, 2) if count > 1 else (1,):
        devices = mesh_of(count, fsdp=count // context, context=context)
        graph, params = model_of(sizes, devices, param_dtype=jnp.float32)
        state = sizes.made(optimizer.init, params, cut=devices.parameter_shardings)
        arrays = (state, *inputs_of(sizes, devices, clips=count // context, frames=frames))

        def step(state: Any, *batch: Any, graph: Any = graph) -> tuple[Any, jax.Array]:
            def loss(learned: Any) -> jax.Array:
                return flow_loss(nnx.merge(graph, learned)(*batch[:3], remat="nothing"), batch[3]).value

            value, gradients = jax.value_and_grad(loss)(state.params)
            return optimizer.apply(state, gradients, jnp.float32(1e-5)), value

        cut = devices.parameter_shardings(state)
        program = devices.lower(step, *arrays, donate=(0,), out=(cut, devices.replicated)).compile()
        ms = timed(program, arrays, sizes.samples, carries=1)
        yield line("finetune", devices, program, latent_frames=frames, clips=count // context, **ms)


def distill(sizes: Sizes, count: int) -> Iterator[dict[str, Any]]:
    """A trajectory a device, two points of it each."""
    model, dtype, devices = sizes.model, jnp.dtype(sizes.dtype), mesh_of(count)
    height, width = (8 * side for side in sizes.side)
    source = Source(prompts="none", frames=4 * sizes.clip - 3, height=height, width=width, batch=count)
    training = DistillTraining(
        out=Path("unused"), hybrid=sizes.hybrid, sources=(source,), held_out=count, dtype=sizes.dtype
    )
    teacher = dataclasses.replace(sizes, hybrid=None)  # type: ignore[arg-type]
    graph, params = model_of(teacher, devices, param_dtype=dtype)
    sampling = training.sampling(FlowSchedule(shift=5.0), UniPC())
    shape = (sizes.clip, *sizes.side, model.in_channels)

    def embed(texts: Sequence[str]) -> jax.Array:
        return jnp.zeros((len(texts), sizes.text, model.text_dim), dtype)

    inputs = OwnTrajectories(
        source, sampling=sampling, texts=lambda number: "", embed=embed, shape=shape, key=jax.random.key(0)
    )
    blocks = devices.parameters(nnx.state(training.blocks(model)))
    state = sizes.made(jax.vmap(training.optimizer.init), blocks, cut=devices.parameter_shardings)
    carried, inputs.frozen = inputs.begin(devices), devices.replicate(inputs.frozen)
    host_batch = devices.batch(inputs.host_batch(0), inputs.host_batch_shapes())
    round_ = training.learner(model, sampling=sampling).round(inputs, 0, shape=shape)
    student = nnx.graphdef(nnx.eval_shape(lambda: training.blocks(model)))

    def step(state: State, teacher: PyTree, frozen: PyTree, host: PyTree, rates: PyTree) -> tuple[State, PyTree]:
        models = Models({"student": student, "teacher": graph}, frozen={"teacher": teacher})
        return round_(state, models.after(state.learners), frozen, host, rates)

    whole = State(devices.replicate(jnp.zeros((), jnp.int32)), {"student": state}, (carried,))
    host = host_batch, devices.replicate(jax.random.key(0))
    arrays = whole, params, inputs.frozen, host, devices.replicate({"student": jnp.float32(1e-3)})
    cut = None if devices.mesh is None else jax.tree.map(lambda x: x.sharding, whole)
    program = devices.lower(step, *arrays, donate=(0,), out=(cut, devices.replicated)).compile()
    ms = timed(program, arrays, sizes.samples, carries=1)
    yield line("distill", devices, program, latent_frames=shape[0], trajectories=count, **ms)


def past(sizes: Sizes, count: int) -> Iterator[dict[str, Any]]:
    """The attention of one block, with and without what comes from other devices."""
    frames, frame = sizes.frames[0], sizes.side[0] * sizes.side[1] // 4
    chunk, overlap = sizes.hybrid.chunk_frames * frame, sizes.hybrid.overlap_frames * frame
    tokens = -(-frames * frame // (count * chunk)) * count * chunk
    devices = mesh_of(count, fsdp=1, context=count)
    heads, width = sizes.model.num_attention_heads, sizes.model.attention_head_dim
    features = sizes.hybrid.degree * width
    settings: dict[str, Any] = {
        "chunk": chunk,
        "overlap": overlap,
        "causal": True,
        "stabilizer": sizes.hybrid.stabilizer,
        "implementation": "auto",
    }
    cut = NamedSharding(devices.mesh, spec("batch", "time", "heads", None))  # type: ignore[arg-type]

    def draw() -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), 5)
        shapes = [(1, tokens, heads, n) for n in (width, width, width, features, features)]
        return [jnp.abs(jax.random.normal(k, s, jnp.dtype(sizes.dtype))) for k, s in zip(keys, shapes, strict=True)]

    arrays = tuple(sizes.made(draw, cut=lambda shapes: [cut] * len(shapes)))

    def alone(*arrays: jax.Array) -> jax.Array:
        attend = functools.partial(hybrid_attention, **settings)
        return jax.shard_map(attend, in_specs=(cut.spec,) * 5, out_specs=cut.spec, check_vma=False)(*arrays)

    def together(*arrays: jax.Array) -> jax.Array:
        return hybrid_over_devices(*arrays, **settings, decay=None)

    programs = [devices.lower(function, *arrays).compile() for function in (together, alone)]
    both, own = (timed(program, arrays, sizes.samples) for program in programs)
    yield line("past", devices, programs[0], latent_frames=frames, own_part_ms=own.get("ms"), **both)


def equal(sizes: Sizes, count: int) -> Iterator[dict[str, Any]]:
    """The forward pass and the gradients on all devices, beside one."""
    found, frames = [], sizes.clip
    context = 2 if count > 1 else 1
    for devices in (mesh_of(1), mesh_of(count, fsdp=count // context, context=context)):
        graph, params = model_of(sizes, devices, param_dtype=jnp.float32)
        arrays = (params, *inputs_of(sizes, devices, clips=max(count // context, 1), frames=frames))

        def both(params: Any, *x: Any, graph: Any = graph) -> tuple[jax.Array, Any]:
            def loss(params: Any) -> tuple[jax.Array, jax.Array]:
                velocity = nnx.merge(graph, params)(*x[:3], remat="nothing")
                return flow_loss(velocity, x[3]).value, velocity

            gradients, velocity = jax.grad(loss, has_aux=True)(params)
            return velocity, gradients

        program = devices.lower(both, *arrays).compile()
        if sizes.samples:
            found.append(jax.device_get(program(*arrays)))
        del params, arrays
    if not found:
        return

    def norm(tree: Any) -> float:
        return sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in jax.tree.leaves(tree)) ** 0.5

    def apart(x: Any, y: Any) -> float:
        return norm(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), x, y)) / norm(x)

    (velocity, gradients), (velocity_here, gradients_here) = found
    whole, resolved = norm(gradients), float(jnp.finfo(sizes.dtype).eps)
    pairs = [
        (jax.tree_util.keystr(path), x, y)
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(gradients_here), strict=True
        )
    ]
    worst = max((norm(x - y) / max(norm(x), 1e-3 * whole), name) for name, x, y in pairs)
    yield {
        "case": "equal",
        "devices": count,
        "mesh": {"fsdp": count // context, "context": context},
        "forward": apart(velocity, velocity_here),
        "gradient": apart(gradients, gradients_here),
        "worst_array": worst[0],
        "of": worst[1],
        "below_rounding": sum(norm(x) < resolved * whole for _, x, _ in pairs),
        "arrays": len(pairs),
    }


CASES: dict[str, Callable[[Sizes, int], Iterator[dict[str, Any]]]] = {
    "forward": forward,
    "finetune": finetune,
    "distill": distill,
    "past": past,
    "equal": equal,
}


def scaling(lines: list[dict[str, Any]]) -> None:
    """Adds ``of_ideal`` to every line that has a first of its kind on fewer devices."""
    first: dict[Any, dict[str, Any]] = {}
    for each in lines:
        if each["case"] not in ("forward", "finetune", "distill") or "ms" not in each:
            continue
        begin = first.setdefault((each["case"], each["latent_frames"]), each)
        clips = each.get("clips", each.get("trajectories", 1)) / begin.get("clips", begin.get("trajectories", 1))
        each["of_ideal"] = round(begin["ms"] * begin["devices"] * clips / each["ms"] / each["devices"], 3)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Share of ideal scaling against devices; needs matplotlib."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found,import-untyped,unused-ignore]

    figure, axes = plt.subplots(figsize=(6, 4))
    found: dict[str, list[tuple[int, float]]] = {}
    for each in (x for x in lines if "of_ideal" in x):
        cut = " and time cut in two" if each["case"] == "finetune" and "context" in each["mesh"] else ""
        name = f"{each['case']}, {each['latent_frames']} latent frames{cut}"
        found.setdefault(name, []).append((each["devices"], each["of_ideal"]))
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="devices", ylabel="share of ideal scaling", ylim=(0, 1.1))
    axes.set_xticks(sorted({devices for points in found.values() for devices, _ in points}))
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", type=int, help="how many; by default the powers of two there are")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the computation")
    parser.add_argument("--compile", action="store_true", help="compile all programs, which JAX's cache keeps, alone")
    parser.add_argument("--lines", nargs="+", type=Path, help="files of lines, in place of measuring")
    parser.add_argument("--out", type=Path, help="all lines as JSON")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args(argv)
    sizes = Sizes.tiny() if given.tiny else Sizes()
    if given.compile:
        sizes = dataclasses.replace(sizes, samples=0)
    if given.dtype:
        sizes = dataclasses.replace(sizes, dtype=given.dtype)
    if sizes.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    keep_compiled(cache_folder())
    lines: list[dict[str, Any]] = []
    if given.lines:
        lines = [each for path in given.lines for each in json.loads(path.read_text(encoding="utf-8"))]
        lines.sort(key=lambda each: (KINDS.index(each["case"]), each.get("latent_frames", 0), each["devices"]))
        scaling(lines)
    counts = given.devices or [2**i for i in range(jax.device_count().bit_length())]
    for kind in () if given.lines else given.only:
        for count in counts:
            for each in CASES[kind](sizes, count):
                lines.append(each)
                scaling(lines)
                print(json.dumps(each), flush=True)
    if given.out:
        given.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(lines, given.plot)


if __name__ == "__main__":
    main()
