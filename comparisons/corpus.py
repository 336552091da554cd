"""The texts of a bench: a tokenizer trained on them, training rows of consecutive tokens, windows for evaluation."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from comparisons.bench import Bench, Domain
from eval_passkey.prompts import InputError
from eval_perplexity.documents import Document, Protocol, Window, beginning_of_text, encode
from finetune.data.reading import read_file
from finetune.demo.corpus import make_corpus, standard_library_texts
from finetune.demo.tokenizer import to_fast_tokenizer, train_sentencepiece

TOKENIZER_CHARACTERS = 2_000_000  # that the tokenizer is trained on
EMBEDDED = ("python", "retrieval")


class Rows(Dataset):
    """Training rows: `input_ids` and `labels` (row_tokens,), the labels being the next tokens.

    streams: tokens of each domain, its documents one after another with BOS before each.
    """

    def __init__(self, streams: list[np.ndarray], shares: list[float], rows: int, row_tokens: int, seed: int):
        self.streams, self.row_tokens = streams, row_tokens
        rng = np.random.default_rng(seed)
        wanted = np.array(shares) / sum(shares) * rows
        counts = np.diff(np.round(np.concatenate([[0], wanted.cumsum()]))).astype(int)
        places = [self._places(stream, count, rng) for stream, count in zip(streams, counts, strict=True)]
        self.places = [(domain, place) for domain, some in enumerate(places) for place in some]
        rng.shuffle(self.places)

    def _places(self, stream: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
        """Where `count` rows begin: each token once before any comes twice, every round cut at other places."""
        places: list[int] = []
        while len(places) < count:
            start = rng.integers(0, self.row_tokens) if places else 0
            starts = np.arange(start, len(stream) - self.row_tokens, self.row_tokens)
            if not len(starts):
                raise InputError(f"data: a domain has only {len(stream)} tokens; rows need {self.row_tokens + 1}")
            places += rng.permutation(starts)[: count - len(places)].tolist()
        return places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        domain, place = self.places[row]
        ids = torch.from_numpy(self.streams[domain][place : place + self.row_tokens + 1].astype(np.int64))
        return {"input_ids": ids[:-1], "labels": ids[1:]}


class Corpus:
    """Everything that is read, made once and kept in a folder.

    root: what file names in the configuration are relative to.
    InputError if a file is missing, or if there is too little text.
    """

    def __init__(self, bench: Bench, root: Path, folder: Path):
        self.bench, self.root, self.folder = bench, root, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._tokenizer()
        self.bos = beginning_of_text(self.tokenizer)

    def rows(self, seed: int, steps: int) -> Rows:
        """The training rows of a seed: the same for every method that trains so many steps."""
        training, domains = self.bench.training, self.bench.data
        trained = {name: domain for name, domain in domains.items() if domain.train and domain.share}
        shares = [domain.share for domain in trained.values()]
        streams = [self._stream(name) for name in trained]
        return Rows(streams, shares, steps * training.rows, training.row_tokens, seed)

    def windows(self, domain: str, length: int) -> list[Window]:
        """Windows of one length: all lengths of a bench cover the same text."""
        longest, tokens = self.bench.longest, self.bench.perplexity.tokens
        documents, missing = [], -(-tokens // longest) * longest
        for name, text in self._evaluated(domain):
            if missing <= 0:
                break
            document = Document(name, name, text[: 8 * missing], *encode(self.tokenizer, text[: 8 * missing]), self.bos)
            whole = min(document.scorable // longest * longest, missing, max(longest, tokens // 4))
            if whole:
                ids = document.ids[: document.first + whole]
                until = document.bytes_until[: len(ids) + 1]
                documents.append(Document(name, name, document.text, ids, until, self.bos))
                missing -= whole
        if not documents:
            raise InputError(f"data.{domain}: no text for evaluation has {longest} tokens")
        return Protocol("segments", tuple(sorted(self.bench.perplexity.lengths))).windows(documents, length)

    def some_tokens(self) -> list[int]:
        """Tokens of real text, for measures that do not care which."""
        name = next(name for name, domain in self.bench.data.items() if domain.train and domain.share)
        return self._stream(name)[:8192].tolist()

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        """The base's, or one trained on the beginning of every domain's training text."""
        if self.bench.base is not None:
            return AutoTokenizer.from_pretrained(self.bench.base)
        folder = self.folder / "tokenizer"
        if not (folder / "tokenizer_config.json").is_file():
            trained = [domain for domain in self.bench.data.values() if domain.train and domain.share]
            texts = [text for domain in trained for text in self._some(domain, TOKENIZER_CHARACTERS // len(trained))]
            processor = train_sentencepiece(texts, self.bench.vocabulary)
            positions = self.bench.model.get("max_position_embeddings", 512)
            to_fast_tokenizer(processor, positions).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)

    def _stream(self, name: str) -> np.ndarray:
        """The tokens of a domain's training text, as many as its share of the training needs."""
        domain, domains = self.bench.data[name], self.bench.data.values()
        path = self.folder / f"{name}.npy"
        if not path.is_file():
            share = domain.share / sum(one.share for one in domains if one.train)
            wanted, ids = int(1.02 * share * self.bench.training.tokens) + self.bench.training.row_tokens + 1, []
            for text in self._some(domain, 16 * wanted):
                ids.append(np.array([self.bos, *encode(self.tokenizer, text)[0].tolist()], dtype=np.uint16))
                wanted -= len(ids[-1])
                if wanted <= 0:
                    break
            unfinished = path.with_suffix(".partial.npy")
            np.save(unfinished, np.concatenate(ids))
            unfinished.replace(path)
        return np.load(path, mmap_mode="r")

    def _some(self, domain: Domain, characters: int) -> Iterator[str]:
        """Excerpts of a domain's documents in an order of its own, until there are enough characters."""
        rng = random.Random("excerpts")
        texts = [text for _, text in self._texts(domain, domain.train, heldout=False)]
        rng.shuffle(texts)
        for text in texts:
            start = rng.randrange(max(1, len(text) - domain.excerpt))
            start = text.find("\n", start) + 1 if len(text) > domain.excerpt else 0
            yield text[start : start + domain.excerpt]
            characters -= min(len(text), domain.excerpt)
            if characters <= 0:
                return

    def _evaluated(self, name: str) -> Iterator[tuple[str, str]]:
        domain = self.bench.data[name]
        yield from self._texts(domain, domain.evaluate or domain.train, heldout=not domain.evaluate)

    def _texts(self, domain: Domain, sources: list[str], heldout: bool) -> Iterator[tuple[str, str]]:
        """Names and texts; `heldout`: those kept for evaluation, or those that are not."""
        number = -1
        for source in sources:
            if source == "retrieval":
                texts = enumerate(make_corpus(**domain.retrieval)[heldout])
                yield from ((f"retrieval {i}", row["text"]) for i, row in texts)
                continue
            for name, text in self._of_source(source):
                number += 1
                if domain.heldout is None or (number % domain.heldout == 0) == heldout:
                    yield name, text

    def _of_source(self, source: str) -> Iterator[tuple[str, str]]:
        if source == "python":
            yield from standard_library_texts()
            return
        path = self.root / source
        if not path.is_file():
            raise InputError(f"data: {path}: there is no such file; --data names the folder that it is in")
        for number, (text, problem) in enumerate(read_file(str(path)), start=1):
            if problem is not None:
                raise InputError(f"data: {problem}")
            yield f"{path.name}:{number}", text
