"""The texts of the lm-eval task `long_text`: .txt files (a text each), .jsonl and .parquet (a row's `text`)."""

from pathlib import Path

import datasets

KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".zst": "json", ".gz": "json", ".parquet": "parquet"}


def load(files: str | list[str] = (), **unused: object) -> dict[str, datasets.Dataset]:
    """A test split with a column `text`; `files` comes from lm-eval's `--metadata '{"files": ...}'`.

    Raises:
        ValueError: no file of a known kind is named, or files of several kinds are.
    """
    named = [Path(file) for file in ([files] if isinstance(files, str) else files)]
    found = [path for name in named for path in (sorted(name.rglob("*")) if name.is_dir() else [name])]
    found = [str(path) for path in found if path.suffix in KINDS]
    kinds = {KINDS[Path(path).suffix] for path in found}
    if len(kinds) != 1:
        raise ValueError(
            f"--metadata files={files!r}: {len(found)} files of {len(kinds)} kinds; name text files, JSON "
            "lines or parquet"
        )
    settings = {"sample_by": "document"} if kinds == {"text"} else {}
    texts = datasets.load_dataset(kinds.pop(), data_files=found, split="train", **settings)
    return {"test": texts.select_columns("text")}
