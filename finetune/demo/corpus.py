"""The embedded corpus: RedPajama-style JSONL made on this machine, from Python's own sources and synthetic documents.

    python finetune/demo/corpus.py --output runs/corpus --documents 20000

writes `train.jsonl` and `heldout.jsonl`, one `{"text": ..., "meta": {...}}` a line. No download: the real text is the
documentation and the source code of the Python that runs this, so another Python version gives other (similar) text.
The same Python, seed and size give the same files.
"""

import argparse
import filecmp
import json
import os
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from any folder
from finetune.demo.arguments import DemoArguments
from finetune.demo.retrieval_documents import RetrievalWriter, holds_reserved_number

# Folders of the standard library that are not its own prose, or that some distributions leave out.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
PIECE_CHARACTERS = 2000
HELDOUT_SHARE = 0.02


def standard_library_texts() -> Iterator[tuple[str, str]]:
    """Yields `(name, text)` of Python's help topics and of each standard-library source file, in a fixed order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some minimal distributions leave it out; the sources alone will do
        topics = {}
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.parts[0] != "pydoc_data":
            try:
                yield relative.as_posix(), path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue


def prose_documents() -> list[dict]:
    """Real documents: each text cut at line ends into pieces of about `PIECE_CHARACTERS` characters.

    Lines that hold a number reserved for the passkey benchmark are left out.
    """
    documents = []
    for name, text in standard_library_texts():
        piece: list[str] = []
        length = 0
        for line in text.splitlines(keepends=True):
            if holds_reserved_number(line):
                continue
            piece.append(line)
            length += len(line)
            if length >= PIECE_CHARACTERS:
                documents.append(_document("".join(piece), "python", name))
                piece, length = [], 0
        if length:
            documents.append(_document("".join(piece), "python", name))
    return documents


def common_words(documents: list[dict], minimum_count: int = 5) -> list[str]:
    """Lower-case words of four to nine letters that stand at least `minimum_count` times in the documents, sorted."""
    counts = Counter(word for document in documents for word in re.findall(r"\b[a-z]{4,9}\b", document["text"]))
    return sorted(word for word, count in counts.items() if count >= minimum_count)


def make_corpus(
    documents: int,
    retrieval_share: float = 0.9,
    retrieval_characters: tuple[int, int] = (80, 1000),
    copy_share: float = 0.1,
    register_share: float = 0.3,
    refrain_share: float = 0.35,
    seed: int = 0,
) -> tuple[list[dict], list[dict]]:
    """Makes `documents` documents and returns them as `(train, heldout)`, shuffled and without a text in common.

    Args:
        documents: how many in all, held-out ones included.
        retrieval_share: share of retrieval documents; the rest is real text, used again when there is too little of it.
        retrieval_characters: length of the shortest and of the longest retrieval documents, about.
        copy_share: share of the retrieval documents that only say something twice: what a new model has to learn first.
        register_share, refrain_share: as in `RetrievalWriter`.
        seed: of every choice.
    """
    rng = random.Random(seed)
    prose = prose_documents()
    # Whole files are held out, so that no half of one is in the training text.
    files = sorted({document["meta"]["source"] for document in prose})
    heldout_files = set(rng.sample(files, max(1, int(len(files) * HELDOUT_SHARE))))
    heldout_prose = [document for document in prose if document["meta"]["source"] in heldout_files]
    train_prose = [document for document in prose if document["meta"]["source"] not in heldout_files]
    words = common_words(train_prose)

    heldout_count = max(2, int(documents * HELDOUT_SHARE))
    splits = []
    seen: set[str] = set()
    for count, own_prose in ((heldout_count, heldout_prose), (documents - heldout_count, train_prose)):
        retrieval_count = round(count * retrieval_share)
        texts = [document["text"] for document in own_prose]
        writer = RetrievalWriter(rng, words, texts, register_share, refrain_share)
        made = [_sample(own_prose, count - retrieval_count, rng), []]
        while len(made[1]) < retrieval_count:
            text = writer.document(rng.randint(*retrieval_characters), copy_share)
            if text not in seen and not holds_reserved_number(text):
                seen.add(text)
                made[1].append(_document(text, "retrieval", "retrieval"))
        both = made[0] + made[1]
        rng.shuffle(both)
        splits.append(both)
    heldout, train = splits
    texts = {document["text"] for document in heldout}
    return [document for document in train if document["text"] not in texts], heldout


def corpus_files(folder: Path) -> tuple[Path, Path]:
    """Where the training and the held-out file of a corpus stand."""
    return folder / "train.jsonl", folder / "heldout.jsonl"


def write_corpus(
    folder: Path,
    documents: int,
    retrieval_share: float = 0.9,
    retrieval_characters: tuple[int, int] = (80, 1000),
    copy_share: float = 0.1,
    register_share: float = 0.3,
    refrain_share: float = 0.35,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `heldout.jsonl` to `folder`; returns their paths. Settings as in `make_corpus`.

    A file appears under its name only when it is complete, so an interruption leaves no half corpus.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = corpus_files(folder)
    splits = make_corpus(
        documents, retrieval_share, retrieval_characters, copy_share, register_share, refrain_share, seed
    )
    for path, split in zip(paths, splits, strict=True):
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in split)
        if path.exists() and filecmp.cmp(partial, path, shallow=False):
            partial.unlink()  # what names a file by its time of change finds the one that it knows
        else:
            os.replace(partial, path)
    return paths


def embedded_files(demo: DemoArguments, output_dir: str, main_process: bool) -> tuple[Path, Path]:
    """The training and the held-out file of `--data embedded`. The main process writes them."""
    folder = Path(demo.corpus_folder or Path(output_dir) / "corpus")
    if not main_process:
        return corpus_files(folder)
    return write_corpus(
        folder,
        demo.corpus_documents,
        retrieval_share=demo.corpus_retrieval_share,
        retrieval_characters=tuple(demo.corpus_retrieval_characters),
        copy_share=demo.corpus_copy_share,
        register_share=demo.corpus_register_share,
        refrain_share=demo.corpus_refrain_share,
        seed=demo.corpus_seed,
    )


def _document(text: str, kind: str, source: str) -> dict:
    return {"text": text, "meta": {"set": kind, "source": source}}


def _sample(documents: list[dict], count: int, rng: random.Random) -> list[dict]:
    """`count` of the documents: each once before any comes twice."""
    chosen: list[dict] = []
    while len(chosen) < count and documents:
        chosen += rng.sample(documents, min(count - len(chosen), len(documents)))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--retrieval_share", type=float, default=0.9)
    parser.add_argument("--copy_share", type=float, default=0.1)
    parser.add_argument("--register_share", type=float, default=0.3)
    parser.add_argument("--refrain_share", type=float, default=0.35)
    parser.add_argument(
        "--retrieval_characters", type=int, nargs=2, default=(80, 1000), metavar=("SHORTEST", "LONGEST")
    )
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    for path in write_corpus(options.pop("output"), **options):
        print(path)


if __name__ == "__main__":
    main()
