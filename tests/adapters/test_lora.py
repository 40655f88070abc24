"""LoRA files of every dialect: against diffusers' own loading where it works, and against weights merged by hand."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from shared.lora import BY_DIFFUSERS, OTHERS, ab, comfy, everywhere, merged, random_lora, written
from shared.tiers import breadth
from shared.wan import TINY, Case, by_diffusers, by_us, inputs, reference, relative

from rehyat_jax.adapters.lora import Lora
from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.checkpoints import load_transformer, save_transformer
from rehyat_jax.models.checkpoints.loading import open_transformer
from rehyat_jax.weights.opening import open_tensors

CASE = Case(TINY, (3, 4, 4), text=5, times=(700.0,))
STRENGTH = 0.7


@pytest.fixture(scope="module")
def theirs():
    return reference(TINY, 0)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "transformer"
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(theirs):
    return {name: tensor.clone() for name, tensor in theirs.state_dict().items()}


def a_lora(weights, seed=0):
    return random_lora({name: x.shape for name, x in weights.items()}, everywhere(TINY.num_layers), seed=seed)


def numbers(module, tmp_path):
    """Of a model of ours, by diffusers' names."""
    save_transformer(module, tmp_path / "numbers")
    tensors = open_tensors(tmp_path / "numbers" / "diffusion_pytorch_model.safetensors")
    return {
        name: np.concatenate([p.copy() for p in tensors.pieces(name)]).reshape(info.shape)
        for name, info in tensors.infos.items()
    }


def assert_merged(module, wanted, tmp_path):
    """Each weight is the hand-merged one but for one product and one sum in float32: 2e-6 of the largest."""
    found = numbers(module, tmp_path)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("dialect", breadth((*BY_DIFFUSERS, *OTHERS), test=len(BY_DIFFUSERS) + 3))
def test_a_dialect_is_merged_as_by_hand(dialect, folder, weights, tmp_path):
    lora = a_lora(weights)
    path, scale = written(dialect, lora, tmp_path / "lora")
    module = load_transformer(folder, loras=[(path, STRENGTH)])
    assert_merged(module, merged(weights, lora, STRENGTH * scale), tmp_path)


@pytest.mark.parametrize("dialect", breadth(BY_DIFFUSERS, test=2))
def test_a_dialect_is_what_diffusers_makes_of_it(dialect, folder, weights, tmp_path):
    """Velocities of both: 1e-5, four products in a row in float32 that are summed in another order."""
    path, _ = written(dialect, a_lora(weights), tmp_path / "lora")
    theirs = reference(TINY, 0)
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer=theirs)
    pipe.load_lora_weights(str(path), adapter_name="one")
    pipe.set_adapters(["one"], adapter_weights=[STRENGTH])
    args = inputs(CASE)
    ours = by_us(load_transformer(folder, loras=[(path, STRENGTH)]), *args)
    assert relative(ours, by_diffusers(theirs, *args)) < 1e-5
    assert relative(ours, by_us(load_transformer(folder), *args)) > 0.05


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_at_once_are_what_diffusers_makes_of_them(folder, weights, tmp_path):
    paths = [written("ComfyUI", a_lora(weights, seed), tmp_path / str(seed))[0] for seed in (1, 2)]
    theirs = reference(TINY, 0)
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer=theirs)
    for name, path in zip("ab", paths, strict=True):
        pipe.load_lora_weights(str(path), adapter_name=name)
    pipe.set_adapters(["a", "b"], adapter_weights=[0.7, -0.3])
    chosen = [Lora(path, strength, name) for path, strength, name in zip(paths, (0.7, -0.3), "ab", strict=True)]
    args = inputs(CASE)
    assert relative(by_us(load_transformer(folder, loras=chosen), *args), by_diffusers(theirs, *args)) < 1e-5


def lightx2v(weights, lora):
    """As lightx2v and CausVid are published: pairs, and differences of norms, biases, modulations and the head."""
    rng = torch.Generator().manual_seed(5)
    places = {
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "head.head.diff_b": "proj_out.bias",
        "head.diff_m": "scale_shift_table",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
        "text_embedding.0.diff": "condition_embedder.text_embedder.linear_1.weight",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    found = {ours: torch.randn(weights[theirs].shape, generator=rng) for ours, theirs in places.items()}
    return {comfy(name): x for name, x in found.items()}, {places[name]: x for name, x in found.items()}


def test_differences_are_added_to_norms_biases_and_modulations(folder, weights, tmp_path):
    lora = random_lora(
        {name: x.shape for name, x in weights.items()},
        [*everywhere(2), "time_projection.1", "time_embedding.0", "patch_embedding"],
    )
    tensors, differences = lightx2v(weights, lora)
    path, _ = written("ComfyUI", lora, tmp_path / "lora")
    save_file(load_file(path) | tensors, path)
    module = load_transformer(folder, loras=[f"{path}:{STRENGTH}"])
    assert_merged(module, merged(weights, lora, STRENGTH, differences), tmp_path)


def test_taken_off_or_of_strength_0_it_leaves_the_base_bit_for_bit(folder, weights, tmp_path):
    path, _ = written("kohya", a_lora(weights), tmp_path / "lora")
    module, merged_weights = open_transformer(folder, dtype=np.dtype("float32"), loras=[path])
    with_it = numbers(module, tmp_path / "with")
    off, _ = merged_weights.changed(module, ())
    zero = load_transformer(folder, loras=[(path, 0)])
    for number, found in enumerate((off, zero)):
        for name, value in numbers(found, tmp_path / str(number)).items():
            assert value.tobytes() == weights[name].numpy().tobytes(), name
    # The module that was changed is another: this one still has it.
    again = numbers(module, tmp_path / "again")
    assert all(again[name].tobytes() == value.tobytes() for name, value in with_it.items())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("diffusion_model.blocks.0.self_attn.k_img.lora_A.weight", "2 of 42 tensors have no place in .* the first is"),
        ("diffusion_model.blocks.7.self_attn.q.lora_A.weight", "have no place"),
        ("text_encoder.layers.0.q.lora_A.weight", "have no place"),
    ],
)
def test_every_key_lands_or_the_first_and_the_count_are_told(key, message, folder, weights, tmp_path):
    path, _ = written("ComfyUI", a_lora(weights), tmp_path / "lora")
    more = {key: torch.ones(3, 24), key.replace("lora_A", "lora_B"): torch.ones(24, 3)}
    save_file(load_file(path) | more, path)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(folder, loras=[path])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blocks.0.self_attn.q.hada_w1_a": (3, 24)}, "a LoHa"),
        ({"lora_unet_blocks_0_self_attn_q.lokr_w1": (3, 24)}, "a LoKr"),
        ({"blocks.0.self_attn.q.dora_scale": (24,)}, "a DoRA"),
        ({"blocks.0.self_attn.q.lora_magnitude_vector": (24,)}, "a DoRA"),
        ({"blocks.0.self_attn.q.lora_A.weight": (3, 24)}, "nothing that it goes with"),
        ({"blocks.0.self_attn.q.alpha": ()}, "nothing that it goes with"),
        ({"blocks.0.self_attn.q.weight": (24, 24)}, "no LoRA that this program knows"),
        ({"q.lora_A.weight": (3, 24), "q.lora_B.weight": (24, 2)}, "are no pair"),
        ({"q.lora_A.weight": (3, 24), "q.lora_B.weight": (24, 3), "q.lora_B.bias": (24,)}, "that no LoRA has"),
    ],
)
def test_what_is_no_lora_is_refused_by_name(tensors, message, folder, tmp_path):
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_transformer(folder, loras=[tmp_path / "x.safetensors"])


def test_a_lora_of_another_width_says_which_it_is_for(folder, tmp_path):
    q = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (2, 1536)}
    q |= {"diffusion_model.blocks.0.self_attn.q.lora_B.weight": (1536, 2)}
    save_file({name: torch.zeros(shape) for name, shape in q.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"is for Wan2.1 1.3B, not for .* \[1536, 1536\] where \[24, 24\]"):
        load_transformer(folder, loras=[tmp_path / "x.safetensors"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOKR"}, "peft_type 'LOKR'"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"lora_alpha": "1"}, "alpha must be a number"),
        ({"alpha_pattern": {"(a+)+$": 1.0}}, "no plain name"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(config, message, folder, weights, tmp_path):
    path, _ = written("PEFT folder", a_lora(weights), tmp_path / "lora")
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_transformer(folder, loras=[path])


@pytest.mark.parametrize("kind", [torch.int64, torch.float64, torch.bfloat16])
def test_an_alpha_is_any_number(kind, folder, weights, tmp_path):
    """sd-scripts keeps one that follows from the rank as a whole number."""
    lora = {name: pair for name, pair in a_lora(weights).items() if name.startswith("blocks.0.self")}
    path, scale = written("kohya", lora, tmp_path / "lora")
    tensors = load_file(path)
    save_file({name: x.to(kind) if name.endswith(".alpha") else x for name, x in tensors.items()}, path)
    wanted = merged(weights, lora, STRENGTH * scale)
    assert_merged(load_transformer(folder, loras=[(path, STRENGTH)]), wanted, tmp_path)


@pytest.mark.parametrize("prefix", ["lycoris_", "pipe.dit."])
def test_other_trainers_prefixes(prefix, folder, weights, tmp_path):
    """LyCORIS' of a LoRA, DiffSynth-Studio's."""
    lora = {name: pair for name, pair in a_lora(weights).items() if name.startswith("blocks.1.cross")}
    name = (lambda m: prefix + m.replace(".", "_")) if prefix.endswith("_") else (lambda m: prefix + m)
    save_file(ab(lora, name), tmp_path / "x.safetensors")
    assert_merged(load_transformer(folder, loras=[tmp_path / "x.safetensors"]), merged(weights, lora, 1.0), tmp_path)


def test_patterns_of_alpha_are_of_the_modules_that_they_name(folder, weights, tmp_path):
    lora = a_lora(weights)
    path, _ = written("PEFT folder", lora, tmp_path / "lora")
    # As PEFT has them for the end of a name, and as diffusers writes them for the whole of it.
    patterns = {"attn1.to_q": 6, "^blocks.1.attn2.to_v": 6, "^attn1.to_k": 6}
    (path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "alpha_pattern": patterns}))
    module = load_transformer(folder, loras=[path])
    named = ("self_attn.q", "blocks.1.cross_attn.v")
    twice = {name: pair for name, pair in lora.items() if name.endswith(named)}
    wanted = merged(weights, lora, 1.0)
    more = merged({name: torch.zeros(x.shape) for name, x in weights.items()}, twice, 1.0)
    assert_merged(module, {name: value + more[name] for name, value in wanted.items()}, tmp_path)
