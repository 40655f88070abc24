"""Files as people really have them: each kind with several examples, and the same bytes out of each."""

import argparse
import dataclasses
import importlib
import json
import mmap
import resource
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared.tiers import breadth
from shared.weights import (
    COMPONENTS,
    LOAD,
    SAVE,
    assert_same_bytes,
    original,
    read_folder,
    tensors_of,
    write_release,
)

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.checkpoints import (
    convert,
    describe,
    load_text_encoder,
    load_transformer,
    load_vae,
    save_transformer,
)
from rehyat_jax.models.networks import make_plan
from rehyat_jax.weights.load import filled
from rehyat_jax.weights.opening import open_tensors


@pytest.fixture
def transformer(models):
    """The original's names, with heads of 128: a file needs no configuration."""
    return original("transformer", tensors_of(models["transformer"]))


def same(path, models, tmp_path, component="transformer"):
    """The file loads, and is written as the real model; `info` counts the same parameters."""
    SAVE[component](LOAD[component](path), tmp_path / "same")
    assert_same_bytes(read_folder(tmp_path / "same"), tensors_of(models[component]))
    (info,) = [part for part in describe(path).components if part.name == component]
    assert info.parameters == sum(tensor.numel() for tensor in tensors_of(models[component]).values())


# --- names first, then types -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    """As a training program's own package has one."""

    rate: float


BESIDE = {
    "a counter": {"step": torch.tensor(600)},
    "counters of several kinds": {
        "global_step": torch.arange(3),
        "done": torch.tensor(True),
        "n": torch.ones(2).byte(),
    },
    "an optimizer": {"optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "lr": 1e-4}},
    "options": {"args": argparse.Namespace(lr=1e-4, name="x"), "epoch": 3, "note": "text", "list": [1, None]},
    "numbers of numpy": {"best": np.float64(0.5), "loss": np.arange(3.0)},
    "random states": {"rng_state": torch.zeros(16, dtype=torch.uint8), "lr_scheduler": {"last": torch.tensor(3)}},
    "a decay and a scale": {"ema_decay": torch.tensor(0.999), "loss_scale": torch.tensor(2.0**16)},
    "an option's own class": {"config": Options(rate=1e-4)},
    "doubles": {"ema_decay": {"x": torch.ones(2, dtype=torch.float64)}},
}


@pytest.mark.parametrize("what", breadth(BESIDE, test=4))
@pytest.mark.parametrize("key", breadth(["state_dict", "model", None]))
def test_other_state_beside_the_weights_is_left_alone(what, key, models, transformer, tmp_path):
    whole = dict(transformer) if key is None else {key: transformer}
    torch.save(whole | BESIDE[what], tmp_path / "x.pt")
    same(tmp_path / "x.pt", models, tmp_path)


@pytest.mark.parametrize(
    "beside",
    [
        {"step": torch.tensor(600)},
        {"spiece_model": torch.arange(9).byte()},
        {"position_ids": torch.arange(9)},
        {"flag": torch.tensor(True)},
    ],
    ids=lambda each: next(iter(each)),
)
@pytest.mark.parametrize("component", COMPONENTS)
def test_what_counts_is_no_weight(component, beside, models, tmp_path):
    save_file(original(component, tensors_of(models[component])) | beside, tmp_path / "x.safetensors")
    same(tmp_path / "x.safetensors", models, tmp_path, component)


@pytest.mark.parametrize("name", ["os.system", "shutil.rmtree", "builtins.eval", "torch.nn.Linear"])
def test_what_runs_code_is_refused_by_name(name, transformer, tmp_path):
    module, _, attribute = name.rpartition(".")

    class Bomb:
        def __reduce__(self):
            return getattr(importlib.import_module(module), attribute), ("1",)

    torch.save({"model": transformer, "more": Bomb()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a torch file of plain tensors"):
        load_transformer(tmp_path / "x.pt")


def test_what_might_be_a_weight_is_refused_all_the_same(transformer, tmp_path):
    for extra in ({"blocks.0.extra.weight": torch.ones(2)}, {"motion_encoder.weight": torch.ones(2)}):
        save_file(transformer | extra, tmp_path / "x.safetensors")
        for ask in (load_transformer, describe):
            with pytest.raises(CheckpointError, match=next(iter(extra))):
                ask(tmp_path / "x.safetensors")


def all_in_one(models):
    prefixes = {
        "transformer": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "text_encoders.umt5xxl.transformer.",
    }
    tensors = {}
    for component, prefix in prefixes.items():
        theirs = tensors_of(models[component])
        parts = theirs if component == "text_encoder" else original(component, theirs)
        tensors |= {prefix + name: tensor.clone() for name, tensor in parts.items()}
    return tensors | {"text_encoders.umt5xxl.logit_scale": torch.ones(1), "clip_vision.visual.proj": torch.ones(2, 2)}


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_all_in_one_file(component, models, tmp_path):
    save_file(all_in_one(models), tmp_path / "all.safetensors")
    same(tmp_path / "all.safetensors", models, tmp_path, component)
    assert {part.name for part in describe(tmp_path / "all.safetensors").components} == set(COMPONENTS)


def test_a_whole_umt5_with_its_decoder(models, tmp_path):
    own = tensors_of(models["text_encoder"])
    decoder = {
        name.replace("encoder.", "decoder."): tensor + 1 for name, tensor in own.items() if name.startswith("encoder.")
    }
    more = {"lm_head.weight": own["shared.weight"] + 1, "decoder.embed_tokens.weight": own["shared.weight"] + 2}
    save_file(own | decoder | more, tmp_path / "x.safetensors")
    same(tmp_path / "x.safetensors", models, tmp_path, "text_encoder")


@pytest.mark.parametrize("narrow", ["shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "zeros"], ids=str)
def test_one_of_two_tied_embeddings_zero_or_narrower(narrow, dtype, models, tmp_path):
    own = tensors_of(models["text_encoder"])
    table = own["shared.weight"]
    pair = {name: table.clone() for name in ("shared.weight", "encoder.embed_tokens.weight")}
    pair[narrow] = torch.zeros_like(table) if dtype == "zeros" else table.to(dtype)
    save_file(own | pair, tmp_path / "x.safetensors")
    same(tmp_path / "x.safetensors", models, tmp_path, "text_encoder")
    convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), own)


# --- prefixes ----------------------------------------------------------------------------------------------------

PREFIXES = ["pipe.dit.", "dit.", "net.", "student.", "ema.", "model.model.", "module.", "pipe.module.dit.", "x.1.y."]


@pytest.mark.parametrize("prefix", breadth(PREFIXES, test=2))
@pytest.mark.parametrize("component", COMPONENTS)
def test_any_prefix_that_leaves_known_names(component, prefix, models, tmp_path):
    parts = original(component, tensors_of(models[component]))
    save_file({prefix + name: tensor for name, tensor in parts.items()}, tmp_path / "x.safetensors")
    same(tmp_path / "x.safetensors", models, tmp_path, component)


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ("generator_ema.model.", "generator.model."),
        ("ema.", "net."),
        ("student_ema.", "student."),
        ("model_ema.diffusion_model.", "model.diffusion_model."),
        ("student.", "teacher."),
        ("net.", "net_teacher.teacher."),
        ("generator.", "real_score."),
    ],
)
def test_of_several_networks_the_average_then_the_one_that_learns(taken, left, models, transformer, tmp_path):
    tensors = {taken + name: tensor for name, tensor in transformer.items()}
    tensors |= {left + name: tensor + 1 for name, tensor in transformer.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    same(tmp_path / "x.safetensors", models, tmp_path)


def test_two_networks_of_equal_right_are_refused(transformer, tmp_path):
    tensors = {f"{prefix}.{name}": tensor + 1 for prefix in ("one", "two") for name, tensor in transformer.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"ambiguous.*'one\..*'two\."):
        load_transformer(tmp_path / "x.safetensors")


# --- shards, endings, formats ------------------------------------------------------------------------------------


def sharded(folder, transformer, *, index, shard, save):
    folder.mkdir()
    halves = dict(list(transformer.items())[::2]), dict(list(transformer.items())[1::2])
    where = {}
    for number, half in enumerate(halves, start=1):
        file = shard.format(f"{number:05d}-of-00002")
        save(half, folder / file)
        where |= dict.fromkeys(half, file)
    if index is not None:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


STEM = "diffusion_pytorch_model"
SHARDS = {
    "bin": (f"{STEM}.bin.index.json", STEM + "-{}.bin", torch.save),
    "fp16": (f"{STEM}.safetensors.index.fp16.json", STEM + ".fp16-{}.safetensors", save_file),
    "fp16, older": (f"{STEM}.fp16.safetensors.index.json", STEM + "-{}.fp16.safetensors", save_file),
    "another stem": ("model.safetensors.index.json", "model-{}.safetensors", save_file),
    "no index": (None, STEM + "-{}.safetensors", save_file),
    "no index, bin": (None, "pytorch_model-{}.bin", torch.save),
    "no index, fp16": (None, STEM + "-{}.fp16.safetensors", save_file),
}


@pytest.mark.parametrize("form", breadth(SHARDS, test=4))
def test_shards_of_every_form(form, models, transformer, tmp_path):
    index, shard, save = SHARDS[form]
    same(sharded(tmp_path / "in", transformer, index=index, shard=shard, save=save), models, tmp_path)


def test_a_shard_of_a_numbered_set_stands_for_all_and_a_missing_one_is_named(models, transformer, tmp_path):
    folder = sharded(tmp_path / "in", transformer, index=None, shard="x-{}.safetensors", save=save_file)
    same(folder / "x-00002-of-00002.safetensors", models, tmp_path)
    (folder / "x-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"x-00001-of-00002.safetensors is missing"):
        load_transformer(folder)


def test_a_farm_of_links(models, transformer, tmp_path):
    """Every file of the folder, the index and the configuration too, is a link into a store of blobs."""
    folder = sharded(
        tmp_path / "in",
        transformer,
        index=f"{STEM}.safetensors.index.json",
        shard=STEM + "-{}.safetensors",
        save=save_file,
    )
    store, farm = tmp_path / "store" / "a" / "b", tmp_path / "farm"
    store.mkdir(parents=True)
    farm.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, store / f"blob{number}")
        (farm / file.name).symlink_to(store / f"blob{number}")
    same(farm, models, tmp_path)


@pytest.mark.parametrize("ending", breadth(["ckpt", "pth", "pt", "bin"]))
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_torch_files_of_every_ending_and_format(ending, old, models, transformer, tmp_path):
    torch.save({"state_dict": transformer}, tmp_path / f"x.{ending}", _use_new_zipfile_serialization=not old)
    same(tmp_path / f"x.{ending}", models, tmp_path)


@pytest.mark.parametrize("name", breadth(["x.sft", "x.bin", "x.pt", "x.weights", "x"], test=2))
def test_the_format_is_what_the_file_is_not_its_ending(name, models, transformer, tmp_path):
    save_file(transformer, tmp_path / name)
    same(tmp_path / name, models, tmp_path)


def test_tensors_that_lie_otherwise_in_a_torch_file(models, transformer, tmp_path):
    """Transposed, as parts of one storage, and as parameters that require a gradient."""
    tensors = {name: tensor.clone() for name, tensor in transformer.items()}
    key = "blocks.0.ffn.0.weight"
    tensors[key] = tensors[key].T.contiguous().T
    whole = torch.stack([tensors["blocks.0.self_attn.q.bias"], tensors["blocks.0.self_attn.k.bias"]], dim=1)
    tensors["blocks.0.self_attn.q.bias"], tensors["blocks.0.self_attn.k.bias"] = whole[:, 0], whole[:, 1]
    tensors["head.head.weight"] = torch.nn.Parameter(tensors["head.head.weight"])
    torch.save(tensors, tmp_path / "x.pth")
    same(tmp_path / "x.pth", models, tmp_path)


HIDDEN = ["._x.safetensors", "._diffusion_pytorch_model.safetensors", ".x.safetensors", "._x.safetensors.index.json"]


@pytest.mark.parametrize("name", breadth(HIDDEN, test=2))
def test_hidden_files_are_no_weights(name, models, tmp_path):
    models["transformer"].save_pretrained(tmp_path / "in")
    (tmp_path / "in" / name).write_bytes(b"\0\5\26\7" + bytes(100))
    same(tmp_path / "in", models, tmp_path)


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_folder_of_files_that_are_named_as_people_name_them(component, models, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = {
        "transformer": "wan2.1_t2v_1.3B.safetensors",
        "vae": "wan_2.1_vae.safetensors",
        "text_encoder": "umt5_xxl.safetensors",
    }
    for each, file in names.items():
        save_file(original(each, tensors_of(models[each])), folder / file)
    SAVE[component](LOAD[component](folder), tmp_path / "out")
    assert_same_bytes(read_folder(tmp_path / "out"), tensors_of(models[component]))


# --- files that are none -----------------------------------------------------------------------------------------

NO_WEIGHTS = {
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "another web page": (b"<html>404</html>", "web page"),
    "a store's refusal": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "server's message in XML"),
    "a hub's refusal": (b'{"error":"Repository not found"}', "is JSON, not weights"),
    "xz": (b"\xfd7zXZ\0" + bytes(64), "xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(64), "zstd"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "GGUF"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(64), "gzip"),
}


@pytest.mark.parametrize("what", breadth(NO_WEIGHTS, test=2))
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "x.pth", "x.bin"])
def test_what_is_no_weights_at_all_is_named(what, name, tmp_path):
    content, word = NO_WEIGHTS[what]
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        for ask in (load_transformer, load_vae, load_text_encoder, describe):
            with pytest.raises(CheckpointError, match=word) as raised:
                ask(path)
            assert "truncated" not in str(raised.value)


LORA = [
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "transformer.blocks.0.attn1.to_q.lora_B.weight",
    "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "blocks.0.self_attn.q.lora.up.weight",
    "lycoris_blocks_0_self_attn_q.lokr_w1",
    "diffusion_model.blocks.0.self_attn.q.hada_w1_a",
]


@pytest.mark.parametrize("name", LORA)
def test_a_lora_file_is_called_one(name, tmp_path):
    save_file({name: torch.ones(2, 2), "diffusion_model.head.head.diff": torch.ones(2)}, tmp_path / "x.safetensors")
    for ask in (load_transformer, describe):
        with pytest.raises(CheckpointError, match="LoRA"):
            ask(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["generator_lora.blocks.0.self_attn.q.lora_A.weight", "lora.x.lora_down.weight"])
def test_weights_that_want_a_lora_are_not_run_without_it(name, transformer, tmp_path):
    """LongLive's: ``generator`` and ``generator_lora`` in one file."""
    torch.save({"generator": transformer, "more": {name: torch.ones(2, 2)}}, tmp_path / "x.pt")
    for ask in (load_transformer, describe):
        with pytest.raises(CheckpointError, match="LoRA"):
            ask(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["scaled_fp8", "blocks.0.self_attn.q.scale_weight", "blocks.1.ffn.0.weight_scale"])
def test_fp8_with_scales_is_never_read_without_them(name, transformer, tmp_path):
    tensors = {k: v.to(torch.float8_e4m3fn) if k == "blocks.0.ffn.0.weight" else v for k, v in transformer.items()}
    save_file(tensors | {name: torch.ones(1)}, tmp_path / "x.safetensors")
    for ask in (load_transformer, describe):
        with pytest.raises(CheckpointError, match="fp8"):
            ask(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", [torch.int8, torch.float64], ids=str)
def test_a_type_that_is_not_read_is_named_by_load_and_by_info(kind, transformer, tmp_path):
    save_file(
        transformer | {"blocks.0.ffn.0.weight": transformer["blocks.0.ffn.0.weight"].to(kind)}, tmp_path / "x.sft"
    )
    for ask in (load_transformer, describe):
        with pytest.raises(CheckpointError, match=r"'blocks.0.ffn.0.weight' is of type"):
            ask(tmp_path / "x.sft")


def test_two_experts_are_told_apart(models, transformer, tmp_path):
    for folder in ("high_noise_model", "low_noise_model"):
        (tmp_path / folder).mkdir()
        save_file(transformer, tmp_path / folder / f"{STEM}.safetensors")
    vae = original("vae", tensors_of(models["vae"]))
    for beside in ({}, {"Wan2.1_VAE.safetensors": vae}):
        for name, tensors in beside.items():
            save_file(tensors, tmp_path / name)
        names = [part.name for part in describe(tmp_path).components]
        assert names == ["transformer", "transformer_2", *(["vae"] if beside else [])]
        load_transformer(tmp_path)
    load_transformer(tmp_path / "high_noise_model")


def test_a_compressed_archive_and_one_that_was_cut(transformer, tmp_path):
    torch.save(transformer, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as source,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(CheckpointError, match="compressed"):
        load_transformer(tmp_path / "y.pth")


# --- info and load agree -----------------------------------------------------------------------------------------


def test_info_refuses_what_load_refuses(models, tmp_path):
    models["transformer"].save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / f"{STEM}.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}
    wrong = {
        "lacks": {name: tensor for name, tensor in whole.items() if "attn2" not in name},
        "no use": whole | {"blocks.2.attn1.to_q.weight": torch.ones(2, 2)},
        "misshapen": whole | {"proj_out.bias": torch.ones(3)},
        "is of type": whole | {"proj_out.bias": whole["proj_out.bias"].double()},
    }
    for word, tensors in wrong.items():
        save_file(tensors, file)
        for ask in (load_transformer, describe):
            with pytest.raises(CheckpointError, match=word):
                ask(tmp_path / "in")


def test_info_counts_a_networks_own_parameters(models, tmp_path):
    """Not those of the others in the same file."""
    save_file(all_in_one(models), tmp_path / "all.safetensors")
    for part in describe(tmp_path / "all.safetensors").components:
        assert part.parameters == sum(tensor.numel() for tensor in tensors_of(models[part.name]).values())
    folder = write_release(tmp_path / "release", models)
    assert {part.name for part in describe(folder).components} == set(COMPONENTS)


# --- files that change while they are read -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("how", ["cut", "emptied", "replaced", "removed"])
def test_a_file_that_is_cut_while_it_is_read_is_a_sentence(how, name, transformer, tmp_path):
    """By a mapping, this ended the process (SIGBUS)."""
    path = tmp_path / name
    save_file(transformer, path) if name.endswith("safetensors") else torch.save(transformer, path)
    plan = make_plan(path, "transformer")
    size = path.stat().st_size
    if how == "replaced":
        (tmp_path / "other").write_bytes(bytes(size))
        (tmp_path / "other").replace(path)
    elif how == "removed":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(size // 2 if how == "cut" else 0)
    with pytest.raises(CheckpointError, match=r"while it was read|cannot be read"):
        filled(plan, dtype=np.float32)


def test_a_file_that_is_cut_in_the_middle_of_a_tensor(tmp_path):
    save_file({"a": torch.ones(3_000_000)}, tmp_path / "x.safetensors")
    pieces = open_tensors(tmp_path / "x.safetensors").pieces("a")
    assert next(pieces).max() == 1
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(5_000_000)
    with pytest.raises(CheckpointError, match="cut while it was read"):
        list(pieces)


def test_no_map_is_asked_of_the_file_system(models, transformer, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(19, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    save_file(transformer, tmp_path / "x.safetensors")
    save_transformer(load_transformer(tmp_path / "x.safetensors"), tmp_path / "out")
    torch.save(transformer, tmp_path / "x.pth")
    load_transformer(tmp_path / "x.pth")


def test_more_shards_than_a_process_may_open(transformer, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    where = {}
    for number, (name, tensor) in enumerate(transformer.items()):
        save_file({name: tensor}, folder / f"x{number}.safetensors")
        where[name] = f"x{number}.safetensors"
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(len(where) + 20, 64 + 20), hard))
    try:
        load_transformer(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- paths -------------------------------------------------------------------------------------------------------


def test_a_path_may_begin_at_home(transformer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(transformer, tmp_path / "x.safetensors")
    load_transformer("~/x.safetensors")
    describe("~/x.safetensors")
    convert("~/x.safetensors", "~/out")
    load_transformer(tmp_path / "out")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000], ids=["null", "long"])
def test_what_is_no_path_is_a_sentence(path):
    for ask in (load_transformer, load_vae, load_text_encoder, describe):
        with pytest.raises(CheckpointError, match="is no path"):
            ask(path)
