"""Reads texts into the memory of a folder, call by call; goes on where a killed reader, or the last one, stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from landmark_llama.memories.models import tokenizer_digest
from landmark_llama.memories.texts import STDIN, Source, Sources, tokenise
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.mapped import MappedStorage
from landmark_llama.reading.saved import check_model, collect, complete_blocks, manifest_of, open_blocks, tail_of
from landmark_llama.saved.fingerprint import reader_of
from landmark_llama.saved.folder import Manifest, Writer, writing

CALL_POSITIONS = 4096  # landmarked positions that are read at once, about
SAVED_EVERY = 10.0  # seconds, at least between two states of the memory on the disk
SAVED_BYTES = 64 << 20  # of blocks: more are not held back until then


class Progress:
    """What is told how reading goes on."""

    def skip(self, size: int) -> None:
        """`size` bytes of text are in the memory already, about."""

    def read(self, size: int, tokens: int) -> None:
        """A call has read `size` bytes of text, about; the memory holds `tokens`."""


@dataclass(frozen=True)
class Piece:
    """Tokens (tokens, 3) of one text, as `tokenise` gives them.

    entry: of the text in `Manifest.sources`. last: the text ends here. digest: of the text. size: its bytes, about.
    """

    tokens: Tensor
    entry: dict[str, Any]
    last: bool
    digest: str
    size: float


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sources,
    folder: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    mapped: bool | None = None,
    saved_every: float = SAVED_EVERY,
) -> Manifest:
    """Reads the texts that the memory in `folder` does not hold yet, and adds them to it.

    The calls in which the model reads end at fixed multiples of tokens, so a reader that was killed and started again
    makes the same calls as one that was not: the memory is the same bit for bit.

    Args:
        progress: told how it goes on.
        mapped: what is on the disk is read from there, as in `LandmarkCache.load`.
        saved_every: seconds between two states on the disk.

    Returns:
        What the memory says about itself now.

    Raises:
        OSError: a file cannot be read or the folder not be written; the memory so far is good.
        ValueError: the memory is another model's or another text's; says what differs.
    """
    reader, progress = reader_of(model), progress or Progress()
    with writing(folder) as writer, torch.no_grad():
        cache = LandmarkCache(reader.config)
        state = writer.manifest
        if state is not None:
            check_model(Path(folder), state, reader)
            _check_tokenizer(Path(folder), state, tokenizer)
            open_blocks(cache, Path(folder), state, reader, mapped)
        growing = _Growing(writer, cache, reader, tokenizer, mapped)
        left = _pieces_left(sources, tokenizer, writer.folder, state, growing.sources, progress)
        for pieces in _calls(left, _call_tokens(reader.config), growing.tokens):
            growing.read(pieces)
            progress.read(round(sum(piece.size for piece in pieces)), growing.tokens)
            if time.monotonic() - growing.saved_at >= saved_every or growing.bytes_held >= SAVED_BYTES:
                growing.save()
        if not growing.tokens:
            raise ValueError(f"{', '.join(sources.files[:3])}: no text to read")
        return growing.save()


class _Growing:
    """A memory while it is read: what the cache holds, and how much of it is on the disk."""

    def __init__(
        self,
        writer: Writer,
        cache: LandmarkCache,
        reader: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        mapped: bool | None,
    ) -> None:
        self.writer, self.cache, self.reader, self.mapped = writer, cache, reader, mapped
        self.state, self.digest = writer.manifest, tokenizer_digest(tokenizer)
        state = self.state
        self.sources = [dict(entry) for entry in state.sources] if state else []
        self.tokens = state.rows("tokens").count if state else 0
        self.saved_at = time.monotonic()
        self._unsaved: list[Tensor] = []

    @property
    def bytes_held(self) -> int:
        """Of keys and values that are not on the disk."""
        config = self.reader.config
        size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return sum(map(len, self._unsaved)) * size * self.reader.embed_tokens.weight.element_size()

    def read(self, pieces: list[Piece]) -> None:
        """One call of the model, and what it says about the texts."""
        tokens = torch.cat([piece.tokens for piece in pieces])
        nothing = torch.empty(0, dtype=torch.long)  # nobody reads what comes after the text
        ids = tokens[:, 0].long().unsqueeze(0).to(self.reader.embed_tokens.weight.device)
        self.reader(ids, past_key_values=self.cache, logits_to_keep=nothing)
        self._unsaved.append(tokens)
        for piece in pieces:
            if not piece.entry["tokens"]:
                piece.entry["first"] = self.tokens
                self.sources.append(piece.entry)
            self.tokens += len(piece.tokens)
            piece.entry["tokens"] += len(piece.tokens)
            if piece.last:
                piece.entry["sha256"] = piece.digest

    def save(self) -> Manifest:
        """Brings all that was read to the disk."""
        if self._unsaved:
            before = self.state.blocks if self.state else 0
            state = manifest_of(self.cache, self.reader) if self.state is None else self.state
            sources = [dict(source) for source in self.sources]
            state = replace(state, ordinary=self.cache.ordinary_counts.tolist(), sources=sources, tokenizer=self.digest)
            complete = complete_blocks(state)
            for added in collect(self.cache.storages, before, complete):
                self.writer.append(state, added)
            self.writer.append(state, {"tokens": torch.cat(self._unsaved)})
            state = self.writer.commit(state, tail_of(self.cache.storages, complete, state))
            self._unsaved = []
            self._keep_what_is_not_saved(state)
            self.state = state
        self.saved_at = time.monotonic()
        return self.state

    def _keep_what_is_not_saved(self, state: Manifest) -> None:
        """Drops what is on the disk from memory, if it is to be read from there."""
        storages = self.cache.storages
        if all(isinstance(storage, MappedStorage) for storage in storages):
            saved = state.read(self.writer.folder, "blocks")
            for storage in storages:
                storage.move_to_file(saved)
        elif self.mapped if self.mapped is not None else self.reader.embed_tokens.weight.device.type == "cpu":
            open_blocks(self.cache, self.writer.folder, state, self.reader, mapped=True)
        self.cache.begin_after(torch.tensor(state.ordinary))  # columns are counted in vain here


def _call_tokens(config: Any) -> int:
    """Tokens that are read at once: whole blocks, and whole chunks where attention is chunked."""
    settings = config.retrieval()
    unit = settings.chunk_blocks if settings.chunked else 1
    return max(1, CALL_POSITIONS // (config.block_size * unit)) * unit * (config.block_size - 1)


def _calls(pieces: Iterator[Piece], call_tokens: int, read: int) -> Iterator[list[Piece]]:
    """The pieces of each call, which end at multiples of `call_tokens` in the memory. `read`: tokens it holds."""
    room = call_tokens - read % call_tokens
    call: list[Piece] = []
    for piece in pieces:
        while len(piece.tokens) > room:
            share = piece.size * room / len(piece.tokens)
            call.append(replace(piece, tokens=piece.tokens[:room], last=False, size=share))
            piece = replace(piece, tokens=piece.tokens[room:], size=piece.size - share)
            yield call
            call, room = [], call_tokens
        call.append(piece)
        room -= len(piece.tokens)
    if sum(len(piece.tokens) for piece in call):
        yield call


def _pieces_left(
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: Manifest | None,
    entries: list[dict[str, Any]],
    progress: Progress,
) -> Iterator[Piece]:
    """What is to be read of `sources`. The texts that the memory holds, `entries`, are checked."""
    digests = {entry["name"]: entry["sha256"] for entry in entries}
    begun, empty = next((entry for entry in entries if entry["sha256"] is None), None), not entries
    for i, name in enumerate(sources.files):
        source = sources[i]
        digest, known, total = source.digest, digests.get(name), max(source.characters, 1)
        if known == digest:
            progress.skip(sources.size(i))
            continue
        if known is not None and name != STDIN:
            raise ValueError(f"{name}: has changed since {folder} read it: read it into a new memory")
        if begun is not None and name != begun["name"]:
            raise ValueError(f"{folder}: {begun['name']} was not read to its end: give it first, then {name}")
        if begun is None:
            entry = {"name": name, "first": 0, "tokens": 0, "characters": source.characters, "sha256": None}
            pieces = _tokens_of(source, tokenizer, first=empty)
        else:
            entry, begun = begun, None
            read = state.read(folder, "tokens")[entry["first"] :]
            problem = f"{name}: is not the text that {folder} began to read: read it into a new memory"
            pieces = _skip(_tokens_of(source, tokenizer, first=not entry["first"]), read, problem)
        ahead = next(pieces, None)
        progress.skip(round(sources.size(i) * (1 if ahead is None else ahead[2] / total)))
        digests[name], empty = digest, empty and ahead is None
        while ahead is not None:
            tokens, characters, _ = ahead
            ahead = next(pieces, None)
            yield Piece(tokens, entry, ahead is None, digest, sources.size(i) * characters / total)


def _tokens_of(source: Source, tokenizer: PreTrainedTokenizerBase, *, first: bool) -> Iterator[tuple[Tensor, int, int]]:
    """Tokens of a text, some at a time, their characters and those before them; the memory's first begins with BOS."""
    bos, before = tokenizer.bos_token_id, 0
    begins = first and bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    for tokens, characters in tokenise(source, tokenizer):
        if begins:
            tokens, begins = torch.cat([torch.tensor([[bos, 0, 1]], dtype=tokens.dtype), tokens]), False
        if len(tokens):
            yield tokens, characters, before
        before += characters


def _skip(pieces: Iterator[tuple[Tensor, int, int]], read: Tensor, problem: str) -> Iterator[tuple[Tensor, int, int]]:
    """`pieces` without the tokens `read`, with which they must begin."""
    skipped = 0
    for tokens, characters, before in pieces:
        same = min(len(tokens), len(read) - skipped)
        if not torch.equal(tokens[:same], read[skipped : skipped + same]):
            raise ValueError(problem)
        skipped += same
        if same < len(tokens):
            new = round(characters * (1 - same / len(tokens)))
            yield tokens[same:], new, before + characters - new
    if skipped < len(read):
        raise ValueError(problem)


def _check_tokenizer(folder: Path, state: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
    if state.tokenizer is None:
        raise ValueError(f"{folder}: was saved without its text, by cache.save: read into a new memory")
    if state.tokenizer != tokenizer_digest(tokenizer):
        raise ValueError(f"{folder}: was read with another tokenizer than the model's: read into a new memory")
