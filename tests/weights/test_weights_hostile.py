"""Damaged, foreign and hostile checkpoints: one clear sentence each, and nothing left behind."""

import contextlib
import json
import os
import re
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shared.tiers import chosen, examples
from transformers import UMT5Config, UMT5EncoderModel

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.checkpoints import (
    convert,
    describe,
    load_text_encoder,
    load_transformer,
    load_vae,
    save_transformer,
)
from rehyat_jax.models.wan.config import VAEConfig
from rehyat_jax.weights.opening import open_tensors
from rehyat_jax.weights.registry import REGISTRY

WEIGHTS = "diffusion_pytorch_model.safetensors"
quick = settings(
    deadline=None,
    max_examples=examples(60),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2
    )


@pytest.fixture
def folder(transformer, tmp_path):
    transformer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change, file=WEIGHTS):
    tensors = load_file(folder / file)
    # Read before the file below them is written anew.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def refused(path, *words, load=load_transformer, error=CheckpointError):
    """One sentence that names the culprit; for `convert` and its destination alike."""
    with pytest.raises(error) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# --- what the tensors lack ---------------------------------------------------------------------------------------


def test_missing_tensors_are_named_and_counted(folder):
    def change(tensors):
        for name in [name for name in tensors if "attn2" in name]:
            del tensors[name]

    edit(folder, change)
    refused(folder, "lacks 20 tensors", "'blocks.0.attn2.to_q.weight'", "and 17 more")


def test_unused_tensors_are_named_and_counted(folder):
    extra = {"blocks.2.attn1.to_q.weight": torch.zeros(24, 24), "odd": torch.ones(1)}
    edit(folder, lambda tensors: tensors.update(extra))
    refused(folder, "2 tensors", "'blocks.2.attn1.to_q.weight'", "'odd'", "no use")


def test_misshapen_tensors_are_named_with_both_shapes(folder):
    edit(folder, lambda tensors: tensors.update({"blocks.1.ffn.net.2.weight": torch.zeros(16, 24)}))
    refused(folder, "'blocks.1.ffn.net.2.weight'", "misshapen", "[16, 24]", "[24, 16]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found(folder, value, dtype, tmp_path):
    def change(tensors):
        tensors["blocks.1.attn1.to_k.weight"] = tensors["blocks.1.attn1.to_k.weight"].to(dtype)
        tensors["blocks.1.attn1.to_k.weight"][23, 23] = value

    edit(folder, change)
    refused(folder, "'blocks.1.attn1.to_k.weight'", "NaN or infinity")
    refused(folder, "NaN or infinity", load=lambda path: convert(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_value_too_large_for_the_type_asked_for_is_found(folder):
    edit(folder, lambda tensors: tensors["proj_out.weight"].fill_(70_000.0))
    load_transformer(folder)
    refused(folder, "'proj_out.weight'", "float16", load=lambda path: load_transformer(path, dtype="float16"))


def test_unsupported_number_types_are_named(folder, tmp_path):
    edit(folder, lambda tensors: tensors.update({"proj_out.bias": tensors["proj_out.bias"].double()}))
    refused(folder, "'proj_out.bias'", "F64", "F32, BF16, F16")
    refused(folder, "float64", load=lambda path: load_transformer(path, dtype="float64"))


# --- the text encoder's embedding --------------------------------------------------------------------------------


@pytest.fixture
def text_encoder(tmp_path):
    config = UMT5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(tmp_path / "text")
    return tmp_path / "text"


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_an_embedding_of_zeros_is_refused(text_encoder, name, tmp_path):
    def change(tensors):
        # A negative zero is a zero too.
        tensors[name] = -torch.zeros_like(tensors.pop("shared.weight"))

    edit(text_encoder, change, "model.safetensors")
    refused(text_encoder, name, "all zeros", load=load_text_encoder)
    refused(text_encoder, name, "all zeros", load=lambda path: convert(path, tmp_path / "out"))


def test_two_embeddings_that_differ_are_refused(text_encoder):
    tied = "encoder.embed_tokens.weight"
    edit(text_encoder, lambda tensors: tensors.update({tied: tensors["shared.weight"] + 1}), "model.safetensors")
    refused(text_encoder, "'shared.weight'", f"'{tied}'", "differ", load=load_text_encoder)
    edit(text_encoder, lambda tensors: tensors.update({tied: torch.tensor(1.0)}), "model.safetensors")
    refused(text_encoder, f"'{tied}'", "misshapen", load=load_text_encoder)


# --- the wrong checkpoint ----------------------------------------------------------------------------------------


def test_another_network_is_named(folder, text_encoder):
    refused(folder, "Wan transformer", "not a Wan VAE", load=load_vae)
    refused(folder / WEIGHTS, "Wan transformer", "not a Wan VAE", load=load_vae)
    refused(folder, "Wan transformer", "not a UMT5 text encoder", load=load_text_encoder)
    refused(text_encoder, "UMT5 text encoder", "not a Wan transformer")
    refused(text_encoder / "model.safetensors", "UMT5 text encoder", "not a Wan transformer")


def test_a_vae_in_a_transformers_clothes(folder):
    rows = REGISTRY["vae"].rows(VAEConfig(base_dim=4))
    save_file({row.name("original"): torch.zeros(2) for row in rows}, folder / WEIGHTS)
    refused(folder, "Wan VAE", "not a Wan transformer")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("img_emb.proj.1.weight", "no use for"),
        ("blocks.0.cross_attn.k_img.weight", "no use for"),
        ("condition_embedder.image_embedder.norm1.weight", "no use for"),
        ("blocks.0.attn2.add_k_proj.bias", "no use for"),
        ("vace_blocks.0.proj_in.weight", "VACE"),
    ],
)
def test_other_members_of_the_family_are_named(folder, name, what):
    edit(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    refused(folder, what, f"'{name}'")


def test_configurations_that_the_tensors_contradict_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    images = {"image_dim": 1280, "added_kv_proj_dim": width}
    (folder / "config.json").write_text(json.dumps(config | images))
    refused(folder, "lacks 18 tensors", "image_embedder")
    (folder / "config.json").write_text(json.dumps(config | {"image_dim": 1280}))
    refused(folder, "added_kv_proj_dim None is not supported", error=ConfigError)
    (folder / "config.json").write_text(json.dumps({"dim": 24, "num_heads": 2, "model_type": "vace"}))
    refused(folder, "'vace'", error=ConfigError)


def test_a_second_transformer_that_is_none_does_no_harm(folder):
    root = folder.parent
    folder.rename(root / "transformer")
    (root / "model_index.json").write_text(json.dumps({"transformer_2": [None, None]}))
    load_transformer(root)
    refused(root, "no vae folder", load=load_vae)


def test_paths_that_hold_nothing(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(tmp_path, "no weights")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "neither")
    for load in (load_vae, load_text_encoder, describe):
        refused(tmp_path / "nowhere", "does not exist", load=load)
    save_file({"a.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    refused(tmp_path, "1 tensor ('a.weight')", load=describe)
    refused(tmp_path, "1 tensor ('a.weight')")


def test_several_files_to_choose_from_are_named(folder):
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    load_transformer(folder)
    (folder / "b.safetensors").write_bytes(b"")
    refused(folder, "a.safetensors", "b.safetensors")


def test_a_width_that_no_wan_has_needs_a_configuration(folder):
    (folder / "config.json").unlink()
    refused(folder / WEIGHTS, "width 24", "config.json")


# --- headers -----------------------------------------------------------------------------------------------------


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


PETA = 1 << 50
HOSTILE = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"1234567", "truncated"),
    "no header": (struct.pack("<Q", 64), "truncated"),
    "header of exabytes": (safetensors({}, length=2**64 - 1), "truncated"),
    "petabytes announced": (safetensors({"a": entry(0, 4 * PETA, [PETA])}), "truncated"),
    "shape larger than its bytes": (safetensors({"a": entry(0, 4, [PETA])}, bytes(4)), "cannot lie"),
    "product that wraps in 64 bits": (safetensors({"a": entry(0, 0, [2**32, 2**32])}), "cannot lie"),
    "overlap": (safetensors({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "overlaps"),
    "the same bytes twice": (safetensors({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8)), "overlaps"),
    "gap": (safetensors({"a": entry(4, 8, [1])}, bytes(8)), "gap"),
    "backwards": (safetensors({"a": entry(8, 0, [2])}, bytes(8)), "cannot lie"),
    "negative": (safetensors({"a": entry(-8, 0, [2])}, bytes(8)), "'a'"),
    "negative shape": (safetensors({"a": entry(0, 8, [-2, -1])}, bytes(8)), "'a'"),
    "a true shape": (safetensors({"a": entry(0, 4, [True])}, bytes(4)), "'a'"),
    "a fraction": (safetensors({"a": entry(0, 4.0, [1])}, bytes(4)), "'a'"),
    "trailing bytes": (safetensors({"a": entry(0, 4, [1])}, bytes(9)), "5 bytes after"),
    "one byte short": (safetensors({"a": entry(0, 4, [1])}, bytes(3)), "truncated"),
    "unknown type": (safetensors({"a": entry(0, 4, [1], "F8_E9M9")}, bytes(4)), "F8_E9M9"),
    "no type": (safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "'a'"),
    "sixty dimensions": (safetensors({"a": entry(0, 4, [1] * 60)}, bytes(4)), "60 dimensions"),
    "duplicate": (safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4, [1])).encode(),) * 2), bytes(4)), "twice"),
    "not JSON": (safetensors(b"{]"), "JSON"),
    "not UTF-8": (safetensors(b"\xff\xfe{}"), "JSON"),
    "a list": (safetensors([]), "JSON"),
    "deep": (safetensors(b"[" * 200_000), "JSON"),
    "a number of a million digits": (safetensors(b'{"a":' + b"9" * 10**6 + b"}"), "JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case, folder):
    content, word = HOSTILE[case]
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, WEIGHTS, word)
    refused(folder / WEIGHTS, word, load=describe)


def test_a_header_beyond_the_formats_limit_is_not_read(folder):
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        # A sparse file: the length is there and the bytes are not.
        file.truncate(300_000_000)
    refused(folder, "header of 200000000 bytes")


@quick
@given(cut=st.integers(0, 10**9), flips=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), max_size=4))
def test_cut_and_altered_files_never_escape(folder, cut, flips):
    """Whatever happens to the bytes of a header: a model or a `CheckpointError`."""
    whole = (folder / WEIGHTS).read_bytes()
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    altered = bytearray(whole[: cut % len(whole)] if cut % 3 == 0 else whole)
    for place, value in flips:
        if altered:
            altered[place % min(size, len(altered))] = value
    other = folder.parent / "altered.safetensors"
    other.write_bytes(bytes(altered))
    (folder.parent / "config.json").write_bytes((folder / "config.json").read_bytes())
    with contextlib.suppress(CheckpointError):
        load_transformer(other)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
offsets = st.integers(-4, 64) | st.integers()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | json_values,
        "data_offsets": st.tuples(offsets, offsets).map(list) | json_values,
    },
)


@quick
@given(header=st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3), data=st.binary(max_size=64))
def test_any_header_ends_in_tensors_or_a_sentence(tmp_path, header, data):
    path = tmp_path / "any.safetensors"
    path.write_bytes(safetensors(header, data))
    try:
        tensors = open_tensors(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in tensors.infos.values()) == len(data)
    for name, info in tensors.infos.items():
        assert sum(piece.nbytes for piece in tensors.pieces(name)) == info.nbytes


# --- configurations ----------------------------------------------------------------------------------------------

#: In place of each entry in turn.
ODD = [None, 1 << 24, [], True, -1, 0, 10**40, 0.5, float("nan"), "2", [1 << 24] * 3, [0.5] * 3, [1] * 65, {"a": []}]

#: Without the tests' type checks, which would see the odd value before the configuration does.
_TRY_CONFIGS = """
import json, pathlib, sys, time
from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models import checkpoints

counts = {}
for component, path in json.loads(sys.argv[1]).items():
    folder, load = pathlib.Path(path), getattr(checkpoints, f"load_{component}")
    whole, loaded = json.loads((folder / "config.json").read_text()), 0
    for name in whole:
        for value in json.loads(sys.argv[2]):
            (folder / "config.json").write_text(json.dumps(whole | {name: value}))
            begun = time.monotonic()
            try:
                load(folder)
                loaded += 1
            except (CheckpointError, ConfigError):
                pass
            except Exception as error:
                print(component, name, "=", value, "escaped as", repr(error)[:300])
            if time.monotonic() - begun > 20:  # a refusal takes some hundredths of a second
                print(component, name, "=", value, "took", time.monotonic() - begun, "s")
    counts[component] = loaded
print(json.dumps(counts))
"""


@pytest.mark.full
def test_any_configuration_ends_in_a_model_or_a_sentence(folder, text_encoder, tmp_path):
    """Of each network, in one process."""
    AutoencoderKLWan(base_dim=2, num_res_blocks=1).save_pretrained(tmp_path / "vae")
    paths = {"transformer": str(folder), "text_encoder": str(text_encoder), "vae": str(tmp_path / "vae")}
    odd = chosen(ODD, test=3)
    run = [sys.executable, "-c", _TRY_CONFIGS, json.dumps(paths), json.dumps(odd)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    *escaped, counts = done.stdout.splitlines()
    assert not escaped, escaped[:3]
    # Entries that do not matter load whatever they say, so that the loop is known to have got so far.
    loaded = json.loads(counts)
    assert loaded.keys() == paths.keys()
    assert min(loaded.values()) > len(odd)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"nonsense", b"\xff", b'{"num_layers": 1, "num_layers": 2}', b"[" * 100_000]
)
def test_configurations_that_are_not_json_objects(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json")


@pytest.mark.parametrize("value", [1 << 24, 10**6])
def test_a_configuration_of_a_million_layers_fails_at_once(folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": value}))
    refused(folder, "too few")


# --- index files -------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(transformer, tmp_path):
    transformer.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def rewrite_index(folder, change):
    path = folder / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "x.bin",
        "..\\x.safetensors",
        "a\0.safetensors",
        "x/../../y.safetensors",
        "~/x.safetensors",
    ],
)
def test_path_tricks_in_an_index(sharded, file):
    (sharded.parent / "x.safetensors").write_bytes(safetensors({"proj_out.bias": entry(0, 4, [1])}, bytes(4)))
    rewrite_index(sharded, lambda index: index["weight_map"].update({"proj_out.bias": file}))
    refused(sharded, "index.json", repr(file))


def test_a_link_out_of_the_folder(sharded, folder):
    """As a single file's link may: stores of models are farms of links."""
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.rename(sharded.parent / "elsewhere.safetensors")
    shard.symlink_to(sharded.parent / "elsewhere.safetensors")
    assert load_transformer(sharded).config == load_transformer(folder).config
    shard.unlink()
    refused(sharded, shard.name, "does not exist")
    shard.symlink_to(shard)
    refused(sharded, shard.name, "does not exist")


def test_an_index_that_disagrees_with_its_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    rewrite_index(sharded, lambda index: index["weight_map"].update({name: second.name}))
    refused(sharded, repr(name), f"not in {second.name}")
    rewrite_index(sharded, lambda index: index["weight_map"].pop(name))
    refused(sharded, "does not know", repr(name))
    rewrite_index(sharded, lambda index: index["weight_map"].update({name: first.name}))
    load_transformer(sharded)
    edit(sharded, lambda tensors: tensors.update({name: load_file(first)[name]}), second.name)
    refused(sharded, "more than one shard")


def test_a_truncated_shard(sharded):
    last = sorted(sharded.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    refused(sharded, last.name, "truncated")


@quick
@given(
    index=st.fixed_dictionaries(
        {},
        optional={
            "weight_map": json_values
            | st.dictionaries(
                st.sampled_from(["proj_out.bias", "a"]),
                st.sampled_from(["a.safetensors", "../a.safetensors"]) | json_values,
            )
        },
    )
)
def test_any_index_ends_in_a_sentence(tmp_path, index):
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        open_tensors(path)


# --- torch's files -----------------------------------------------------------------------------------------------


def test_torch_files_run_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"proj_out.bias": Bomb()}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "x.pth", "not a torch file of plain tensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 1000])
def test_truncated_torch_files(transformer, keep, tmp_path):
    torch.save(transformer.state_dict(), tmp_path / "whole.pth")
    (tmp_path / "x.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:keep])
    refused(tmp_path / "x.pth", "x.pth", "truncated")


def test_torch_files_of_other_things(tmp_path):
    torch.save([1, 2, 3], tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "no tensors")
    torch.save({"proj_out.bias": torch.arange(3)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "'proj_out.bias'", "int64")


def test_without_torch_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    torch.save({"proj_out.bias": torch.ones(3)}, tmp_path / "x.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(tmp_path / "x.pth", "install torch")


# --- writing -----------------------------------------------------------------------------------------------------


def test_nothing_is_written_over(folder, tmp_path):
    module = load_transformer(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    for write in (lambda: save_transformer(module, tmp_path / "full"), lambda: convert(folder, tmp_path / "full")):
        with pytest.raises(CheckpointError, match="not empty"):
            write()
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    save_transformer(module, tmp_path / "empty")
    load_transformer(tmp_path / "empty")


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path):
    """A limit on the size of files stands in for the disk: the kernel fails the write in the same place."""
    module = load_transformer(folder)
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (lambda: save_transformer(module, tmp_path / "out"), lambda: convert(folder, tmp_path / "out")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(CheckpointError, match=re.escape(f"cannot write {tmp_path / 'out'}: ")):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    module = load_transformer(folder)
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(CheckpointError, match="file"):
            save_transformer(module, place)


def test_an_interrupt_leaves_nothing_behind(folder, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_a_module_that_has_diverged_is_not_saved(folder, tmp_path):
    module = load_transformer(folder)
    module.proj_out.bias.set_value(np.nan * module.proj_out.bias[...])
    with pytest.raises(CheckpointError, match=re.escape("'proj_out.bias'")):
        save_transformer(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()
