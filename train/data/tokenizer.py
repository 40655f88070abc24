"""The tokenizer of the sprite world: every word of its captions is one token, and any other text is taken too.

Its pipeline has T5's shape (Unigram pieces behind "▁", ``</s>`` appended, huggingface/transformers
``src/transformers/models/t5/tokenization_t5.py``), so that WanPipeline uses it as it uses UMT5's own.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.files import whole_file
from rehyat_jax.sprites.captions import vocabulary

#: In the order of UMT5's ids: 0, 1, 2.
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}

#: The text encoder's embedding has this many rows at most.
LARGEST_VOCABULARY = 256

#: Log-probabilities. A word costs less than "▁" and its letters do; nothing else depends on the values.
_WORD, _LETTER = -4.0, -8.0

#: No caption has punctuation, so "background." is "background".
_PUNCTUATION = Regex(r"""[.,;:!?"'()\-]""")


def build_sprite_tokenizer(folder: str | os.PathLike[str], names: Sequence[str]) -> Path:
    """Write ``tokenizer.json`` and the two small files that transformers wants beside it.

    Pieces are ``<pad>``, ``</s>``, ``<unk>``, the words of the captions and of ``names``, and "▁" with letters and
    digits for all other words; characters beyond those become ``<unk>``. Text is put in lower case and punctuation
    becomes a space. The files depend on ``names`` alone, byte for byte, and not on their order.

    The class named is ``PreTrainedTokenizerFast`` and not T5's own, because transformers 5 makes ``T5TokenizerFast``
    again from the pieces, losing whatever else ``tokenizer.json`` says; early versions of 5 lose the lower case.

    Args:
        folder: where to write; made if missing.
        names: of the sprites, of one or more words.

    Returns:
        The folder.

    Raises:
        ConfigError: more words than the vocabulary has room for.
        RehyatError: a file cannot be written.
    """
    words = sorted({word for text in (*vocabulary(), *names) for word in text.lower().split()})
    pieces = [(token, 0.0) for token in SPECIAL_TOKENS.values()]
    pieces += [("▁", _LETTER), *((f"▁{word}", _WORD) for word in words)]
    pieces += [(letter, _LETTER) for letter in string.ascii_lowercase + string.digits]
    if len(pieces) > LARGEST_VOCABULARY:
        raise ConfigError(f"{len(words)} caption words make {len(pieces)} tokens, more than {LARGEST_VOCABULARY}")

    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(_PUNCTUATION, " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL_TOKENS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        # For readers that insist on T5's class: no tokens beyond those of tokenizer.json.
        "extra_ids": 0,
    }
    contents = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(SPECIAL_TOKENS, indent=2),
    }
    folder = Path(folder)
    for name, text in contents.items():
        with whole_file(folder / name) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return folder
