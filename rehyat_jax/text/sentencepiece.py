"""A SentencePiece model (``spiece.model``) as a tokenizer of the ``tokenizers`` library.

Some text encoders' files carry one as bytes (ComfyUI's ``spiece_model``). Its format is the protocol buffer
``sentencepiece_model.proto`` of google/sentencepiece, of which the pieces, the kind of model and the table of
normalisation are needed; the rules around them are those of transformers' ``SpmConverter`` for T5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from rehyat_jax.errors import CheckpointError

_UNIGRAM = 1
#: Types of pieces.
_NORMAL, _CONTROL, _USER = 1, 3, 4


def from_sentencepiece(data: bytes, *, where: str) -> tokenizers.Tokenizer:
    """
    Args:
        where: names the model, for messages.

    Raises:
        CheckpointError: it is damaged, or not of T5's kind (unigrams, ``</s>``).
    """
    pieces: list[tuple[str, float, int]] = []
    unknown, kind, charsmap = 0, _UNIGRAM, b""
    try:
        for field, value in _fields(data):
            match field, value:
                case 1, bytes():
                    pieces.append(_piece(value))
                case 2, bytes():
                    trained = dict(_fields(value))
                    unknown, kind = _number(trained.get(40, 0)), _number(trained.get(3, _UNIGRAM))
                case 3, bytes():
                    charsmap = _bytes(dict(_fields(value)).get(2, b""))
        ids = {piece: number for number, (piece, _, _) in enumerate(pieces)}
        if kind != _UNIGRAM or "</s>" not in ids or not 0 <= unknown < len(pieces):
            raise CheckpointError(f"{where} is not a SentencePiece model of T5's kind (unigrams, with </s>)")
        tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, score) for piece, score, _ in pieces], unknown))
        steps = [normalizers.Precompiled(charsmap)] if charsmap else []
        tokenizer.normalizer = normalizers.Sequence(
            [*steps, normalizers.Strip(left=False, right=True), normalizers.Replace(tokenizers.Regex(" {2,}"), "▁")]
        )
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception of a table that is damaged
        raise CheckpointError(f"{where} is damaged: it cannot be read as a SentencePiece model") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens([piece for piece, _, kind in pieces if kind == _CONTROL])
    tokenizer.add_tokens([piece for piece, _, kind in pieces if kind == _USER])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    return tokenizer


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    return _bytes(fields[1]).decode("utf-8"), score, _number(fields.get(3, _NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol buffer's message, in order.

    Raises:
        ValueError: it is cut, or has a field of an unknown kind.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        match key & 7:
            case 0:
                value, position = _varint(data, position)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, position = _varint(data, position)
            case 5:
                size = 4
            case _:
                raise ValueError("a field of an unknown kind")
        if position + size > len(data):
            raise ValueError("cut")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number without an end")


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TypeError("bytes in the place of a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number in the place of bytes")
    return value
