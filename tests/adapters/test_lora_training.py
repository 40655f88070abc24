"""Adapters that learn: what of a model they are, the files that are written of them, and these files in diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from flax import nnx
from shared.training import HYBRID, WAN, finetuning, log_of, write_teacher
from shared.wan import TINY, Case, by_diffusers, by_us, inputs, reference, relative

from rehyat_jax import HybridConfig, cli, load_transformer
from rehyat_jax.adapters.linear import linear_layers
from rehyat_jax.adapters.lora import open_lora
from rehyat_jax.adapters.training import LoraConfig, adapters_of, folded, with_adapters
from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.checkpoints import convert, describe, save_conversion, save_transformer
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.runtime.sharding import parameter_spec
from rehyat_jax.runtime.variables import AdapterParam, MixerParam
from train.data.clips import Bucket
from train.stages.students import write_adapters

CASE = Case(TINY, (3, 4, 4), text=5, times=(700.0,))
CONVERSION = HybridConfig(chunk_frames=1, overlap_frames=1, decay=True)
LORA = LoraConfig(rank=3, alpha=1.5, trigger="in chalk")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "transformer"
    reference(TINY, 0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learned(base):
    """As after a training: no adapter adds nothing."""
    model = load_transformer(base, hybrid=CONVERSION)
    with_adapters(model, LORA, within=model.blocks, rngs=nnx.Rngs(1))
    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    rng = np.random.default_rng(2)
    moved = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.standard_normal(x.shape, np.float32)), adapters
    )
    return nnx.merge(graph, moved, rest)


@pytest.fixture(scope="module")
def files(learned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_adapters(folder, learned, LORA, base="a base")
    return folder


def flat(module):
    return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def test_they_add_nothing_at_first_and_learn_alone(base):
    model = load_transformer(base)
    args = inputs(CASE)
    before = by_us(model, *args)
    with_adapters(model, LORA, within=model.blocks, rngs=nnx.Rngs(1))
    assert len(adapters_of(model)) == 10  # eight projections and the feed-forward's two, all layers in one
    np.testing.assert_array_equal(by_us(model, *args), before)
    _, learns, frozen = nnx.split(model, (AdapterParam, MixerParam), ...)
    assert {path[-2:] for path, _ in nnx.to_flat_state(learns)} == {("adapter", "down"), ("adapter", "up")}
    assert not any("adapter" in path for path, _ in nnx.to_flat_state(frozen))


def test_folded_they_are_the_same_model(learned):
    """One product in another order a layer: 1e-5 in float32."""
    args, model = inputs(CASE), learned.with_hybrid(None)
    assert not adapters_of(folded(model))
    assert len(adapters_of(model)) == 10
    assert relative(by_us(folded(model), *args), by_us(model, *args)) < 1e-5


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
def test_the_files_open_in_diffusers_and_give_our_output(form, files, base):
    path = files / f"lora_{form}.safetensors"
    theirs = WanTransformer3DModel.from_pretrained(base)
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer=theirs)
    pipe.load_lora_weights(str(path), adapter_name="one")
    args = inputs(CASE)
    ours = by_us(load_transformer(base, loras=[path]), *args)
    assert relative(ours, by_diffusers(theirs, *args)) < 1e-5
    assert relative(ours, by_us(load_transformer(base), *args)) > 0.05
    opened = open_lora(path)
    assert (opened.ranks, opened.trigger, opened.header["base_model"]) == ((3,), "in chalk", "a base")


def test_both_forms_are_what_was_learned(files, base, learned):
    """In bfloat16 a factor has 8 bits: 2⁻⁸ of the largest that is added."""
    weights = [
        flat(load_transformer(base, loras=[files / f"lora_{form}.safetensors"])) for form in ("diffusers", "comfyui")
    ]
    plain, wanted = flat(load_transformer(base)), flat(folded(learned))
    for path, value in plain.items():
        np.testing.assert_array_equal(weights[0][path], weights[1][path])
        added = np.abs(wanted[path] - value).max()
        np.testing.assert_allclose(weights[0][path], wanted[path], rtol=0, atol=added / 2**8 * 3 + 1e-7)


def test_a_conversion_is_one_small_file_over_its_base(files, base, learned, tmp_path, capsys):
    file = files / "conversion.safetensors"
    code = cli.main(["convert", str(base), str(tmp_path / "student"), "--with", str(file)])
    assert code == 0, capsys.readouterr().err
    student = load_transformer(tmp_path / "student")
    assert student.hybrid == CONVERSION
    teacher = flat(load_transformer(base, loras=[files / "lora_comfyui.safetensors"]))
    for path, value in flat(student).items():
        if path in teacher:
            np.testing.assert_array_equal(value, teacher[path])
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m.hybrid_blocks)) for m in (student, learned)), strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16).astype(theirs.dtype))
    said = str(describe(file))
    assert "conversion: a student's own part" in said
    assert "pairs       20 of rank 3" in said
    assert "base        a base" in said
    for wrong, message in (
        (base / "config.json", "safetensors"),
        (files / "lora_comfyui.safetensors", "no conversion"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(base, tmp_path / "none", conversion=wrong)
    with pytest.raises(CheckpointError, match="converted already"):
        convert(tmp_path / "student", tmp_path / "none", conversion=file)


def test_a_distilled_student_is_kept_as_its_own_part_alone(base, learned, tmp_path, capsys):
    student = load_transformer(base).with_hybrid(CONVERSION, blocks=learned.hybrid_blocks)
    save_transformer(student, tmp_path / "student")
    file = tmp_path / "conversion.safetensors"
    code = cli.main(["convert", str(tmp_path / "student"), str(file), "--only-conversion", str(base)])
    assert code == 0, capsys.readouterr().err
    convert(base, tmp_path / "again", conversion=file)
    found, wanted = flat(load_transformer(tmp_path / "again")), flat(student)
    assert all(found[path].tobytes() == value.tobytes() for path, value in wanted.items())
    assert file.stat().st_size < 0.5 * sum(x.nbytes for x in flat(load_transformer(base)).values())
    save_transformer(folded(learned), tmp_path / "finetuned")
    with pytest.raises(CheckpointError, match=r"differ in 20 tensors .* finetuned as a whole"):
        save_conversion(tmp_path / "finetuned", tmp_path / "x.safetensors", base=base)
    assert not (tmp_path / "x.safetensors").exists()


def test_an_impossible_rank_is_told():
    with pytest.raises(ConfigError, match="rank of 0 or more"):
        LoraConfig(rank=-1)


@pytest.mark.full
@pytest.mark.parametrize("hybrid", [None, HYBRID])
def test_a_training_moves_the_adapters_and_leaves_the_base(hybrid, tmp_path):
    teacher = write_teacher(tmp_path / "teacher")
    training = finetuning(
        teacher,
        tmp_path / "out",
        hybrid=hybrid,
        teacher=None,
        teacher_weight=0.0,
        lora=LoraConfig(rank=2),
        buckets=(Bucket(kind="plain", frames=5, batch=4),),
        steps=16,
    )
    training.run()
    assert np.isfinite([line["loss"] for line in log_of(training)]).all()
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"lora_comfyui.safetensors", "lora_diffusers.safetensors"} <= made
    assert ("conversion.safetensors" in made) == (hybrid is not None)
    lora = tmp_path / "out" / "lora_comfyui.safetensors"
    with_it = load_transformer(teacher, loras=[lora], hybrid=None)
    out, plain = (load_transformer(folder, hybrid=None) for folder in (tmp_path / "out", teacher))
    # bfloat16 has eight bits: it rounds the result by 2⁻⁸ of it, and each factor, so a product's sizes by 2⁻⁷.
    file = open_lora(lora)
    sizes = [[np.abs(file.read(part.names[kind])) for kind in ("up", "down")] for part in file.parts]
    added = max(float((up @ down).max()) for up, down in sizes)
    for (path, ours), theirs, before in zip(
        flat(with_it).items(), flat(out).values(), flat(plain).values(), strict=True
    ):
        moved = "blocks" in path and path[-1] == "kernel"
        assert moved == bool(np.abs(ours - before).max() > 0), path
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2**-8 * np.abs(theirs).max() + 2**-7 * added)
    assert describe(lora).ranks == (2,)


def test_adapters_are_sharded_as_the_kernels_beside_them():
    """By the axes that they declare: down by the kernel's input, up by its output, and the rank by nothing."""
    model = nnx.eval_shape(lambda: WanTransformer(WAN, rngs=nnx.Rngs(0)))
    with_adapters(model, LORA, within=model.blocks, rngs=nnx.Rngs(0))

    def axes(variable):
        found = tuple(parameter_spec(variable, variable.get_value().shape))
        return (*found, *[None] * (3 - len(found)))

    layers = linear_layers(model.blocks).values()
    assert len(layers) == 10
    for layer in layers:
        stack, inputs, outputs = axes(layer.kernel)
        assert inputs is not None
        assert outputs is not None
        assert axes(layer.adapter.down) == (stack, inputs, None)
        assert axes(layer.adapter.up) == (stack, None, outputs)
