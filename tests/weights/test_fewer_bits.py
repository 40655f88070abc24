"""Weights in fp8, int8 and GGUF: each number is the file's own, times its scale, exactly."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from shared.tiers import breadth
from shared.weights import original, tensors_of

from rehyat_jax import EightBits, HybridConfig, cli
from rehyat_jax.adapters.linear import stacked_layers
from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.checkpoints import describe, load_text_encoder, load_transformer, save_transformer
from rehyat_jax.models.umt5.rows import UMT5
from rehyat_jax.models.wan.rows import TRANSFORMER
from rehyat_jax.weights.opening import open_tensors
from rehyat_jax.weights.plan import make_plan, parameters
from rehyat_jax.weights.rows import scale_of

COMFY = "model.diffusion_model."


@pytest.fixture
def transformer(models):
    """The original's names, with heads of 128: a file needs no configuration."""
    return original("transformer", tensors_of(models["transformer"]))


def is_linear(name, tensor):
    inside = name.startswith(("blocks.", "encoder.block")) and "relative_attention_bias" not in name
    return inside and name.endswith(".weight") and tensor.ndim == 2


def tiled(scale, shape):
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def quantised(weight, scale, kind):
    top = 127 if kind == torch.int8 else torch.finfo(kind).max
    q = (weight / scale).clamp(-top, top)
    return (q.round() if kind == torch.int8 else q).to(kind)


def per_row(weight, top):
    return (weight.abs().amax(1, keepdim=True) / top).float()


def per_tile(weight, top):
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    return (padded.abs().reshape(padded.shape[0] // 128, 128, -1, 128).amax((1, 3)) / top).float()


def written(form, tensors, path, *, prefix=""):
    """A file of this form; what its linear weights stand for, by their names."""
    out, meant, layers = {}, {}, {}
    for name, tensor in tensors.items():
        layer, key = name.removesuffix(".weight"), prefix + name
        if not is_linear(name, tensor):
            out[key] = tensor
            continue
        tensor, kind = tensor.float(), torch.float8_e4m3fn
        scale = (tensor.abs().max() / 448).float()
        match form:
            case "plain":
                out[key] = tensor.to(kind)
                meant[name] = out[key].float()
                continue
            case "plain, E5M2":
                out[key] = tensor.to(torch.float8_e5m2)
                meant[name] = out[key].float()
                continue
            case "scaled, older":
                out[f"{prefix}{layer}.scale_weight"], out[f"{prefix}{layer}.scale_input"] = scale, torch.ones(())
                out[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=kind)
            case "scaled, newer":
                said = json.dumps({"format": "float8_e4m3fn"}).encode()
                out[f"{prefix}{layer}.weight_scale"], out[f"{prefix}{layer}.input_scale"] = scale[None], torch.ones(1)
                out[f"{prefix}{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
            case "scaled, header":
                out[f"{prefix}{layer}.weight_scale"] = scale
                layers[layer] = {"format": "float8_e4m3fn"}
            case "rows":
                scale = out[f"{prefix}{layer}.weight_scale"] = per_row(tensor, 448)
            case "rows, int8":
                kind, scale = torch.int8, per_row(tensor, 127)
                out[f"{prefix}{layer}.weight_scale"] = scale
            case "tiles, int8":
                kind, scale = torch.int8, per_tile(tensor, 127)
                out[f"{prefix}{layer}.weight_scale"] = scale
                scale = tiled(scale, tensor.shape)
        out[key] = quantised(tensor, scale, kind)
        meant[name] = out[key].float() * scale
    header = {"_quantization_metadata": json.dumps({"layers": layers})} if layers else {}
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, path, metadata=header | {"format": "pt"})
    return meant


FORMS = ("scaled, older", "scaled, newer", "rows, int8", "tiles, int8", "plain")
MORE = ("plain, E5M2", "scaled, header", "rows")


def assert_stands_for(module, rows, meant, dialect, *, others):
    """Every tensor, bit for bit in float32."""
    found, seen = parameters(nnx.state(module)), set()
    for row in rows:
        value = np.asarray(found[row.ours].get_value())
        for place, layer in enumerate(row.numbers(value.shape)):
            name = next((each for each in row.spellings(dialect, layer) if each in meant or each in others), None)
            ours = value if layer is None else value[place]
            wanted = (meant if name in meant else others)[name].float().numpy()
            np.testing.assert_array_equal(
                ours.T if row.layout == "linear" else ours.reshape(-1),
                wanted if row.layout == "linear" else _laid(wanted, row, ours.shape),
            )
            seen.add(name)
    assert meant.keys() <= seen


def _laid(theirs, row, shape):
    return (theirs.transpose(2, 3, 4, 1, 0) if row.layout == "conv3d" else theirs.reshape(shape)).reshape(-1)


@pytest.mark.parametrize("form", breadth(FORMS + MORE, test=5))
def test_each_number_is_the_files_times_its_scale(form, transformer, tmp_path):
    meant = written(form, transformer, tmp_path / "wan.safetensors", prefix=COMFY)
    assert len(meant) == 20
    module = load_transformer(tmp_path / "wan.safetensors")
    assert_stands_for(module, TRANSFORMER, meant, "original", others=transformer)
    kind = "I8" if "int8" in form else "F8_E5M2" if "E5M2" in form else "F8_E4M3"
    assert kind in dict(describe(tmp_path / "wan.safetensors").components[0].dtypes)


def test_a_text_encoder_in_fp8_with_its_tokenizer(models, tmp_path):
    tensors = tensors_of(models["text_encoder"])
    path = tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    meant = written("scaled, older", tensors | {"spiece_model": torch.arange(9).byte()}, path)
    assert len(meant) == 2 * 7  # 168 in UMT5-XXL: 24 layers of seven
    assert_stands_for(load_text_encoder(path), UMT5, meant, "diffusers", others=tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.ffn.2.scale_weight"), "1 of its weights in fp8 have none, 'blocks.1.ffn.2.weight'"),
        (lambda t: t.update({"blocks.0.norm3.scale_weight": torch.ones(())}), "the scale of no weight in fp8"),
        (
            lambda t: t.update({"blocks.0.ffn.0.scale_weight": torch.ones(7)}),
            r"shape \[7\] fits no weight of \[48",
        ),
        (lambda t: t.update({"blocks.0.ffn.0.scale_weight": torch.tensor(torch.nan)}), "NaN or infinity"),
        (lambda t: t.update({"blocks.0.ffn.0.weight_scale": torch.ones(())}), "two scales"),
        (lambda t: t.update({"blocks.0.ffn.0.weight_scale_2": torch.ones(())}), "nvfp4"),
        (
            lambda t: t.update({"x.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)}),
            "is in mxfp8, which is not supported",
        ),
    ],
)
def test_a_scale_that_is_missed_is_refused(change, message, transformer, tmp_path):
    written("scaled, older", transformer, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "y.safetensors")
    for ask in (load_transformer, describe):
        with pytest.raises(CheckpointError, match=message):
            ask(tmp_path / "y.safetensors")


def test_a_folder_of_comfyuis_files_needs_no_configuration(models, transformer, tmp_path):
    written("scaled, older", transformer, tmp_path / "wan2.1_t2v_fp8_scaled.safetensors", prefix=COMFY)
    encoder = tensors_of(models["text_encoder"]) | {"spiece_model": torch.arange(9).byte()}
    written("scaled, older", encoder, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    save_file(original("vae", tensors_of(models["vae"])), tmp_path / "wan_2.1_vae.safetensors")
    info = {part.name: part for part in describe(tmp_path).components}
    assert list(info) == ["transformer", "vae", "text_encoder"]
    assert (info["transformer"].config.dim, info["transformer"].config.ffn_dim) == (256, 48)
    assert "F8_E4M3" in dict(info["text_encoder"].dtypes)


def test_fp8_in_a_torch_file(transformer, tmp_path):
    cast = {k: v.to(torch.float8_e4m3fn) if is_linear(k, v) else v for k, v in transformer.items()}
    torch.save({"generator": cast}, tmp_path / "x.pt")
    meant = {k: v.float() for k, v in cast.items() if v.dtype == torch.float8_e4m3fn}
    assert_stands_for(load_transformer(tmp_path / "x.pt"), TRANSFORMER, meant, "original", others=transformer)


def random_blocks(kind, shape, rng):
    """Bytes of a type that NumPy cannot make: any, but for scales of order one."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    place = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 1)}[kind.name]
    scales = rng.uniform(0.001, 0.01, (*data.shape[:2], place[1])).astype(np.float16)
    data[..., place[0] : place[0] + 2 * place[1]] = scales.view(np.uint8).reshape(*data.shape[:2], -1)
    return data.reshape(shape[0], -1)


def gguf_of(tensors, path, kind, *, prefix=""):
    """As ComfyUI-GGUF writes one; what its quantised weights stand for by the package's own word."""
    writer, meant, rng = gguf.GGUFWriter(path, arch="wan"), {}, np.random.default_rng(0)
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        if array.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", list(array.shape))
            writer.add_tensor(prefix + name, array.reshape(array.shape[0], -1).astype(np.float16))
            meant[name] = torch.from_numpy(array.astype(np.float16).astype(np.float32))
        elif is_linear(name, tensor) and array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            by_us = kind.name.endswith("_K")
            data = random_blocks(kind, array.shape, rng) if by_us else gguf.quants.quantize(array, kind)
            writer.add_tensor(prefix + name, data, raw_dtype=kind)
            meant[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
        else:
            writer.add_tensor(prefix + name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", breadth(["Q4_K", "Q8_0", "Q4_0", "Q5_1", "Q5_K", "Q6_K"], test=2))
def test_gguf_is_what_its_package_makes_of_it(kind, transformer, tmp_path):
    path = tmp_path / "wan.gguf"
    meant = gguf_of(transformer, path, gguf.GGMLQuantizationType[kind], prefix=COMFY if kind == "Q8_0" else "")
    assert len(meant) > 16
    assert_stands_for(load_transformer(path), TRANSFORMER, meant, "original", others=transformer)
    assert make_plan(path, "transformer").config.num_layers == 2
    assert kind in str(describe(path))
    data = path.read_bytes()
    for size in (len(data) // 2, 400, 30):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"GGUF|truncated"):
            load_transformer(path)


def test_counts_that_a_gguf_file_cannot_hold_are_refused_at_once(tmp_path):
    """The package's own reader goes on for ever over them."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, arch="wan")
    writer.add_array("comfy.gguf.orig_shape.a", [2, 2, 8])
    writer.add_tensor("a", np.ones((2, 16), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    many = (1 << 60).to_bytes(8, "little")
    lengths = [8, 16, 24, data.index(b"comfy") + len("comfy.gguf.orig_shape.a") + 8, data.rindex(b"a\2\0\0\0") + 5]
    for place in lengths:
        path.write_bytes(data[:place] + many + data[place + 8 :])
        with pytest.raises(CheckpointError, match=r"GGUF|truncated|cannot be"):
            open_tensors(path)


# --- kept so on the device ---------------------------------------------------------------------------------------


def kept(module):
    """A module's kernels in eight bits and their scales, in numbers: [layers, in, out] of each by path."""
    found = parameters(nnx.state(module))
    small = {path: np.asarray(x.get_value()) for path, x in found.items() if x.get_value().dtype.itemsize == 1}
    scales = {path: np.asarray(found[scale_of(path)].get_value()) for path in small}
    return {path: q.astype(np.float32) * scales[path][:, None] for path, q in small.items()}


@pytest.mark.parametrize(
    ("form", "quantize"),
    breadth([("scaled, older", "fp8"), ("rows, int8", "int8"), ("rows", "fp8"), ("plain", "fp8")], test=2),
)
def test_a_file_in_eight_bits_is_kept_as_it_is(form, quantize, transformer, tmp_path):
    meant = written(form, transformer, tmp_path / "x.safetensors")
    numbers = kept(load_transformer(tmp_path / "x.safetensors", dtype=jnp.bfloat16, quantize=quantize))
    assert len(numbers) == 10
    for row in TRANSFORMER:
        if row.ours in numbers:
            for layer in range(2):
                np.testing.assert_array_equal(numbers[row.ours][layer].T, meant[row.name("original", layer)].numpy())


def test_a_text_encoder_is_kept_so_too(models, tmp_path):
    """Against the numbers that the file stands for, in float32: the product is scaled after its sum."""
    path = tmp_path / "umt5.safetensors"
    written("scaled, older", tensors_of(models["text_encoder"]), path)
    small, plain = (load_text_encoder(path, quantize=quantize) for quantize in ("fp8", None))
    assert len(kept(small)) == 7
    # Its activations have outliers: products stay in its own type.
    assert not any(x.rounds_inputs for x in stacked_layers(load_text_encoder(path, quantize="int8")).values())
    ids, mask = jnp.arange(5, dtype=jnp.int32)[None], jnp.ones((1, 5), jnp.int32)
    np.testing.assert_allclose(small(ids, mask), plain(ids, mask), rtol=0, atol=1e-4)


def test_other_weights_are_rounded_by_rows(models, tmp_path):
    """E3M4 has four bits behind the point: 2⁻⁵ of a number, and 2⁻⁷ / 15.5 of a row's largest below its normals; int8's
    steps are a 127th of that, half of which is lost at most."""
    models["transformer"].save_pretrained(tmp_path / "wan")
    plain = parameters(nnx.state(load_transformer(tmp_path / "wan")))
    errors = {}
    for kind in ("fp8", "int8"):
        for path, found in kept(load_transformer(tmp_path / "wan", quantize=kind)).items():
            wanted = np.asarray(plain[path].get_value())
            top = np.abs(wanted).max(axis=1, keepdims=True)
            fp8 = np.maximum(np.abs(wanted) / 32, top / 15.5 / 2**7)
            assert (np.abs(found - wanted) <= (fp8 if kind == "fp8" else top / 127 * 0.5001)).all(), path
            errors[kind] = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert errors["int8"] < errors["fp8"] < 0.015  # of Gaussian numbers; E4M3 loses 0.026


@pytest.mark.parametrize("kind", breadth(["fp8", "int8"]))
def test_convert_writes_it_and_it_is_kept_so(kind, models, tmp_path, capsys):
    models["transformer"].save_pretrained(tmp_path / "wan")
    assert cli.main(["convert", str(tmp_path / "wan"), str(tmp_path / "small"), "--quantize", kind]) == 0
    capsys.readouterr()
    again, at_once = (kept(load_transformer(tmp_path / name, quantize=kind)) for name in ("small", "wan"))
    plain = parameters(nnx.state(load_transformer(tmp_path / "wan")))
    for path, found in again.items():
        if kind == "int8":
            np.testing.assert_array_equal(found, at_once[path])
        else:  # files have no E3M4
            lost = [np.linalg.norm(x - np.asarray(plain[path].get_value())) for x in (at_once[path], found)]
            assert lost[0] < 0.6 * lost[1]
    read = parameters(nnx.state(load_transformer(tmp_path / "small")))
    for path, found in again.items():
        np.testing.assert_array_equal(np.asarray(read[path].get_value()), found)
    assert {"fp8": "F8_E4M3", "int8": "I8"}[kind] in dict(describe(tmp_path / "small").components[0].dtypes)
    with pytest.raises(CheckpointError, match="kept in eight bits"):
        save_transformer(load_transformer(tmp_path / "small", quantize=kind), tmp_path / "none")
    assert cli.main(["convert", str(tmp_path / "wan"), str(tmp_path / "none"), "--quantize", "fp4"]) == 2


@pytest.mark.full
def test_a_student_kept_in_fp8_is_nearly_the_one_in_float32(models, tmp_path):
    """Random weights of order one: 2⁻⁵ at most of each, 2⁻⁶·⁵ in the mean, which a few layers add up: 2.5 %."""
    models["transformer"].save_pretrained(tmp_path / "wan")
    hybrid = HybridConfig(chunk_frames=1, overlap_frames=0)
    plain, small = (load_transformer(tmp_path / "wan", hybrid=hybrid, quantize=q) for q in (None, "fp8"))
    rng = np.random.default_rng(0)
    latents, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 2, 4, 4, 16), (1, 3, 32)))
    wanted, found = (m(latents, jnp.array([500.0]), text) for m in (plain, small))
    assert 1e-4 < jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted) < 0.025


def test_a_product_in_int8_is_that_of_the_rounded_numbers(models, tmp_path):
    """The sum of integers is exact: what is left are four roundings of float32, 1e-6 of the largest, against NumPy in
    float64. A row of zeros, one with an outlier and one that is not finite are rows by themselves."""
    models["transformer"].save_pretrained(tmp_path / "wan")
    module = load_transformer(tmp_path / "wan", quantize="int8").with_hybrid(HybridConfig(), rngs=nnx.Rngs(0))
    weights = kept(module)["blocks.attn1.to_q.kernel"][1]
    layer = nnx.merge(*nnx.split(module.blocks.attn1.to_q))
    for each in (layer.kernel, layer.scale, layer.bias):
        each.set_value(each.get_value()[1])
    x = np.random.default_rng(0).standard_normal((2, 3, 256), np.float32)
    x[0, 0], x[0, 1, 7] = 0, 1e4
    step = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.float32(1e-30))
    rounded = np.rint(x / step).astype(np.float64) * step
    wanted = rounded @ weights.astype(np.float64) + np.asarray(layer.bias.get_value(), np.float64)
    found = layer(jnp.asarray(x))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(found[0, 0], layer.bias.get_value())
    for value in (np.nan, np.inf):
        x[1, 2, 5] = value
        again = np.asarray(layer(jnp.asarray(x)))
        assert np.isnan(again[1, 2]).all()
        np.testing.assert_array_equal(again[:, :2], np.asarray(found)[:, :2])


def test_int8_leaves_out_the_layers_that_are_named(models, tmp_path, capsys):
    models["transformer"].save_pretrained(tmp_path / "wan")
    how = EightBits("int8", leave_out=("attn2", "ffn.down"))
    module = load_transformer(tmp_path / "wan", quantize=how)
    names = {f"blocks.{each}.kernel" for each in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out", "ffn.up")}
    assert kept(module).keys() == names
    assert module.blocks.ffn.up.rounds_inputs
    assert not load_transformer(tmp_path / "wan", quantize="int8-weights").blocks.ffn.up.rounds_inputs
    plain = parameters(nnx.state(load_transformer(tmp_path / "wan")))
    same = parameters(nnx.state(module))
    np.testing.assert_array_equal(same[left := "blocks.ffn.down.kernel"].get_value(), plain[left].get_value())
    asked = ["convert", str(tmp_path / "wan"), str(tmp_path / "small"), "--quantize", "int8"]
    assert cli.main([*asked, "--quantize-except", "attn2", "ffn.down"]) == 0
    found = dict(describe(tmp_path / "small").components[0].dtypes)
    assert found["I8"] == sum(plain[name].get_value().size for name in names)
    with pytest.raises(ConfigError, match=r"no layer 'ffn.sideways' in a block to leave out: there are attn1.to_k, "):
        load_transformer(tmp_path / "wan", quantize=EightBits("int8", leave_out=("ffn.sideways",)))
    assert cli.main(["convert", str(tmp_path / "wan"), str(tmp_path / "x"), "--quantize-except", "ffn"]) == 2
    assert "--quantize-except leaves layers out of --quantize" in capsys.readouterr().err


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_fp8_is_that_of_the_numbers(bias, models, tmp_path):
    """In float32 of 256 summands: 1e-5 of the largest, against NumPy in float64. A conversion keeps the kernels so."""
    models["transformer"].save_pretrained(tmp_path / "wan")
    module = load_transformer(tmp_path / "wan", quantize="fp8").with_hybrid(HybridConfig(), rngs=nnx.Rngs(0))
    numbers = kept(module)
    assert len(numbers) == 10
    layer = nnx.merge(*nnx.split(module.blocks.attn1.to_q))
    layer.kernel.set_value(layer.kernel.get_value()[1])
    layer.scale.set_value(layer.scale.get_value()[1])
    layer.bias = layer.bias if bias else nnx.data(None)
    added = 0.0
    if bias:
        layer.bias.set_value(layer.bias.get_value()[1])
        added = np.asarray(layer.bias.get_value(), np.float64)
    x = np.random.default_rng(0).standard_normal((2, 3, 256), np.float32)
    wanted = x.astype(np.float64) @ numbers["blocks.attn1.to_q.kernel"][1] + added
    np.testing.assert_allclose(layer(jnp.asarray(x)), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
