"""Cleaning, tokens and embeddings against transformers and diffusers' ``WanPipeline``; then the cache, also damaged."""

import itertools
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan import pipeline_wan
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared.umt5 import ported
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5TokenizerFast, UMT5Config, UMT5EncoderModel

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.encoder import UMT5Encoder
from rehyat_jax.sprites.captions import Description, Movement, caption
from rehyat_jax.sprites.world import DIRECTIONS, GROUNDS, NAMES, SPEEDS
from rehyat_jax.text.files import numbered_lines, read_text
from rehyat_jax.text.tokenizer import PromptCache, Tokenizer, clean_prompt, embed_prompts, embed_tokens
from train.data.tokenizer import LARGEST_VOCABULARY, build_sprite_tokenizer

CAPTIONS = [
    "a lemon moving down slowly and a mushroom moving up and left quickly on a blue background",
    "an object passes behind a pillar on a red background",
    "some grapes moving right slowly on a white background",
]
ODD = [
    "",
    " ",
    "\n\t",
    "A Zebra, walking!",
    "x</s>y <pad> <unk> <extra_id_3>",
    "ünïcödé 日本語 🍋",
    "\x00\x01\x1b[0m\u200b\ufeff",
    "a" * 5000,
    "word " * 3000,
    "▁▁lemon▁",
    "e\u0301 \ufb01 ＡＢ",
    "don't (stop) half-way: 50%",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_sprite_tokenizer(tmp_path_factory.mktemp("tokenizer"), list(NAMES))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


# Cleaning


@pytest.mark.parametrize(
    "text",
    [*CAPTIONS, *ODD, "a &amp;amp; b &lt;i&gt;", "&amp;lt;", "  a \u00a0 b\u3000c\r\nd ", "&#55296; &#0; &nbsp;x"],
)
@pytest.mark.parametrize("repair", [True, False])
def test_cleaning_is_that_of_wan_pipeline(text, repair, monkeypatch):
    monkeypatch.setattr(pipeline_wan, "is_ftfy_available", lambda: repair)
    assert clean_prompt(text, repair=repair) == pipeline_wan.prompt_clean(text)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a \u201ccat\u201d, it\u2019s \u2018red\u2019", "a \"cat\", it's 'red'"),
        ("ＡＢＣ １２３ ｶﾀｶﾅ", "ABC 123 カタカナ"),
        ("\ufb01re and \ufb02ight", "fire and flight"),
        ("schÃ¶n", "schön"),
        ("\ufeffa cat", "a cat"),
        ("a\u2028cat", "a cat"),
        ("a \x1b[31mred\x1b[0m cat", "a red cat"),
    ],
)
def test_prompts_are_repaired_as_the_official_code_does(text, clean, tokenizer, folder):
    """What ftfy makes of them, by hand; and the tokens are those of the plain spelling."""
    assert clean_prompt(text) == clean == pipeline_wan.prompt_clean(text)
    np.testing.assert_array_equal(tokenizer.encode(text).ids, tokenizer.encode(clean).ids)
    as_it_is = Tokenizer.from_folder(folder, repair=False)
    assert clean_prompt(text, repair=False) == clean_prompt(clean_prompt(text, repair=False), repair=False)
    if "\u201c" in text:
        assert (as_it_is.encode(text).ids != as_it_is.encode(clean).ids).any()


def test_prompts_lose_a_byte_order_mark_without_repair_too():
    assert clean_prompt("\ufeffa cat", repair=False) == "a cat"


@pytest.mark.parametrize("text", [*CAPTIONS, "Fish &amp; chips,  50% off! (twice)", "日本語 und Übermut"])
def test_ftfy_changes_nothing_in_ordinary_text(text):
    assert clean_prompt(text) == clean_prompt(text, repair=False)


@given(st.text(st.characters(exclude_categories=[])))
def test_cleaning_takes_any_text(text):
    clean = clean_prompt(text)
    clean.encode()
    assert "  " not in clean
    assert clean == clean.strip()


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b", "&#" + "9" * 50_000 + ";"])
def test_what_crashes_elsewhere_does_not_here(text, tokenizer):
    assert tokenizer.encode([text]).mask.sum() >= 2


def test_paired_surrogates_are_one_character():
    assert clean_prompt("\ud83c\udf4b") == "🍋"


# Tokens


def theirs(reference, texts, max_length):
    """As ``_get_t5_prompt_embeds`` calls it."""
    out = reference(
        texts,
        padding="max_length",
        max_length=max_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="np",
    )
    return out.input_ids, out.attention_mask


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
@pytest.mark.parametrize("max_length", [512, 16, 2, 1])
def test_tokens_are_those_of_transformers(loader, max_length, folder, tokenizer):
    texts = [clean_prompt(text) for text in CAPTIONS + ODD]
    ids, mask = theirs(loader.from_pretrained(folder), texts, max_length)
    ours = tokenizer.encode(texts, max_length)
    np.testing.assert_array_equal(ours.ids, ids)
    np.testing.assert_array_equal(ours.mask, mask)


def test_a_reader_that_insists_on_t5s_class_agrees_on_captions(folder, tokenizer):
    reference = T5TokenizerFast.from_pretrained(folder)
    ids, mask = theirs(reference, CAPTIONS + ["", "a zebra 7"], 512)
    ours = tokenizer.encode([*CAPTIONS, "", "a zebra 7"])
    np.testing.assert_array_equal(ours.ids, ids)
    np.testing.assert_array_equal(ours.mask, mask)
    assert len(reference) == tokenizer.vocab_size


@pytest.mark.parametrize("special", ["pad_token_id", "eos_token_id", "unk_token_id"])
def test_special_ids_are_those_of_umt5(special, folder):
    assert getattr(AutoTokenizer.from_pretrained(folder), special) == {"p": 0, "e": 1, "u": 2}[special[0]]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=[]), max_size=40))
def test_any_text_becomes_tokens(tokenizer, text):
    ids, mask = tokenizer.encode(text, 32)
    assert ids.shape == mask.shape == (1, 32)
    count = mask.sum()
    assert count >= 1
    assert mask[0, :count].all()
    assert ids[0, count - 1] == 1
    assert (ids[0, count:] == 0).all()
    assert ids.max() < tokenizer.vocab_size


def test_prompts_of_no_and_of_a_hundred_thousand_characters(tokenizer):
    ids, mask = tokenizer.encode(["", "lemon " * 16_667, "x" * 100_000])
    assert mask.sum(1).tolist() == [1, 512, 512]
    assert ids[:, -1].tolist() == [0, 1, 1]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_prompts_in_a_file_end_where_an_editor_ends_a_line(tmp_path, end):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"\ufeffa cat{end}on a mat\r\n\r\n   \n a dog \r\n".encode())
    assert list(numbered_lines(read_text(path))) == [(1, f"a cat{end}on a mat"), (4, "a dog")]


def test_prompts_in_a_file_that_is_no_text_are_a_sentence(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(ConfigError, match=r"a\.txt is not a text file"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match=r"cannot read the list: it does not exist"):
        read_text(tmp_path / "none.txt", what="the list")


def test_length_must_leave_room_for_the_end(tokenizer):
    with pytest.raises(ConfigError, match="max_length"):
        tokenizer.encode(["a"], 0)


def test_truncation_of_one_call_does_not_stay(tokenizer):
    short = tokenizer.encode(CAPTIONS, 4)
    assert short.mask.sum(1).tolist() == [4, 4, 4]
    assert tokenizer.encode(CAPTIONS).mask.sum(1).tolist() == [len(text.split()) + 1 for text in CAPTIONS]


@pytest.mark.parametrize("home", [".", "tokenizer", "google/umt5-xxl"])
def test_found_in_every_layout(home, folder, tmp_path):
    shutil.copytree(folder, tmp_path / home, dirs_exist_ok=True)
    assert Tokenizer.from_folder(tmp_path).vocab_size == 130


def test_missing_damaged_and_foreign_tokenizers(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = (folder / "tokenizer.json").read_bytes()
    for content in (b"", b"{}", b"\xff\xfe", whole[: len(whole) // 2], b'{"model": {"type": "Unigram", "vocab": []}}'):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            Tokenizer.from_folder(tmp_path)
    file.write_text(json.dumps(json.loads(whole) | {"post_processor": None}))
    with pytest.raises(CheckpointError, match="must have <pad>"):
        Tokenizer.from_folder(tmp_path)


# The sprites' vocabulary


def test_every_word_of_every_caption_is_one_token(tokenizer):
    things = itertools.product(NAMES, DIRECTIONS, SPEEDS)
    texts = [
        caption(Description((Movement(name, direction, speed), Movement(NAMES[0], direction, speed)), ground))
        for (name, direction, speed), ground in zip(things, itertools.cycle(GROUNDS))
    ]
    texts += [caption(Description((), ground)) for ground in GROUNDS]
    tokens = tokenizer.encode(texts, 64)
    np.testing.assert_array_equal(tokens.mask.sum(1), [len(text.split()) + 1 for text in texts])
    assert 2 not in tokens.ids
    assert tokens.mask.sum(1).max() < 40
    assert len(np.unique(tokens.ids, axis=0)) == len(texts)


def test_case_and_punctuation_do_not_matter(tokenizer):
    plain, typed = tokenizer.encode([CAPTIONS[1], "An object passes  behind a pillar, on a RED background."]).ids
    np.testing.assert_array_equal(plain, typed)


def test_files_depend_on_the_names_alone(folder, tmp_path):
    again = build_sprite_tokenizer(tmp_path / "new" / "folder", list(reversed(NAMES)))
    names = sorted(os.listdir(folder))
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert [(again / name).read_bytes() for name in names] == [(folder / name).read_bytes() for name in names]


def test_too_many_names_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"more than {LARGEST_VOCABULARY}"):
        build_sprite_tokenizer(tmp_path, [f"name{i}" for i in range(200)])


# Embeddings

CONFIG = TextEncoderConfig(vocab_size=140, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    reference = UMT5EncoderModel(UMT5Config(**CONFIG.to_dict())).eval()
    return reference, ported(reference, CONFIG)


def test_embeddings_are_those_of_wan_pipeline(models, folder, tokenizer):
    """1e-4 on order-one hidden states; zeros exactly where they have zeros."""
    reference, encoder = models
    prompts = [*CAPTIONS, "", "zebra " * 40, "y" * 100_000]
    wan = WanPipeline(tokenizer=AutoTokenizer.from_pretrained(folder), text_encoder=reference, vae=None, scheduler=None)
    with torch.no_grad():
        expected = wan._get_t5_prompt_embeds(prompts, max_sequence_length=512).numpy()
    ours = np.asarray(embed_prompts(encoder, tokenizer, prompts))
    assert ours.shape == (6, 512, 24)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours == 0, expected == 0)


@pytest.mark.parametrize(("prompts", "bucket"), [(CAPTIONS, 64), (["z" * 80], 128), (["z" * 600], 512)])
def test_little_padding_is_as_good_as_much(models, tokenizer, prompts, bucket):
    """The encoder is run on fewer tokens than 512, and the result is that of all 512, to 1e-5 (order of summation)."""
    _, encoder = models
    ids, mask = tokenizer.encode(prompts)
    assert -(-mask.sum(1).max() // 64) * 64 == bucket
    full = np.asarray(encoder(ids, mask)) * mask[..., None]
    np.testing.assert_allclose(embed_prompts(encoder, tokenizer, prompts), full, atol=1e-5, rtol=0)


def test_odd_lengths_and_no_prompts(models, tokenizer):
    _, encoder = models
    assert embed_prompts(encoder, tokenizer, "a lemon", max_length=77).shape == (1, 77, 24)
    assert embed_prompts(encoder, tokenizer, CAPTIONS, max_length=5).shape == (3, 5, 24)
    assert embed_prompts(encoder, tokenizer, []).shape == (0, 512, 24)


def test_prompts_of_like_length_share_a_program(models, tokenizer, monkeypatch):
    _, encoder = models
    embed_prompts(encoder, tokenizer, "a lemon")
    traces = []
    monkeypatch.setattr(UMT5Encoder, "__call__", lambda *_: traces.append(1))
    embed_prompts(encoder, tokenizer, "a mushroom moving up and left")
    assert not traces


def test_embeddings_have_the_computations_dtype(tokenizer):
    encoder = UMT5Encoder(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert embed_prompts(encoder, tokenizer, "a lemon").dtype == jnp.bfloat16


def test_a_tokenizer_of_another_model_is_noticed(tokenizer):
    small = TextEncoderConfig(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="only 20"):
        embed_tokens(UMT5Encoder(small, rngs=nnx.Rngs(0)), tokenizer.encode(["zebra"]))


# The cache


@pytest.fixture
def rows():
    rows = np.random.default_rng(0).normal(size=(1, 512, 8)).astype(np.float32)
    rows[:, 19:] = 0
    return rows


def test_what_is_put_is_got_bit_for_bit(tmp_path, rows):
    cache = PromptCache(tmp_path / "made" / "here")
    assert cache.get("key") is None
    cache.put("key", rows)
    np.testing.assert_array_equal(cache.get("key", shape=(1, 512, 8)), rows)
    assert cache.get("another key") is None
    assert cache.get("key", shape=(1, 512, 4)) is None
    (file,) = cache.folder.iterdir()
    assert file.stat().st_size < 19 * 8 * 4 + 500  # Padding is not stored.


@pytest.mark.parametrize("shape", [(1, 512, 8), (2, 1, 3), (1, 7, 1)])
def test_all_zero_and_unpadded_entries_come_back(tmp_path, shape):
    cache = PromptCache(tmp_path)
    for value in (0, 1):
        cache.put("key", np.full(shape, value, np.float32))
        np.testing.assert_array_equal(cache.get("key"), np.full(shape, value, np.float32))


def test_a_key_is_never_a_path(tmp_path, rows):
    cache = PromptCache(tmp_path / "cache")
    cache.put("../../outside/" + "long" * 100, rows)
    assert [path.parent for path in tmp_path.rglob("*.safetensors")] == [cache.folder]


def test_no_damage_goes_unnoticed(tmp_path, rows):
    """A flipped bit anywhere in the numbers or the checksum, a cut at any place, another file: missing, all of them."""
    cache = PromptCache(tmp_path)
    cache.put("key", rows)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for place in [*range(0, 8 + header, 7), *range(8 + header, len(whole), 41)]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        got = cache.get("key")
        # In the header a bit may be of no consequence (white space): then the entry is the same.
        assert got is None or (place < 8 + header and np.array_equal(got, rows))
        file.write_bytes(whole[:place])
        assert cache.get("key") is None
    file.write_bytes((2**60).to_bytes(8, "little") + whole[8:])
    assert cache.get("key") is None
    for tensors in ({}, {"embedding": rows}, {"embedding": rows.astype(np.float16)}, {"other": rows}):
        file.write_bytes(safetensors.numpy.save(tensors))
        assert cache.get("key") is None
    cache.put("key", rows)
    np.testing.assert_array_equal(cache.get("key"), rows)


def test_an_entry_under_anothers_name_is_not_believed(tmp_path, rows):
    cache = PromptCache(tmp_path)
    cache.put("a lemon", rows)
    (lemon,) = tmp_path.iterdir()
    cache.put("a dog", rows + 1)
    (dog,) = set(tmp_path.iterdir()) - {lemon}
    os.replace(lemon, dog)
    assert cache.get("a dog") is None


def test_entries_that_are_not_finite_are_not_believed(tmp_path, rows):
    rows[0, 3, 3] = np.nan
    cache = PromptCache(tmp_path)
    cache.put("key", rows)
    assert cache.get("key") is None


def test_a_folder_that_cannot_be_written_means_no_cache(tmp_path, rows):
    """A file where the folder should be: even root cannot write there."""
    (tmp_path / "file").write_text("")
    cache = PromptCache(tmp_path / "file")
    cache.put("key", rows)
    assert cache.get("key") is None
    assert os.listdir(tmp_path) == ["file"]


def test_no_partial_file_is_left(tmp_path, rows):
    cache = PromptCache(tmp_path)
    for _ in range(3):
        cache.put("key", rows)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
