"""Asking a memory: a question is added to what was read, answered, and forgotten again."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from landmark_llama.memories.models import tokenizer_digest
from landmark_llama.reading.cache import LandmarkCache
from landmark_llama.reading.storage import BlockStorage
from landmark_llama.reading.trace import RetrievedStep
from landmark_llama.saved.folder import Manifest, read_manifest

PLAIN_PROMPT = "\n\nQuestion: {question}\nAnswer:"  # where a tokenizer has no chat template


@dataclass(frozen=True)
class Answer:
    """What was said.

    prompt, ids: tokens of the question as it was put, and of the answer.
    seconds: for both.
    retrieved: what each token's choice read, if that was asked for.
    """

    question: str
    text: str
    prompt: list[int]
    ids: list[int]
    seconds: float
    retrieved: list[RetrievedStep] = field(default_factory=list)


class Memory:
    """An open memory with its model: answers questions, each for the price of the question alone.

    Args:
        folder: of the memory.
        model, tokenizer: that read it.
        storage: as of `LandmarkCache.load`.

    Raises:
        OSError: the folder is missing, or a file of it is damaged.
        ValueError: another model or tokenizer read it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        storage: Callable[[int], BlockStorage] | None = None,
    ) -> None:
        self.folder, self.model, self.tokenizer = Path(folder), model, tokenizer
        self.manifest: Manifest = read_manifest(folder)
        if self.manifest.tokenizer not in (None, tokenizer_digest(tokenizer)):
            raise ValueError(f"{folder}: was read with another tokenizer than the model's")
        self.cache = LandmarkCache.load(folder, model, storage=storage)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """The text, (tokens, 3): id, character and line in its file; no rows if it was saved without."""
        return self.manifest.read(self.folder, "tokens")

    def prompt(self, question: str, *, as_it_is: bool = False) -> list[int]:
        """Tokens of a question: in the chat template if there is one, or as it is."""
        special = {"add_special_tokens": False}
        if as_it_is:
            return self.tokenizer(question, **special)["input_ids"]
        if not self.tokenizer.chat_template:
            return self.tokenizer(PLAIN_PROMPT.format(question=question), **special)["input_ids"]
        turn = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        # the memory begins with BOS already
        return self.tokenizer(text.removeprefix(self.tokenizer.bos_token or ""), **special)["input_ids"]

    def ask(
        self,
        question: str,
        *,
        as_it_is: bool = False,
        streamer: BaseStreamer | None = None,
        show: bool = False,
        **generation: Any,
    ) -> Answer:
        """The answer to a question. The memory is then as it was.

        Args:
            as_it_is: the question is a prompt to be gone on with.
            streamer: is given the tokens as they come.
            show: records what is retrieved.
            generation: of `generate`, for example `max_new_tokens`. Without `do_sample`, the answer is greedy.

        Raises:
            ValueError: the question is empty.
        """
        prompt = self.prompt(question, as_it_is=as_it_is)
        if not question.strip() or not prompt:
            raise ValueError("the question is empty")
        ids = torch.tensor([prompt], device=self.model.device)
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else self.tokenizer.eos_token_id or 0
        begun = time.perf_counter()
        try:
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.cache,
                streamer=streamer,
                return_retrieved=show,
                **{"do_sample": False, "num_beams": 1, "pad_token_id": pad, **generation},
            )
        finally:
            self.cache.crop(-self.cache.get_seq_length())
        seconds = time.perf_counter() - begun
        sequence = output.sequences if show else output
        answer = sequence[0, len(prompt) :].tolist()
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        return Answer(question, text, prompt, answer, seconds, output["retrieved"] if show else [])
