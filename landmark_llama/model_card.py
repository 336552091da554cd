"""The model card, README.md of a saved model: its window, how to use it, what it was trained on, its licence."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from huggingface_hub import metadata_load

from landmark_llama.configuration import LandmarkConfig
from landmark_llama.tokenization import plain_length

CARD = "README.md"
MARK = "<!-- Written by landmark_llama, and written anew when the model is saved again, unless edited. sha256: "

TEXT = """---
{front}
---
# A {config.family.name} with landmark attention

It reads texts far longer than it was trained on: each query attends to its neighbourhood and to the few earlier blocks
whose landmark tokens it scores highest ([Mohtashami and Jaggi, 2023](https://arxiv.org/abs/2305.16300)).

| window | |
|---|---|
| trained on | {tokens:,} tokens ({config.train_context_length:,} positions with landmarks) |
| a block | {block_tokens} tokens and a landmark |
| a query retrieves | {config.num_retrieved_blocks} blocks (`{config.retrieval_granularity}`) |
| it reads directly | {direct} blocks before its own (`{config.local_attention}`) |
| longest text | no limit; memory grows with the text |

## Use

```
pip install landmark-llama
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# or `import landmark_llama` first, without trust_remote_code, which runs one line: the import of the package
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

The tokenizer has a landmark token, id {config.landmark_token_id}. The model sets it by itself and never generates it.

## Training

{training}

## Licence

{licence}
"""


def model_card(
    config: LandmarkConfig,
    *,
    name: str = "path/to/this/folder",
    base: str | None = None,
    data: Sequence[str] = (),
    results: Mapping[str, object] | None = None,
) -> str:
    """The text of a card.

    Args:
        name: what the model is loaded by in the example.
        base: the checkpoint that it was made from, a folder or a hub id. A folder's own card may name its licence. Its
            path is not told.
        data: files or data sets that it was trained on; paths lose their folders.
        results: names and values of what was measured.
    """
    licence = _licence_of(base)
    hub_id = base if base and not Path(base).exists() else None
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": "[landmark-attention]"}
    front |= {"base_model": hub_id} if hub_id else {}
    front |= {"license": licence} if licence else {}
    described = [
        f"Made from {hub_id}." if hub_id else "",
        f"Data: {', '.join(Path(x).name for x in data)}." * bool(data),
    ]
    table = [f"| {what} | {value} |" for what, value in (results or {}).items()]
    training = "\n".join(filter(None, described)) or "Not told. A landmark has to be trained before it finds anything."
    return TEXT.format(
        front="\n".join(f"{key}: {value}" for key, value in front.items()),
        config=config,
        name=name,
        tokens=plain_length(config.train_context_length, config.block_size),
        block_tokens=config.block_size - 1,
        direct=config.retrieval().num_direct_blocks,
        training=training + ("\n\n| result | |\n|---|---|\n" + "\n".join(table) if table else ""),
        licence=(f"Of the weights: {licence}, as the model they were made from. " if licence else "")
        + ("" if licence else "The weights are under the licence of the model that they were made from. ")
        + "The code, landmark_llama: Apache-2.0.",
    )


def write_card(folder: str | PathLike[str], text: str) -> None:
    """Writes README.md with a mark at its end, unless one is there that somebody wrote or edited."""
    path = Path(folder) / CARD
    if not path.exists() or is_own_card(path):
        path.write_text(f"{text}\n{MARK}{_digest(text)} -->\n", encoding="utf-8")


def is_own_card(path: Path) -> bool:
    """Whether `path` is a card that `write_card` wrote, unchanged."""
    if not path.is_file():
        return False
    text, mark, digest = path.read_text("utf-8", errors="replace").rpartition(f"\n{MARK}")
    return bool(mark) and digest == f"{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _licence_of(base: str | None) -> str | None:
    card = Path(base or "") / CARD
    if not base or not card.is_file():
        return None
    licence = (metadata_load(card) or {}).get("license")
    return licence if isinstance(licence, str) else None
