"""What every method is: a reader of texts of any length, segment by segment, over one and the same base model.

A method's file has a subclass of `Reader` and a function `build(base, **options)` that makes one of a dense LLaMA. It
must write `read`; everything else follows from that, and may be replaced where the method knows a faster way.

Shapes: B rows, T tokens of a segment, C the width of the model, V its vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

Memory = Any  # what a method carries from segment to segment: None at the beginning of a text


class Reader(nn.Module):
    """A model that reads a text in segments and carries a memory from one to the next.

    base: the dense LLaMA that the method changes; its weights are the reader's.
    segment: tokens that one call of `read` takes at most. Texts are cut every `segment` tokens, from their beginning.
    remembers_in_training: whether the segments of a training row see those before them. False: each is read by itself.
    progress: share of the training that is over, set before each step; for curricula.
    """

    remembers_in_training = True

    def __init__(self, base: LlamaForCausalLM, segment: int = 512):
        super().__init__()
        self.base, self.segment, self.progress = base, segment, 0.0

    def read(self, input_ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Reads the next segment of each row.

        Args:
            input_ids: (B, T) with T <= `segment`; fewer than `segment` at the end of a text only.
            memory: what the previous segment returned, left unchanged; None for the first.

        Returns:
            The last layer's normalised states (B, T, C), from which `logits` predicts the next tokens, and the memory
            for the next segment. No state may depend on a later token.
        """
        raise NotImplementedError

    def fitting(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What another reader has saved, in this one's shapes."""
        return weights

    def auxiliary_loss(self, memory: Memory) -> Tensor | float:
        """What training minimises beside the prediction, for the segment that left this memory."""
        return 0.0

    def between(self, memory: Memory, segment: int) -> Memory:
        """The memory as the next segment of a training row gets it; by default no gradient flows back through it.

        segment: how many segments of the row have been read.
        """
        return detached(memory)

    def logits(self, states: Tensor) -> Tensor:
        """Scores (..., V) of the next token after `states` (..., C)."""
        return self.base.lm_head(states)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of training rows (B, any number of tokens); `labels` (same shape) are the next tokens."""
        total, memory = 0.0, None
        pieces = zip(input_ids.split(self.segment, dim=1), labels.split(self.segment, dim=1), strict=True)
        for number, (ids, target) in enumerate(pieces, start=1):
            states, memory = self.read(ids, memory if self.remembers_in_training else None)
            total = total + cross_entropy(self.logits(states).flatten(0, 1), target.flatten(), reduction="sum")
            total = total + self.auxiliary_loss(memory) * target.numel()
            memory = self.between(memory, number)
        return {"loss": total / labels.numel()}

    @torch.no_grad()
    def losses(self, input_ids: Tensor) -> Tensor:
        """-log p (B, length) of tokens 1 .. length of a text's beginnings `input_ids` (B, length + 1), in nats."""
        memory, losses = None, []
        pieces = zip(input_ids[:, :-1].split(self.segment, 1), input_ids[:, 1:].split(self.segment, 1), strict=True)
        for ids, target in pieces:
            states, memory = self.read(ids, memory)
            losses.append(cross_entropy(self.logits(states).transpose(1, 2).float(), target, reduction="none"))
        return torch.cat(losses, dim=1)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Reads texts (B, length): the scores of their next token (B, V), and what `decode` goes on from."""
        before = memory = None
        for piece in input_ids.split(self.segment, dim=1):
            before = memory
            states, memory = self.read(piece, before)
        return self.logits(states[:, -1]), (before, memory, piece)

    @torch.no_grad()
    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads one more token (B, 1): scores (B, V) and state as `prefill`. By default its segment is read again."""
        before, memory, piece = state
        if piece.shape[1] == self.segment:
            before, piece = memory, piece[:, :0]
        piece = torch.cat([piece, token], dim=1)
        states, memory = self.read(piece, before)
        return self.logits(states[:, -1]), (before, memory, piece)

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """The greedy continuation (B, max_new_tokens) of texts (B, length)."""
        scores, state = self.prefill(input_ids)
        tokens = [scores.argmax(-1, keepdim=True)]
        while len(tokens) < max_new_tokens:
            scores, state = self.decode(tokens[-1], state)
            tokens.append(scores.argmax(-1, keepdim=True))
        return torch.cat(tokens, dim=1)


def detached(memory: Memory) -> Memory:
    """The same tensors without their history; lists, tuples and dictionaries are gone through."""
    if isinstance(memory, Tensor):
        return memory.detach()
    if isinstance(memory, dict):
        return {name: detached(value) for name, value in memory.items()}
    if isinstance(memory, tuple) and hasattr(memory, "_fields"):
        return type(memory)(*map(detached, memory))
    if isinstance(memory, (list, tuple)):
        return type(memory)(detached(value) for value in memory)
    return memory
