"""Students on disk: the softmax part stays diffusers', the ``rehyat`` part is whole or refused in one sentence."""

import dataclasses
import json
import shutil
from typing import get_args

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from diffusers import WanPipeline, WanTransformer3DModel
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from shared.checkpoint import save_tiny_checkpoint
from shared.tiers import examples
from shared.wan import TINY, reference

from pallas_kernels.options import Positive, Stabilizer
from rehyat_jax.attention.features import Activation
from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.mixers.config import HybridConfig
from rehyat_jax.models.checkpoints import convert, describe, load_transformer, save_transformer
from rehyat_jax.models.wan.transformer import WanTransformer

CONFIG = dataclasses.replace(TINY, num_layers=3)
KINDS = {
    "some_blocks_decay": HybridConfig(blocks=(0, 2), decay=True, degree=3, layers=1),
    "window": HybridConfig(kind="window", sink_frames=1),
    "linear": HybridConfig(kind="linear"),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> WanTransformer:
    folder = tmp_path_factory.mktemp("teacher")
    reference(CONFIG, seed=0).save_pretrained(folder / "theirs")
    return load_transformer(folder / "theirs")


@pytest.fixture(scope="module")
def students(teacher) -> dict[str, WanTransformer]:
    """Every parameter of the hybrid blocks away from its start."""
    rng = np.random.default_rng(0)
    made = {}
    for name, hybrid in KINDS.items():
        model = made[name] = teacher.with_hybrid(hybrid, rngs=nnx.Rngs(1))
        noise = jax.tree.map(
            lambda p: jnp.asarray(p + rng.uniform(0.1, 0.2, p.shape).astype(np.float32)), nnx.state(model.hybrid_blocks)
        )
        nnx.update(model.hybrid_blocks, noise)
    return made


@pytest.fixture
def saved(students, tmp_path):
    save_transformer(students["some_blocks_decay"], tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def as_in_production():
    """Without the tests' checks of types, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def flat(model: WanTransformer) -> dict:
    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(one: WanTransformer, other: WanTransformer) -> None:
    """Configuration, names, types and bits."""
    assert one.hybrid == other.hybrid
    ours, theirs = flat(one), flat(other)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(value, theirs[path], err_msg=str(path))


@pytest.mark.parametrize("name", KINDS)
def test_out_and_in_again(name, students, tmp_path):
    save_transformer(students[name], tmp_path / "out")
    assert_same(load_transformer(tmp_path / "out"), students[name])


def test_the_softmax_part_is_the_teachers_byte_for_byte_and_diffusers_opens_it(students, teacher, tmp_path):
    save_transformer(teacher, tmp_path / "teacher")
    save_transformer(students["linear"], tmp_path / "student")
    assert not (tmp_path / "teacher" / "rehyat").exists()
    for file in (tmp_path / "teacher").iterdir():
        assert (tmp_path / "student" / file.name).read_bytes() == file.read_bytes(), file.name
    ours = {path.name for path in (tmp_path / "student" / "rehyat").iterdir()}
    assert ours == {"config.json", "features.safetensors"}
    model, info = WanTransformer3DModel.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = reference(CONFIG, seed=0).state_dict()
    assert all((tensor == expected[name]).all() for name, tensor in model.state_dict().items())


def test_tensors_are_named_by_the_models_blocks(saved):
    """Blocks 0 and 2 of three; two heads of 12, degree 3, one layer."""
    tensors = load_file(saved / "rehyat" / "features.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"blocks.{block}.{name}": shape
        for block in (0, 2)
        for name, shape in {
            "phi_q.layers.0.kernel": (2, 12, 36),
            "phi_q.layers.0.bias": (2, 36),
            "phi_k.layers.0.kernel": (2, 12, 36),
            "phi_k.layers.0.bias": (2, 36),
            "decay_rate": (2,),
        }.items()
    }


def test_bf16_leaves_decay_in_float32(saved, students, tmp_path):
    """Loaded narrow; loaded narrow and saved; loaded wide and saved narrow: the same."""
    narrow = load_transformer(saved, dtype=jnp.bfloat16)
    kinds = {path[1:]: value.dtype for path, value in flat(narrow).items() if path[0] == "hybrid_blocks"}
    assert kinds.pop(("decay_rate",)) == jnp.float32
    assert set(kinds.values()) == {jnp.dtype(jnp.bfloat16)}
    save_transformer(narrow, tmp_path / "one")
    save_transformer(students["some_blocks_decay"], tmp_path / "two", dtype=jnp.bfloat16)
    convert(saved, tmp_path / "three", dtype=jnp.bfloat16)
    for folder in ("one", "two", "three"):
        assert_same(load_transformer(tmp_path / folder, dtype=jnp.bfloat16), narrow)


def test_the_teacher_alone_and_a_conversions_start(saved, teacher):
    assert_same(load_transformer(saved, hybrid=None), teacher)
    hybrid = HybridConfig(blocks=(1,))
    for path in (saved, saved / "diffusion_pytorch_model.safetensors"):
        assert_same(load_transformer(path, hybrid=hybrid), teacher.with_hybrid(hybrid, rngs=nnx.Rngs(0)))


def test_a_whole_checkpoint_keeps_it_in_either_place_and_not_in_both(tmp_path):
    """In the transformer's folder, or beside model_index.json; found from the whole and from the component's folder,
    and diffusers' pipeline opens the same folder."""
    root = tmp_path / "model"
    save_tiny_checkpoint(root)
    student = load_transformer(root, hybrid=HybridConfig())
    save_transformer(student, tmp_path / "student")
    shutil.copytree(tmp_path / "student" / "rehyat", root / "transformer" / "rehyat")
    for path in (root, root / "transformer"):
        assert_same(load_transformer(path), student)
    shutil.copytree(root / "transformer" / "rehyat", root / "rehyat")
    with pytest.raises(CheckpointError, match="both there"):
        load_transformer(root)
    shutil.rmtree(root / "transformer" / "rehyat")
    for path in (root, root / "transformer"):
        assert_same(load_transformer(path), student)
    WanPipeline.from_pretrained(root)
    convert(root, tmp_path / "converted")
    assert_same(load_transformer(tmp_path / "converted"), student)


def test_a_finetuned_student_and_its_teacher_in_one_checkpoint(students, teacher, tmp_path):
    """The teacher for diffusers and for ``hybrid=None``, the student else; again after converting it once more."""
    student = students["some_blocks_decay"]
    graph, state = nnx.split(student)
    tuned = nnx.merge(graph, jax.tree.map(lambda p: p + jnp.asarray(0.01, p.dtype), state))
    save_transformer(teacher, tmp_path / "teacher")
    save_transformer(tuned, tmp_path / "tuned")
    convert(tmp_path / "tuned", tmp_path / "both", teacher=tmp_path / "teacher")
    convert(tmp_path / "both", tmp_path / "again")
    for folder in (tmp_path / "both", tmp_path / "again"):
        assert_same(load_transformer(folder), tuned)
        assert_same(load_transformer(folder, hybrid=None), teacher)
        model, info = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expected = reference(CONFIG, seed=0).state_dict()
        assert all((tensor == expected[name]).all() for name, tensor in model.state_dict().items())
    (part,) = describe(tmp_path / "both").components
    assert str(tmp_path / "both" / "rehyat" / "transformer") in str(part.attached)

    with pytest.raises(CheckpointError, match="no student"):
        convert(tmp_path / "teacher", tmp_path / "none", teacher=tmp_path / "teacher")
    other = tmp_path / "other"
    reference(dataclasses.replace(CONFIG, ffn_dim=CONFIG.ffn_dim + 8), seed=0).save_pretrained(other)
    with pytest.raises(CheckpointError, match="different sizes"):
        convert(tmp_path / "tuned", tmp_path / "none", teacher=other)
    assert not (tmp_path / "none").exists()
    shutil.rmtree(tmp_path / "both" / "rehyat" / "transformer")
    shutil.copytree(other, tmp_path / "both" / "rehyat" / "transformer")
    assert_refused(tmp_path / "both", "other sizes")
    (tmp_path / "again" / "rehyat" / "transformer" / "config.json").unlink()
    (tmp_path / "again" / "rehyat" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert_refused(tmp_path / "again", "holds no weights")


def test_described_with_the_bytes_of_its_state(tmp_path):
    """As many as the state that a stream begins with has, in bf16 at the checkpoint's own size."""
    root = tmp_path / "model"
    save_tiny_checkpoint(root)
    (root / "rehyat_defaults.json").write_text(json.dumps({"height": 32, "width": 48}))
    for hybrid in (HybridConfig(overlap_frames=2), KINDS["window"], KINDS["linear"]):
        student = load_transformer(root, hybrid=hybrid, dtype=jnp.bfloat16)
        state = student.init_state(1, 4, 6)
        shutil.rmtree(root / "transformer")
        save_transformer(student, root / "transformer")
        found = next(part for part in describe(root).components if part.name == "transformer").attached
        assert found.converted == (True, True)
        total = sum(x.nbytes for x in state if x.ndim > 1)
        assert f"all 2: {total:,} bytes a chunk" in str(found)
        assert "48x32" in str(found)
        assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(student.hybrid_blocks)))


def test_described_alone_and_as_one_that_cannot_stream(saved, teacher, tmp_path):
    text = str(describe(saved))
    assert "blocks 0, 2 of 3" in text
    assert "cannot stream: block 1 of 3" in text
    save_transformer(teacher, tmp_path / "teacher")
    assert "hybrid" not in str(describe(tmp_path / "teacher"))


def edit_features(folder, change) -> None:
    file = folder / "rehyat" / "features.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


KERNEL = "blocks.2.phi_k.layers.0.kernel"
DAMAGES = {
    "missing": (lambda t: t.pop(KERNEL), rf"lacks 1 tensor \('{KERNEL}'\)"),
    "unused": (lambda t: t.update({"blocks.1.decay_rate": t["blocks.0.decay_rate"]}), "holds 1 tensor .*no use for"),
    "misshapen": (lambda t: t.update({KERNEL: t[KERNEL][:, :-1].copy()}), r"is \[2, 11, 36\] in the file and \[2, 12"),
    "NaN": (lambda t: t[KERNEL].__setitem__((1, 3, 5), np.nan), rf"tensor '{KERNEL}' holds NaN"),
    "infinity": (lambda t: t["blocks.0.decay_rate"].fill(-np.inf), "tensor 'blocks.0.decay_rate' holds NaN or inf"),
    "another_type": (lambda t: t.update({KERNEL: t[KERNEL].astype(np.int32)}), "is of type I32"),
}


def assert_refused(folder, pattern, kind=CheckpointError) -> None:
    with pytest.raises(kind, match=pattern) as raised:
        load_transformer(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_features_are_refused_in_one_sentence(name, saved):
    change, pattern = DAMAGES[name]
    edit_features(saved, change)
    assert_refused(saved, pattern)
    # The teacher is whole all the same.
    assert load_transformer(saved, hybrid=None).hybrid is None


def test_incomplete_folders_are_refused(saved):
    file = saved / "rehyat" / "features.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert_refused(saved, "features.safetensors.*truncated|truncated.*safetensors|cannot be read|cannot mmap|empty")
    file.unlink()
    assert_refused(saved, "features.safetensors does not exist")
    file.write_bytes(whole)
    (saved / "rehyat" / "config.json").unlink()
    assert_refused(saved, "config.json cannot be read")
    shutil.rmtree(saved / "rehyat")
    (saved / "rehyat").write_text("a file")
    assert_refused(saved, "config.json cannot be read")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"chunk_frames": 0}, "chunk_frames"),
        ({"chunk_frames": True}, "chunk_frames"),
        ({"chunk_frames": 3.0}, "chunk_frames"),
        ({"chunk_frames": 10**30}, "chunk_frames"),
        ({"overlap_frames": -1}, "overlap_frames"),
        ({"overlap_frames": None}, "overlap_frames"),
        ({"degree": 10**9}, "degree"),
        ({"layers": 10**9}, "layers"),
        ({"layers": "2"}, "layers"),
        ({"blocks": []}, "blocks"),
        ({"blocks": [2, 0]}, "blocks"),
        ({"blocks": [1, 1]}, "blocks"),
        ({"blocks": [-1, 2]}, "blocks"),
        ({"blocks": [0, 3]}, "block 3 of a model"),
        ({"blocks": "some"}, "blocks"),
        ({"blocks": [[0]]}, "blocks"),
        ({"blocks": {"0": 1}}, "blocks"),
        ({"kind": "softmax"}, "kind"),
        ({"kind": ["hybrid"]}, "kind"),
        ({"kind": "window"}, "decay"),
        ({"sink_frames": 1}, "sink_frames"),
        ({"causal": 1}, "causal"),
        ({"causal": False}, "decay"),
        ({"stabilizer": "max"}, "stabilizer"),
        ({"activation": None}, "activation"),
        ({"positive": {}}, "positive"),
        ({"decay": "yes"}, "decay"),
        ({"implementation": "pallas"}, "implementation"),
        ({"surprise": 1}, "surprise"),
        ({"kind": "window", "decay": False, "causal": False}, "causal"),
        ({"length_norm": 1}, "length_norm"),
        ({"kind": "linear", "length_norm": True}, "length_norm"),
    ],
    ids=str,
)
def test_hostile_configurations_are_refused(change, named, saved, as_in_production):
    file = saved / "rehyat" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert_refused(saved, named, ConfigError)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"degree": 2, "degree": 3}', "[" * 100_000, "\0"], ids=repr)
def test_what_is_not_a_json_object_is_refused(text, saved):
    (saved / "rehyat" / "config.json").write_text(text)
    assert_refused(saved, "config.json")


def test_a_student_that_is_not_finite_leaves_nothing_behind(students, teacher, tmp_path):
    model = teacher.with_hybrid(KINDS["linear"], blocks=students["linear"].hybrid_blocks)
    bias = model.hybrid_blocks.phi_q.layers[1].bias
    broken = nnx.clone(model)
    broken.hybrid_blocks.phi_q.layers[1].bias.set_value(bias[...].at[1, 0, 0].set(jnp.nan))
    with pytest.raises(CheckpointError, match=r"blocks.1.phi_q.layers.1.bias"):
        save_transformer(broken, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def literals(kind) -> st.SearchStrategy:
    return st.sampled_from(get_args(kind))


@given(
    st.fixed_dictionaries(
        {
            "chunk_frames": st.integers(1, 40),
            "overlap_frames": st.integers(0, 40),
            "blocks": st.just("all") | st.sets(st.integers(0, 60), min_size=1).map(lambda found: tuple(sorted(found))),
            "kind": st.sampled_from(["hybrid", "linear"]),
            "stabilizer": literals(Stabilizer),
            "degree": st.integers(1, 8),
            "layers": st.integers(1, 8),
            "activation": literals(Activation),
            "positive": literals(Positive),
            "decay": st.booleans(),
        }
    )
)
@settings(deadline=None, max_examples=examples(100), derandomize=True)
def test_configurations_out_and_in_again(values):
    hybrid = HybridConfig(**values)
    assert HybridConfig.from_dict(json.loads(json.dumps(hybrid.to_dict()))) == hybrid
