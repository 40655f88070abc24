"""What people meet in Python: names that `help` resolves, one-line reprs, a model that is saved, and pushed."""

import inspect
import typing

import jax
import numpy as np
import pytest
from flax import nnx
from shared.checkpoint import save_tiny_checkpoint

import rehyat_jax as rj
from rehyat_jax.errors import CheckpointError

HYBRID = rj.HybridConfig(chunk_frames=2, overlap_frames=1)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> rj.TextToVideo:
    folder = tmp_path_factory.mktemp("people") / "tiny"
    save_tiny_checkpoint(folder)
    return rj.TextToVideo.from_pretrained(folder, hybrid=HYBRID, cache_dir=tmp_path_factory.mktemp("cache"))


def functions_of(name: str) -> list:
    thing = getattr(rj, name)
    if not inspect.isclass(thing):
        return [thing] if callable(thing) else []
    public = (value for key, value in vars(thing).items() if not key.startswith("_") or key in ("__init__", "__call__"))
    return [thing, *(getattr(value, "__func__", value) for value in public if callable(value))]


@pytest.mark.parametrize("name", rj.__all__)
def test_annotations_resolve(name):
    for function in functions_of(name):
        typing.get_type_hints(function)


def test_a_stream_completes_its_arguments():
    """`pipe.stream(` in an editor or a notebook."""
    names = inspect.signature(rj.TextToVideo.stream).parameters
    assert {"prompt", "seed", "beginning", "image", "num_inference_steps"} <= names.keys()


def test_reprs_are_one_line(pipe):
    stream = pipe.open_stream("a <cat>", height=16, width=16, num_inference_steps=1)
    assert repr(pipe).startswith("TextToVideo('tiny': WanTransformer(a student of 2 blocks of 24, float32, 0.0 M param")
    assert repr(stream) == "Stream('a <cat>', 0 frames of 16x16 so far)"
    for thing in (pipe, stream, pipe.vae, rj.load_text_encoder(pipe.text.folder)):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 200
    assert stream._repr_html_() == "Stream(&#x27;a &lt;cat&gt;&#x27;, 0 frames of 16x16 so far)"


def test_what_is_saved_is_the_model_as_it_is(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = rj.TextToVideo.from_pretrained(tmp_path / "saved", cache_dir=tmp_path)
    same = jax.tree.map(np.array_equal, *(nnx.state(each.transformer) for each in (pipe, again)))
    assert all(jax.tree.leaves(same))
    assert again.transformer.hybrid == pipe.transformer.hybrid
    np.testing.assert_array_equal(again.text("a cat"), pipe.text("a cat"))
    with pytest.raises(CheckpointError, match="not empty"):
        pipe.save_pretrained(tmp_path / "saved")


def test_what_is_pushed_is_what_is_saved(pipe, monkeypatch):
    import huggingface_hub

    pushed = {}

    class Hub:
        def create_repo(self, repository, *, private, exist_ok):
            pushed["made"] = repository, private, exist_ok

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            pushed["files"] = {file.relative_to(folder_path).as_posix() for file in folder_path.rglob("*")}
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/1"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert pipe.push_to_hub("me/tiny", private=True) == "https://hub/me/tiny/1"
    assert pushed["made"] == ("me/tiny", True, True)
    assert {"model_index.json", "transformer/rehyat/config.json", "vae/config.json"} <= pushed["files"]

    class Refusing(Hub):
        def create_repo(self, *_, **__):
            raise OSError("401: you are not logged in\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    with pytest.raises(
        CheckpointError, match=r"cannot push to me/tiny on the Hugging Face hub: 401: you are not logged in$"
    ):
        pipe.push_to_hub("me/tiny")
