"""One HTML page, complete in itself: an answer and, for each of its tokens, the passages that it was read from."""

from __future__ import annotations

import base64
import html
import importlib.resources
import json
from typing import Any

from landmark_llama.memories.asking import Answer, Memory
from landmark_llama.memories.passages import block_weights, first_layer_that_chooses, passage, text_blocks

PASSAGES = 8  # of each token and layer


def page(memory: Memory, answer: Answer, picture: bytes | None = None) -> str:
    """The page; `picture` is a PNG to be shown below.

    answer: with what was retrieved (`Memory.ask(..., show=True)`).
    """
    template = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    image = ""
    if picture is not None:
        source = base64.b64encode(picture).decode()
        image = f'<img alt="Heat map: places of the memory by layer and by token" src="data:image/png;base64,{source}">'
    # what stands in a script must not end it
    data = json.dumps(shown(memory, answer), ensure_ascii=False).replace("<", "\\u003c")
    parts = {"title": html.escape(answer.question[:80]), "data": data, "picture": image}
    before, *rest = template.split("{{")
    return before + "".join(parts[name] + text for name, _, text in (part.partition("}}") for part in rest))


def shown(memory: Memory, answer: Answer) -> dict[str, Any]:
    """What the page shows, as JSON: tokens, each with its blocks and their weights by layer, and the passages."""
    first, blocks = first_layer_that_chooses(memory.model), text_blocks(memory)
    tokens, found = [], set()
    texts = token_texts(memory.tokenizer, answer.ids)
    weights = block_weights(answer.retrieved, blocks, first_layer=first) if answer.retrieved else []
    for text, by_layer in zip(texts, weights, strict=False):
        views = [by_layer[first:].mean(0), *by_layer[first:]]
        best = {b for view in views for b in view.topk(min(PASSAGES, blocks)).indices.tolist() if view[b] > 0}
        read = {b: [round(float(view[b]), 5) for view in views] for b in sorted(best)}
        tokens.append({"text": text, "read": read})
        found |= best
    passages = {}
    for block in sorted(found):
        one = passage(memory, block)
        passages[block] = {"before": one.before, "text": one.text, "after": one.after, "place": one.place}
    return {
        "question": answer.question,
        "memory": str(memory.folder),
        "memory_tokens": max(memory.manifest.ordinary),
        "blocks": blocks,
        "layers": [f"layer {i}" for i in range(first, memory.manifest.shape.layers)],
        "tokens": tokens,
        "passages": passages,
    }


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; empty for the first bytes of a character, which its last token brings."""
    texts, done = [], ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        complete = not text.endswith("�")
        texts.append(text[len(done) :] if complete else "")
        done = text if complete else done
    return texts
