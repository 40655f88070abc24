"""SentencePiece models, as text encoders' files carry them, against the sentencepiece library."""

import contextlib
import io
import random

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from shared.checkpoint import save_tiny_checkpoint

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models.checkpoints import convert, load_text_encoder
from rehyat_jax.text.prompt_encoder import PromptEncoder
from rehyat_jax.text.sentencepiece import from_sentencepiece
from rehyat_jax.text.tokenizer import Tokenizer

WORDS = ["a", "lemon", "moving", "down", "slowly", "and", "mushroom", "up", "left", "on", "blue", "red", "cat"]
WORDS += ["猫", "在", "雨", "中", "naïve", "café", "１２３"]


def trained(**options) -> bytes:
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=8)) for _ in range(300)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        vocab_size=60,
        hard_vocab_limit=False,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2} | options,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained(user_defined_symbols=["<extra_id_0>"])


@pytest.mark.parametrize(
    "text",
    [
        "a lemon",
        "",
        "a",
        "Hello, World!",
        "ﬁne １２３ café",
        "a <extra_id_0> b",
        "unknown ☃ z",
        "猫 在 雨",
        "two  spaces",
    ],
)
def test_tokens_are_those_of_the_library(text, model):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert from_sentencepiece(model, where="x").encode(text).ids == [*theirs.encode(text), theirs.eos_id()]


@pytest.mark.parametrize("options", [{"model_type": "bpe"}, {"eos_id": -1}], ids=["bpe", "no </s>"])
def test_other_kinds_are_refused(options):
    with pytest.raises(CheckpointError, match="of T5's kind"):
        from_sentencepiece(trained(**options), where="the model")


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cut=st.integers(0, 10**9), flips=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), max_size=4))
def test_damaged_models_are_tokenizers_or_a_sentence(cut, flips, model):
    altered = bytearray(model[: cut % len(model)] if cut % 3 == 0 else model)
    for place, value in flips:
        if altered:
            altered[place % min(len(altered), 4000)] = value
    with contextlib.suppress(CheckpointError):
        from_sentencepiece(bytes(altered), where="x").encode("a lemon")


def test_a_text_encoders_file_carries_its_tokenizer(model, tmp_path):
    """Comfy-Org's umt5 files: ``spiece_model``, bytes among the weights, and no tokenizer beside them."""
    pipeline = save_tiny_checkpoint(tmp_path / "in")
    tensors = {name: tensor.clone() for name, tensor in pipeline.text_encoder.state_dict().items()}
    carried = {"spiece_model": torch.frombuffer(bytearray(model), dtype=torch.uint8)}
    file = tmp_path / "in" / "text_encoder" / "model.safetensors"
    save_file(tensors | carried, file, {"format": "pt"})
    own = PromptEncoder(tmp_path / "in")
    assert own.tokenizer.vocab_size == pipeline.tokenizer.vocab_size  # a tokenizer that is there comes first
    (tmp_path / "in" / "tokenizer").rename(tmp_path / "away")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    expected = [*theirs.encode("a lemon"), 1]
    assert PromptEncoder(tmp_path / "in").tokenizer.encode("a lemon").ids[0, : len(expected)].tolist() == expected
    load_text_encoder(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer" / "spiece.model").read_bytes() == model
    assert Tokenizer.from_folder(tmp_path / "out").encode("a lemon").ids[0, : len(expected)].tolist() == expected
