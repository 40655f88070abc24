"""Loading, saving and converting: every dialect in, byte-equal tensors out, opened by diffusers and transformers."""

import json
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from flax import nnx
from safetensors.torch import save_file
from shared import tiers
from shared.checkpoint import tiny_tokenizer
from shared.weights import (
    CLASSES,
    COMPONENTS,
    LOAD,
    SAVE,
    TORCH,
    as_dtype,
    assert_same_bytes,
    original,
    read_folder,
    tensors_of,
    write_release,
)
from transformers import UMT5EncoderModel

from rehyat_jax.models.checkpoints import (
    convert,
    describe,
    load_text_encoder,
    load_transformer,
    load_vae,
    save_transformer,
)
from rehyat_jax.weights.plan import parameters


def in_diffusers_layout(component, models, folder):
    models[component].save_pretrained(folder)
    return folder


def in_diffusers_shards(component, models, folder):
    models[component].save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def in_the_release(component, models, folder):
    return write_release(folder, models)


def with_comfy_prefix(component, models, folder):
    folder.mkdir()
    parts = original(component, tensors_of(models[component]))
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in parts.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


def as_a_training_checkpoint(component, models, folder):
    """Self-Forcing's: a generator and its average, wrapped by FSDP, beside a critic and a step."""
    folder.mkdir()
    parts = original(component, tensors_of(models[component]))
    average = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in parts.items()}
    other = {name: tensor + 1 for name, tensor in average.items()}
    torch.save({"generator": other, "critic": other, "generator_ema": average, "step": 600}, folder / "model.pt")
    return folder / "model.pt"


FORMS = [in_diffusers_layout, in_diffusers_shards, in_the_release, with_comfy_prefix, as_a_training_checkpoint]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_dialect_comes_out_byte_equal(component, form, models, tmp_path):
    module = LOAD[component](form(component, models, tmp_path / "in"))
    SAVE[component](module, tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors_of(models[component]))


@pytest.mark.parametrize("dtype", tiers.breadth(["bfloat16", "float16"]))
@pytest.mark.parametrize("component", COMPONENTS)
def test_half_precision_comes_out_byte_equal(component, dtype, models, tmp_path):
    """Stored narrow, loaded narrow, saved narrow; and stored narrow, loaded wide, saved narrow again."""
    write_release(tmp_path / "in", models, dtype)
    tensors = as_dtype(tensors_of(models[component]), dtype)
    kept = set(WanTransformer3DModel._keep_in_fp32_modules if component == "transformer" else [])
    if (component, dtype) == ("text_encoder", "float16"):  # as transformers, whose list counts for float16 alone
        kept = set(UMT5EncoderModel._keep_in_fp32_modules)
    expected = {name: value.float() if kept & set(name.split(".")) else value for name, value in tensors.items()}
    SAVE[component](LOAD[component](tmp_path / "in", dtype=dtype), tmp_path / "narrow")
    assert_same_bytes(read_folder(tmp_path / "narrow"), expected)
    SAVE[component](LOAD[component](tmp_path / "in"), tmp_path / "wide", dtype=dtype)
    assert_same_bytes(read_folder(tmp_path / "wide"), expected)


@pytest.mark.parametrize("component", COMPONENTS)
def test_bfloat16_is_what_the_real_client_loads(component, models, tmp_path):
    """The same rounding and the same parts in float32 as ``from_pretrained(torch_dtype=torch.bfloat16)``."""
    models[component].save_pretrained(tmp_path / "in")
    key = "dtype" if component == "text_encoder" else "torch_dtype"
    theirs = CLASSES[component].from_pretrained(tmp_path / "in", **{key: torch.bfloat16})
    SAVE[component](LOAD[component](tmp_path / "in", dtype=jnp.bfloat16), tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors_of(theirs))


@pytest.mark.parametrize("shard", tiers.breadth([30_000, 10**9]))
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_real_client_opens_what_is_saved(component, shard, models, tmp_path):
    models[component].save_pretrained(tmp_path / "in")
    SAVE[component](LOAD[component](tmp_path / "in"), tmp_path / "out", max_shard_bytes=shard)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard < 10**9)
    theirs, info = CLASSES[component].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bytes(tensors_of(theirs), tensors_of(models[component]))
    config = dict(
        CLASSES[component].from_pretrained(tmp_path / "in").config.to_dict()
        if component == "text_encoder"
        else models[component].config
    )
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    for name, value in ours.items():
        if name in config and name not in ("_diffusers_version", "dropout_rate"):
            assert config[name] == (tuple(value) if isinstance(config[name], tuple) else value), name


@pytest.mark.full
def test_loaded_networks_compute_what_the_real_ones_do(models, tmp_path):
    """1e-4 absolute on activations of order one, float32: the tensors are not only there but in their places."""
    folder = write_release(tmp_path / "in", models)
    rng = np.random.default_rng(0)
    latents, text = rng.normal(size=(1, 16, 2, 4, 6)), rng.normal(size=(1, 5, 32))
    args = [torch.tensor(x, dtype=torch.float32) for x in (latents, [500.0], text)]
    expected = models["transformer"](*args, return_dict=False)[0].numpy()
    found = load_transformer(folder)(
        jnp.asarray(np.moveaxis(latents, 1, -1), jnp.float32), jnp.asarray([500.0]), jnp.asarray(text, jnp.float32)
    )
    scale = max(np.abs(expected).max(), 1)
    np.testing.assert_allclose(np.moveaxis(np.asarray(found), -1, 1) / scale, expected / scale, atol=1e-4)

    ids, mask = torch.tensor([[3, 17, 5, 1, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    expected = models["text_encoder"](ids, mask).last_hidden_state.numpy()
    found = load_text_encoder(folder)(jnp.asarray(ids.numpy(), jnp.int32), jnp.asarray(mask.numpy(), jnp.int32))
    np.testing.assert_allclose(np.asarray(found)[:, :4], expected[:, :4], atol=1e-4)

    video = rng.uniform(-1, 1, size=(1, 3, 1, 16, 16))
    expected = models["vae"].encode(torch.tensor(video, dtype=torch.float32)).latent_dist.mean.numpy()
    found = load_vae(folder).encode(jnp.asarray(np.moveaxis(video, 1, -1), jnp.float32))
    scale = max(np.abs(expected).max(), 1)
    np.testing.assert_allclose(np.moveaxis(np.asarray(found), -1, 1) / scale, expected / scale, atol=1e-4)


@pytest.mark.parametrize("names", [["shared.weight"], ["encoder.embed_tokens.weight"], None], ids=str)
def test_the_embedding_is_found_under_either_name_or_both(names, models, tmp_path):
    model = models["text_encoder"]
    model.save_pretrained(tmp_path)
    both = ("shared.weight", "encoder.embed_tokens.weight")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in both}
    tensors |= {name: model.shared.weight.clone() for name in names or both}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert np.array_equal(load_text_encoder(tmp_path).shared.embedding[...], model.shared.weight.numpy())
    assert describe(tmp_path).components[0].parameters == sum(tensor.numel() for tensor in tensors_of(model).values())


def test_parameters_take_the_type_asked_for_and_shapes_do_not_change(models, tmp_path):
    models["transformer"].save_pretrained(tmp_path)
    module = load_transformer(tmp_path, dtype=jnp.float16)
    kinds = {str(leaf.get_value().dtype) for leaf in parameters(nnx.state(module)).values()}
    assert kinds == {"float16", "float32"}
    assert module.condition_embedder.time_embedder.linear_1.kernel[...].dtype == jnp.float32
    assert module.blocks.attn1.to_q.kernel[...].shape == (2, 256, 256)


def test_the_whole_folder_of_the_real_pipeline_and_the_hub_cache_of_links(models, tmp_path):
    """The Hugging Face cache keeps shards as links from snapshots/REVISION/transformer into blobs."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    models["transformer"].save_pretrained(snapshot / "transformer", max_shard_size="500KB")
    (snapshot / "model_index.json").write_text("{}")
    for number, file in enumerate((snapshot / "transformer").iterdir()):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(blobs / f"{number:064x}")
    save_transformer(load_transformer(snapshot), tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors_of(models["transformer"]))


@pytest.mark.parametrize("dtype", tiers.breadth(["bfloat16", None]))
def test_the_release_converted_is_opened_by_the_real_pipeline(dtype, models, tmp_path):
    seen = []
    convert(write_release(tmp_path / "in", models), tmp_path / "out", dtype=dtype, progress=lambda *at: seen.append(at))
    pipeline = WanPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.flow_shift == 8.0
    assert pipeline.tokenizer("a cat").input_ids == tiny_tokenizer()("a cat").input_ids
    for name, model in models.items():
        expected = tensors_of(model)
        if dtype is None:
            assert_same_bytes(read_folder(tmp_path / "out" / name), expected)
        else:
            for tensor, found in read_folder(tmp_path / "out" / name).items():
                torch.testing.assert_close(found.float(), expected[tensor], rtol=2**-8, atol=0)
    total = sum(file.stat().st_size for file in (tmp_path / "out").glob("*/*.safetensors"))
    assert seen[-1][0] == seen[-1][1] <= total
    # And once more: the diffusers layout converts to itself.
    convert(tmp_path / "out", tmp_path / "again")
    for name in COMPONENTS:
        assert_same_bytes(read_folder(tmp_path / "again" / name), read_folder(tmp_path / "out" / name))
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index == json.loads((tmp_path / "out" / "model_index.json").read_text())


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_network_converts_alone(component, models, tmp_path):
    source = as_a_training_checkpoint(component, models, tmp_path / "in")
    convert(source, tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors_of(models[component]))
    # A causal transformer, by its training's names, gets what says how it attends (tests/test_few_step_files.py).
    assert len(list((tmp_path / "out").iterdir())) == (3 if component == "transformer" else 2)


def test_description_reads_headers_alone(models, tmp_path):
    info = describe(write_release(tmp_path / "in", models, "bfloat16"))
    assert [part.name for part in info.components] == COMPONENTS
    for part in info.components:
        tensors = tensors_of(models[part.name])
        count = sum(tensor.numel() for tensor in tensors.values())
        assert (part.tensors, part.parameters, part.nbytes) == (len(tensors), count, 2 * count)
        assert (part.dialect, part.dtypes) == ("original", (("bfloat16", count),))
    assert info.components[0].config.num_layers == 2
    assert "num_layers 2" in str(info)


_MEASURE = """
import resource, sys, jax.numpy as jnp
from rehyat_jax.models.checkpoints import load_transformer

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

# Once on a small one, for what a first call costs whatever the size; then the peak is set back to the present.
load_transformer(sys.argv[1], dtype=sys.argv[3])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
module = load_transformer(sys.argv[2], dtype=sys.argv[3])
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", tiers.breadth(["bfloat16", "float32"]))
def test_peak_memory_is_the_model_and_one_tensor(dtype, models, tmp_path):
    """A model of some 300 MB (float32): resident memory at its peak, mapped pages of the file and all."""
    models["transformer"].save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config |= {"num_layers": 8, "num_attention_heads": 6, "ffn_dim": 3072, "text_dim": 512}
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in WanTransformer3DModel.from_config(config).state_dict().items()}
    tensors = {name: torch.full(shape, 0.5, dtype=TORCH[dtype]) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "large" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    model = sum(tensor.nbytes for tensor in tensors.values())
    tensor = max(tensor.nbytes for tensor in tensors.values())
    assert model > (250e6 if dtype == "float32" else 125e6)
    del tensors
    run = [sys.executable, "-c", _MEASURE, *map(str, (tmp_path / "small", tmp_path / "large", dtype))]
    peak = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    # bfloat16 keeps some parts in float32: 1 % of this model.
    assert peak <= 1.01 * model + tensor, f"{peak / 1e6:.1f} MB for {model / 1e6:.1f} + {tensor / 1e6:.1f} MB"


def test_ml_dtypes_bfloat16_is_torch_bfloat16():
    """Rounding to nearest, ties to even, in both."""
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    ours = values.astype(ml_dtypes.bfloat16).view(np.int16)
    assert np.array_equal(ours, torch.tensor(values).bfloat16().view(torch.int16).numpy())
