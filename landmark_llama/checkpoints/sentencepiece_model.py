"""Turns LLaMA's `tokenizer.model` into a fast tokenizer that gives exactly its ids.

SentencePiece's byte-pair model lists pieces with scores. It merges the two neighbours whose joined piece has the
highest score, again and again. The `tokenizers` library wants a list of merges instead. So this file lists, best piece
first, every way to cut a piece into two other pieces. It needs neither sentencepiece nor protobuf. (transformers' own
`LlamaTokenizer` gives other ids for some texts: see `docs/checkpoints.md`.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors

# Field numbers and values of sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MODEL_TYPE, UNIGRAM, BYTE_PAIR = 3, 1, 2
CHARACTER_MAP = 2
SPACE = "▁"


def read_tokenizer_model(path: Path) -> Tokenizer:
    """Reads a `tokenizer.model`. The tokenizer puts BOS in front of a text, as LLaMA's does.

    Raises:
        OSError: the file is truncated or damaged.
        ValueError: it is not of LLaMA's kind: not a byte-pair model, or one that rewrites characters.
    """
    pieces: list[tuple[str, float, int]] = []
    settings = {TRAINER: {}, NORMALIZER: {}}
    try:
        for field, content in _fields(path.read_bytes()):
            if field == PIECES:
                piece = dict(_fields(content))
                score = struct.unpack("<f", piece.get(PIECE_SCORE, bytes(4)))[0]
                pieces.append((piece[PIECE_TEXT].decode(), score, piece.get(PIECE_TYPE, NORMAL)))
            elif field in settings:
                settings[field] = dict(_fields(content))
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise OSError(f"{path}: truncated or damaged; fetch it again") from error
    if settings[TRAINER].get(MODEL_TYPE, UNIGRAM) != BYTE_PAIR or settings[NORMALIZER].get(CHARACTER_MAP):
        raise ValueError(f"{path}: not a byte-pair model as LLaMA's; give a folder with a tokenizer.json")
    return _tokenizer(pieces)


def _tokenizer(pieces: list[tuple[str, float, int]]) -> Tokenizer:
    """Builds the tokenizer from `pieces`: text, score and type of each, in the order of their ids."""
    vocabulary = {text: token_id for token_id, (text, _, _) in enumerate(pieces)}
    unknown = [text for text, _, kind in pieces if kind == UNKNOWN]
    control = [text for text, _, kind in pieces if kind == CONTROL]
    byte_fallback = any(kind == BYTE for _, _, kind in pieces)
    merges = _merges({text: score for text, score, kind in pieces if kind in (NORMAL, USER_DEFINED)}, vocabulary)
    model = models.BPE(vocabulary, merges, unk_token=unknown[0], fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([unknown[0], *control])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    begin = control[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, vocabulary[begin])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every cut of a piece into two pieces, sorted by the score of the whole, then by the ids of the parts."""
    merges = []
    for text in sorted(scores, key=lambda text: (-scores[text], vocabulary[text])):
        cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
        known = [(left, right) for left, right in cuts if left in scores and right in scores]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    return merges


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: (number, integer), or (number, bytes) for every other type."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            content, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}.get(wire_type)
            if size is None:
                size, at = _varint(message, at)
            content, at = message[at : at + size], at + size
            if at > len(message):
                raise IndexError(at)
        yield field, content


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Decodes a varint at `at` (seven bits a byte, lowest first); returns it and the position after it."""
    value, shift = 0, 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
