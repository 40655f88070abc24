"""Every file of a whole checkpoint, changed in every way that a disk, a download or a hand changes files: what comes
out is a model or one sentence. The seeds are the test's; of 300 `make test` runs a few."""

import json
import random
import shutil
import warnings
from pathlib import Path

import jaxtyping
import pytest
import torch
from shared.checkpoint import save_tiny_checkpoint
from shared.tiers import breadth

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.checkpoints import convert, describe, load_text_encoder, load_transformer, load_vae
from rehyat_jax.models.folder import read_defaults, read_scheduler
from rehyat_jax.text.prompt_encoder import PromptEncoder

ODD = [None, True, False, -1, 0, 1, 1 << 24, 10**30, 0.5, float("nan"), "", "2", "é\0", [], [1], [[]], {}, {"a": 1}]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same model in the diffusers layout, and with its parts as torch files; a rehyat_defaults.json in both."""
    root = tmp_path_factory.mktemp("whole")
    pipeline = save_tiny_checkpoint(root / "safetensors")
    (root / "safetensors" / "rehyat_defaults.json").write_text(json.dumps({"height": 32, "width": 32, "remember": 0.5}))
    shutil.copytree(root / "safetensors", root / "torch")
    for name in ("transformer", "vae", "text_encoder"):
        (file,) = (root / "torch" / name).glob("*.safetensors")
        file.unlink()
        torch.save({"state_dict": getattr(pipeline, name).state_dict(), "step": 3}, file.with_suffix(".pth"))
    return root


@pytest.fixture
def as_in_production():
    """Without the tests' checks of types, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes as a disk or a download leaves them."""
    if not data:
        return b"\0"
    altered, place = bytearray(data), rng.randrange(min(len(data), rng.choice([64, 4096, len(data)])))
    match rng.randrange(8):
        case 0:
            return bytes(altered[:place])
        case 1:
            for _ in range(rng.randrange(1, 9)):
                altered[rng.randrange(min(len(data), 8192))] = rng.randrange(256)
        case 2:
            altered[place : place + 512] = bytes(len(altered[place : place + 512]))
        case 3:
            return bytes(altered) + rng.randbytes(rng.randrange(1, 64))
        case 4:
            return b""
        case 5:
            return rng.choice([b"version https://git-lfs.github.com/spec/v1\nsize 3\n", b"<!DOCTYPE html>", b"GGUF\3"])
        case 6:
            del altered[place : place + rng.randrange(1, 64)]
        case _:
            altered[place:place] = rng.randbytes(rng.randrange(1, 64))
    return bytes(altered)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """A value of a file replaced, removed, named twice or moved, as a hand leaves them."""
    content = json.loads(data)
    if not isinstance(content, dict) or not content:
        return data
    inner = content
    while rng.random() < 0.5 and (deeper := [value for value in inner.values() if isinstance(value, dict) and value]):
        inner = rng.choice(deeper)
    name = rng.choice(sorted(inner))
    match rng.randrange(4):
        case 0:
            del inner[name]
        case 1:
            inner[rng.choice(["surprise", name.upper(), f"{name}_"])] = rng.choice(ODD)
        case 2:
            return json.dumps(content).encode().replace(b"{", b'{"%s": 1, "%s": 2, ' % ((name.encode(),) * 2), 1)
        case _:
            inner[name] = rng.choice(ODD)
    return json.dumps(content).encode()


def mutate(rng: random.Random, folder: Path) -> str:
    """One change to one file; says which."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = rng.choice(files)
    data = file.read_bytes()
    kind = rng.choice(["bytes", "bytes", "json", "json", "gone", "swapped", "folder", "hidden", "twice", "moved"])
    match kind:
        case "json" if file.suffix == ".json":
            file.write_bytes(change_json(rng, data))
        case "gone":
            file.unlink()
        case "swapped":
            file.write_bytes(rng.choice(files).read_bytes())
        case "folder":
            file.unlink()
            file.mkdir()
        case "hidden":
            (file.parent / f"._{file.name}").write_bytes(change_bytes(rng, data))
        case "twice":
            (file.parent / f"other{file.suffix}").write_bytes(data)
        case "moved":
            file.rename(file.with_suffix(rng.choice([".txt", ".bin", ".safetensors", ".json", ".index.json"])))
        case _:
            file.write_bytes(change_bytes(rng, data))
    return f"{file.relative_to(folder)}: {kind}"


@pytest.mark.usefixtures("as_in_production")
@pytest.mark.parametrize("seed", breadth(range(300), test=6))
def test_a_changed_checkpoint_is_a_model_or_a_sentence(seed, checkpoints, tmp_path):
    rng = random.Random(seed)
    folder = tmp_path / "changed"
    shutil.copytree(checkpoints / rng.choice(["safetensors", "torch"]), folder)
    changes = [mutate(rng, folder) for _ in range(rng.choice([1, 1, 1, 2]))]
    asks = {
        "describe": describe,
        "transformer": load_transformer,
        "vae": load_vae,
        "text encoder": load_text_encoder,
        "prompts": lambda path: PromptEncoder(path).tokenizer.encode("a cat"),
        "defaults": read_defaults,
        "scheduler": read_scheduler,
    }
    if seed % 4 == 0:  # which reads the same plans, and takes the longest
        asks["convert"] = lambda path: convert(path, tmp_path / "out")
    said = {}
    with warnings.catch_warnings(action="ignore"):
        for name, ask in asks.items():
            try:
                ask(folder)
            except RehyatError as error:
                said[name] = str(error)
            except Exception as error:
                raise AssertionError(f"seed {seed}, {changes}: {name} escaped as {error!r}") from error
    for sentence in said.values():
        assert sentence
        assert "\n" not in sentence, (changes, sentence)
        assert len(sentence) < 2000, (changes, sentence)
    # What is described would be loaded, but for what the numbers alone tell.
    loads = [said[name] for name in ("transformer", "vae", "text encoder") if name in said]
    if "describe" not in said:
        assert all("NaN" in each or "zeros" in each or "differ" in each or "while it was" in each for each in loads), (
            changes,
            loads,
        )
