"""Taipan: a recurrent model in which some tokens, which the model selects, attend to each other.

Nguyen et al., "Taipan: Efficient and Expressive State Space Language Models with Selective Attention", arXiv
2410.18572. All layers are recurrent: a head's state is a matrix that decays, by a factor of each token's own, and to
which the token adds its key times its value; a query reads it. That is the form that Mamba-2 takes (Dao & Gu, arXiv
2405.21060), here with a LLaMA's projections and without its convolution and gate. After every `every` layers stands
selective attention: a gate selects tokens (Gumbel-softmax in training). A selected token gives up a part of its state
for what it finds by softmax attention, without positions, among the selected tokens: the last `window` of earlier
segments, and those of its own. A loss keeps the selected share near `budget`. Attention is computed with masks here:
it saves no time.

Invariant: segments compute the recurrence of token after token; a token that is not selected leaves selective
attention as it came, and changes no other token there.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, layer_norm, logsigmoid
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from comparisons.layers import attend_causally, through_layer
from comparisons.reader import Reader


class Selected(NamedTuple):
    """Of one selective attention: its last tokens (B, H, window, D), which there are, the share selected."""

    key: Tensor
    value: Tensor
    there: Tensor
    share: Tensor


Memory = tuple[list[Tensor], list[Selected]]  # states (B, H, D, D) of the layers, and of each selective attention


class SelectiveAttention(nn.Module):
    """Softmax attention among tokens that a gate selects."""

    def __init__(self, base: LlamaForCausalLM, window: int):
        super().__init__()
        width, self.heads, self.window = base.config.hidden_size, base.config.num_attention_heads, window
        self.norm, self.gate = LlamaRMSNorm(width), nn.Linear(width, 2)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, states: Tensor, kept: Selected | None) -> tuple[Tensor, Selected]:
        """States (B, T, C) to the same."""
        normal = self.norm(states)
        scores = self.gate(normal)
        share = scores.softmax(-1)[..., 1:]  # (B, T, 1)
        choice = gumbel_softmax(scores, hard=True) if self.training else scores
        selected = choice.argmax(-1) == 1
        # 1 or 0, with the gradient of the gate
        gate = choice[..., 1:] if self.training else selected.unsqueeze(-1).to(states)
        projections = self.query, self.key, self.value
        query, key, value = (f(normal).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in projections)
        kept = self._empty(key) if kept is None else kept
        keys, values = torch.cat([kept.key, key], 2), torch.cat([kept.value, value], 2)
        there = torch.cat([kept.there, selected], dim=1)
        found = self._attend(query, keys, values, there)
        part = gate * share
        return (1 - part) * states + part * found, self._keep(keys, values, there, share.mean())

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, there: Tensor) -> Tensor:
        """(B, T, C): what queries find among the tokens that are `there` (B, N), and themselves."""
        queries, keys = query.shape[2], key.shape[2]
        place = torch.arange(keys, device=key.device)
        own = place[keys - queries :, None]
        mask = (place < own) & there[:, None, None] | (place == own)
        return self.output(attend_causally(query, key, value, mask).transpose(1, 2).flatten(2))

    def _keep(self, key: Tensor, value: Tensor, there: Tensor, share: Tensor) -> Selected:
        """The last `window` tokens that are there."""
        age = torch.arange(1, there.shape[1] + 1, device=there.device)
        latest = (there * age).topk(self.window, dim=-1).indices.sort(-1).values
        place = latest[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1])
        return Selected(key.gather(2, place), value.gather(2, place), there.gather(1, latest), share)

    def _empty(self, key: Tensor) -> Selected:
        none = key.new_zeros(len(key), self.heads, self.window, key.shape[-1])
        return Selected(none, none, none[:, 0, :, 0].bool(), key.new_zeros(()))


class TaipanReader(Reader):
    """Recurrent layers with a selective attention after every `every` of them."""

    def __init__(self, base: LlamaForCausalLM, segment: int, every: int, window: int, budget: float):
        super().__init__(base, segment)
        layers, heads, width = base.config.num_hidden_layers, base.config.num_attention_heads, base.config.head_dim
        self.every, self.budget = every, budget
        self.decay = nn.Parameter(torch.randn(layers, heads, width) * width**-0.5)
        self.longevity = nn.Parameter(torch.linspace(1.0, 6.0, heads).repeat(layers, 1))  # 4 to 400 tokens
        self.selective = nn.ModuleList(SelectiveAttention(base, window) for _ in range(layers // every))

    def read(self, input_ids: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        model, held, chosen = self.base.model, [], []
        states = model.embed_tokens(input_ids)
        for number, layer in enumerate(model.layers):
            old = None if memory is None else memory[0][number]
            states = through_layer(layer, states, partial(self._recur, held, number, old))
            if (number + 1) % self.every == 0:
                place = number // self.every
                states, kept = self.selective[place](states, None if memory is None else memory[1][place])
                chosen.append(kept)
        return model.norm(states), (held, chosen)

    def _recur(
        self, held: list[Tensor], number: int, old: Tensor | None, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Output (B, H, T, D) of a layer, whose new state is put into `held`."""
        fade = torch.einsum("bhtd,hd->bht", key, self.decay[number]) + self.longevity[number][:, None]
        output, new = recurrence(query, key, value, logsigmoid(fade), old)
        held.append(new)
        return layer_norm(output, output.shape[-1:])

    def auxiliary_loss(self, memory: Memory) -> Tensor | float:
        return sum((kept.share - self.budget).square() for kept in memory[1])


def recurrence(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs q_t S_t (B, H, T, D) and the last state of S_t = decay_t S_(t-1) + (1 - decay_t) k_t v_t.

    log_decay: (B, H, T), below 0; state: (B, H, D, D), None for 0.
    """
    key = key * (-torch.expm1(log_decay)).unsqueeze(-1)
    total = log_decay.cumsum(-1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril()
    output = ((query @ key.transpose(-1, -2)) * between.exp()).tril() @ value
    new = (key * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2) @ value
    if state is not None:
        output = output + (query * total.exp().unsqueeze(-1)) @ state
        new = new + state * total[..., -1, None, None].exp()
    return output, new


def build(
    base: LlamaForCausalLM, segment: int = 256, every: int = 2, window: int = 128, budget: float = 0.15
) -> Reader:
    """Selective attention after every `every` layers, over `window` selected tokens of earlier segments."""
    return TaipanReader(base, segment, every, window, budget)
