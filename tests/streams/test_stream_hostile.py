"""Stream files of others: every header, array and byte ends in a stream or in one sentence."""

import json
import pickle
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shared.streams import FILE
from shared.tiers import examples

from rehyat_jax.errors import CheckpointError
from rehyat_jax.streams.state import MOST_FRAMES


def rewritten(source: Path, target: Path, *, header=None, arrays=None, key: str = "rehyat_stream") -> None:
    """A copy with another header or other arrays; None removes one."""
    with safe_open(source / FILE, framework="numpy") as file:
        content = json.loads(file.metadata()[key])
    tensors = {name: x for name, x in (load_file(source / FILE) | (arrays or {})).items() if x is not None}
    text = header if isinstance(header, str) else json.dumps(merged(content, header or {}))
    save_file(tensors, target / FILE, metadata={key: text})


def merged(content: dict, changes: dict) -> dict:
    """Changes within changes; None removes a name."""
    out = content | changes
    for name, value in changes.items():
        if isinstance(value, dict):
            out[name] = merged(content[name], value)
    return {name: value for name, value in out.items() if value is not None}


HUGE = 10**400


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"version": 1}',
        "9" * 5000,
        {"version": 2},
        {"version": None},
        {"model": "0" * 64},
        {"model": None},
        {"prompt": 3},
        {"prompt": None},
        {"prompt": []},
        {"prompt": [3]},
        {"prompt": ["a cat", "a dog"]},
        {"prompt": ["x"] * 70_000},
        {"negative_prompt": []},
        {"settings": None},
        {"settings": []},
        {"settings": {"more": 1}},
        {"settings": {"height": None}},
        {"settings": {"height": 33}},
        {"settings": {"height": 16}},
        {"settings": {"height": HUGE}},
        {"settings": {"height": "32"}},
        {"settings": {"height": True}},
        {"settings": {"width": -48}},
        {"settings": {"num_frames": HUGE}},
        {"settings": {"num_frames": 0}},
        {"settings": {"num_inference_steps": 4}},
        {"settings": {"num_inference_steps": 0}},
        {"settings": {"num_inference_steps": HUGE}},
        {"settings": {"guidance_scale": HUGE}},
        {"settings": {"guidance_scale": float("nan")}},
        {"settings": {"guidance_scale": 1.0}},
        {"settings": {"schedule": 1}},
        {"settings": {"schedule": {"grid": "mine"}}},
        {"settings": {"schedule": {"shift": 0}}},
        {"settings": {"schedule": {"shift": HUGE}}},
        {"settings": {"schedule": {"shift": float("inf")}}},
        {"settings": {"schedule": {"num_train_timesteps": HUGE}}},
        {"settings": {"schedule": {"num_train_timesteps": 0}}},
        {"settings": {"remember": 0.5}},
        {"settings": {"remember": "all"}},
        {"settings": {"remember": 1}},
        {"settings": {"remember": float("nan")}},
        {"settings": {"solver": {"name": "os.system"}}},
        {"settings": {"solver": {"name": 3}}},
        {"settings": {"solver": {"order": 7}}},
        {"settings": {"solver": {"order": None}}},
        {"settings": {"solver": {"more": 1}}},
        {"settings": {"solver": {"name": "Euler"}}},
    ],
)
def test_hostile_headers_are_sentences(pipe, saved, tmp_path, header):
    rewritten(saved[0], tmp_path, header=header)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        pipe.resume_stream(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("text", lambda x: None, "lacks 'text'"),
        ("text", lambda x: x[:1], "is F32"),
        ("text", lambda x: x.astype(np.float16), "is F16"),
        ("text", lambda x: np.where(x == x.max(), np.nan, x), "NaN or infinity"),
        ("states.s", lambda x: np.full_like(x, np.inf), "NaN or infinity"),
        ("states.seen", lambda x: x - 1000, "negative"),
        ("keys", lambda x: x.astype(np.int32), "is I32"),
        ("first_frame", lambda x: np.full_like(x, -2), "negative"),
        ("first_frame", lambda x: np.full_like(x, 3), "middle of a chunk"),
        ("first_frame", lambda x: np.full_like(x, MOST_FRAMES + 2), "came before"),
        ("first_frame", lambda x: x.astype(np.int64), "is I64"),
        ("more", lambda x: np.zeros(3, np.float32), "no use for 'more'"),
    ],
)
def test_hostile_arrays_are_sentences(pipe, saved, tmp_path, name, change, match):
    rewritten(saved[0], tmp_path, arrays={name: change(load_file(saved[0] / FILE).get(name))})
    with pytest.raises(CheckpointError, match=match):
        pipe.resume_stream(tmp_path)


def test_a_stream_saved_before_remember_was_a_setting(pipe, saved, tmp_path):
    rewritten(saved[0], tmp_path, header={"settings": {"remember": None}})
    assert pipe.resume_stream(tmp_path).settings.remember == "steps"


def test_what_is_no_stream_is_a_sentence(pipe, saved, tmp_path):
    whole = (saved[0] / FILE).read_bytes()
    for content in [
        b"",
        b"{}",
        whole[:7],
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"\0",
        b"\xff" * 8 + whole[8:],
        pickle.dumps({"a": 1}),
        bytes(4096),
    ]:
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(CheckpointError, match=FILE):
            pipe.resume_stream(tmp_path)
    (tmp_path / FILE).unlink()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no saved stream"):
            pipe.resume_stream(folder)
    (tmp_path / FILE).mkdir()
    with pytest.raises(CheckpointError, match="no saved stream"):
        pipe.resume_stream(tmp_path)


@hypothesis.settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_bytes_are_known_or_harmless(pipe, saved, tmp_path, data):
    content = bytearray((saved[0] / FILE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / FILE).write_bytes(content)
    try:
        stream = pipe.resume_stream(tmp_path)
    except CheckpointError:
        return
    assert {leaf.shape for leaf in jax.tree.leaves(stream.state.states)}
