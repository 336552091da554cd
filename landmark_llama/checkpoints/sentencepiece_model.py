"""Reads LLaMA's `tokenizer.model` and makes the exact fast tokenizer of it, without sentencepiece or protobuf.

A byte-pair model in SentencePiece's format lists pieces with scores, and merges whatever neighbours give the piece of
the highest score. Tokenizers of the `tokenizers` library list the merges instead: every way of cutting a piece into two
others, best piece first. (transformers' `LlamaTokenizer` gives other ids for some texts, `docs/checkpoints.md`.)
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
    """The tokenizer in a `tokenizer.model`, which puts BOS in front of a text as LLaMA's does.

    Raises:
        OSError: the file is truncated or damaged.
        ValueError: it is of a kind that LLaMA's is not: no byte-pair model, or one that rewrites characters.
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
    vocabulary = {text: token for token, (text, _, _) in enumerate(pieces)}
    special = {kind: [text for text, _, its in pieces if its == kind] for kind in (UNKNOWN, CONTROL)}
    scores = {text: score for text, score, kind in pieces if kind in (NORMAL, USER_DEFINED)}
    merges = []
    for text in sorted(scores, key=lambda text: (-scores[text], vocabulary[text])):
        cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
        known = [(left, right) for left, right in cuts if left in scores and right in scores]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    unknown = special[UNKNOWN][0]
    byte_fallback = any(kind == BYTE for _, _, kind in pieces)
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([unknown, *special[CONTROL]])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    begin = special[CONTROL][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, vocabulary[begin])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbered fields of a protobuf message: integers, or the bytes of whatever else."""
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
    """An integer in groups of seven bits, lowest first, and where the next field begins."""
    value, shift = 0, 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
