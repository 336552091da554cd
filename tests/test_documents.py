"""Documents packed into rows: each is read as if it stood alone; what positions may say, and what they may not."""

from typing import Any

import pytest
import torch
from tiny import LANDMARK, every_landmark, in_float64, ragged, random_ids, tiny_model
from tolerance import assert_as_accurate
from torch import Tensor
from transformers import DataCollatorWithFlattening

from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM, insert_landmarks
from landmark_llama.attention import WholeRows
from landmark_llama.rows import documents

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# of two rows; blocks are of four positions, 24 ordinary tokens fill the training context
LENGTHS = ((5, 1, 3, 17, 2, 24, 1), (1, 1, 7, 23, 8))
# each length by itself, what the model does, all in one
every_batching = pytest.mark.parametrize("call_scores", [0, documents.CALL_SCORES, 1 << 40])
both_speakers = pytest.mark.parametrize("predict_from_landmark", [False, True])


def texts() -> list[list[Tensor]]:
    return [[random_ids(n, seed=100 * i + j) for j, n in enumerate(row)] for i, row in enumerate(LENGTHS)]


def pack(rows: list[list[Tensor]], side: str = "right") -> dict[str, Tensor]:
    """A batch of rows of documents, padded on one side; the first token of each document is no label."""
    longest = max(sum(map(len, row)) for row in rows)

    def stack(of_document: Any, fill: int) -> Tensor:
        joined = [torch.cat([of_document(document) for document in row]) for row in rows]
        missing = [(0, longest - len(row)) for row in joined]
        return torch.stack(
            [
                torch.nn.functional.pad(row, pad if side == "right" else pad[::-1], value=fill)
                for row, pad in zip(joined, missing, strict=True)
            ]
        )

    return {
        "input_ids": stack(lambda x: x, 0),
        "attention_mask": stack(torch.ones_like, 0),
        "position_ids": stack(lambda x: torch.arange(len(x)), 0),
        "labels": stack(lambda x: torch.cat([x.new_tensor([-100]), x[1:]]), -100),
    }


def alone(model: LandmarkLlamaForCausalLM, rows: list[list[Tensor]]) -> Tensor:
    """Logits of all documents, each read in a row of its own, one after the other."""
    return torch.cat([model(document.unsqueeze(0)).logits[0] for row in rows for document in row])


def gradients(model: LandmarkLlamaForCausalLM) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@every_landmark
@every_batching
@both_speakers
@pytest.mark.parametrize("block_size", [2, 3, 4, 16])
def test_a_packed_document_has_the_logits_that_it_has_alone(
    landmark: dict, block_size: int, predict_from_landmark: bool, call_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CALL_SCORES", call_scores)
    window = {"block_size": block_size, "train_context_length": 48, "max_position_embeddings": 48}
    window |= {"num_retrieved_blocks": 1, "predict_from_landmark": predict_from_landmark, **landmark}
    model, rows = tiny_model(**window), texts()
    double = in_float64(model)
    for side in ("right", "left"):
        batch = pack(rows, side)
        real = batch["attention_mask"].bool()
        logits = double(**batch).logits
        assert logits.shape[:2] == real.shape and logits.isfinite().all()
        assert_as_accurate(logits[real], alone(model, rows), alone(double, rows))


@every_landmark
@every_batching
@both_speakers
def test_packed_documents_have_the_loss_and_the_gradients_that_they_have_alone(
    landmark: dict, predict_from_landmark: bool, call_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CALL_SCORES", call_scores)
    rows = texts()
    results = {}
    for name in ("packed", "plain", "reference"):
        model = tiny_model(**landmark, predict_from_landmark=predict_from_landmark).train()
        model = model if name == "plain" else in_float64(model).train()
        if name == "packed":
            loss = model(**pack(rows)).loss
        else:
            items = sum(len(document) - 1 for row in rows for document in row)
            ids = [document.unsqueeze(0) for row in rows for document in row if len(document) > 1]
            loss = sum(model(x, labels=x, num_items_in_batch=items).loss for x in ids)
        loss.backward()
        results[name] = loss.detach(), gradients(model)
    for packed, plain, reference in zip(*(results[name] for name in ("packed", "plain", "reference")), strict=True):
        assert_as_accurate(packed, plain, reference)


def test_rows_longer_than_the_training_context_train_where_their_documents_fit() -> None:
    model, rows = tiny_model().train(), texts()
    batch = pack(rows)
    assert batch["input_ids"].shape[1] > model.config.train_context_length
    model(**batch).loss.backward()
    assert gradients(model).isfinite().all() and gradients(model).any()


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**pack(texts())).loss.backward()
        results.append(gradients(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("changed", range(len(LENGTHS[0])))
def test_changing_one_document_changes_the_logits_of_no_other(changed: int) -> None:
    model, rows = tiny_model(), texts()
    before = model(**pack(rows)).logits
    rows[0][changed] = random_ids(len(rows[0][changed]), seed=999)
    after = model(**pack(rows)).logits
    same = (before == after).all(-1)
    begin = sum(LENGTHS[0][:changed])
    inside = torch.zeros_like(same)
    inside[0, begin : begin + LENGTHS[0][changed]] = True
    assert same[~inside].all() and not same[inside].all()


def test_embeddings_are_packed_as_ids_are() -> None:
    model, batch = tiny_model(), pack(texts(), "left")
    expected = model(**batch)
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    given = model(**batch, inputs_embeds=embeds)
    assert torch.equal(given.logits, expected.logits) and torch.equal(given.loss, expected.loss)


def test_layers_that_are_moved_at_each_call_read_packed_rows() -> None:
    from accelerate import cpu_offload

    expected, offloaded = tiny_model()(**pack(texts())).logits, tiny_model()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    torch.testing.assert_close(offloaded(**pack(texts())).logits, expected)


def test_logits_to_keep_and_hidden_states_of_packed_rows() -> None:
    model, batch = tiny_model(), pack(texts())
    output = model(**batch, output_hidden_states=True)
    assert torch.equal(model(**batch, logits_to_keep=3).logits, output.logits[:, -3:])
    states = output.hidden_states
    assert len(states) == 3 and all(x.shape[:2] == batch["input_ids"].shape for x in states)
    assert torch.equal(model.lm_head(states[-1]), output.logits)


def test_documents_may_hold_their_landmarks() -> None:
    model, rows = tiny_model(), texts()
    expected = model(**pack(rows))
    given = pack([[insert_landmarks(document, 4, LANDMARK) for document in row] for row in rows])
    output = model(**given)
    for row, lengths in enumerate(LENGTHS):
        # landmarks leave the row, which is then padded on the left
        kept = given["input_ids"].shape[1] - int((given["input_ids"][row] == LANDMARK).sum())
        logits = output.logits[row, -kept:][: sum(lengths)]
        torch.testing.assert_close(logits, expected.logits[row, : sum(lengths)])
    torch.testing.assert_close(output.loss, expected.loss)


def test_landmarks_are_regular_from_the_start_of_their_document() -> None:
    model = tiny_model()
    ids = torch.tensor([[8, 9, 8, 9, 10, LANDMARK]])
    model(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="row 0, position 5: a landmark token .* 3 ordinary tokens of a document"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="row 0, position 3: a landmark"):
        model(torch.tensor([[8, 9, 8, LANDMARK, 9]]), position_ids=torch.tensor([[0, 1, 2, 0, 1]]))


def test_what_transformers_collator_packs_is_read_document_by_document() -> None:
    rows = texts()
    model, features = tiny_model(), [{"input_ids": document.tolist()} for document in rows[0]]
    batch = DataCollatorWithFlattening()(features)
    assert batch["input_ids"].shape == (1, sum(LENGTHS[0])) and "attention_mask" not in batch
    expected = pack(rows[:1])
    expected.pop("attention_mask")
    output, by_hand = model(**batch), model(**expected)
    assert torch.equal(output.logits, by_hand.logits) and torch.equal(output.loss, by_hand.loss)


@pytest.mark.parametrize("length", [1, 20, 70])
@pytest.mark.parametrize("cached", [False, True])
def test_positions_that_only_count_on_change_nothing(length: int, cached: bool) -> None:
    model = tiny_model()
    batch = ragged([random_ids(length), random_ids((length + 1) // 2, seed=1)])
    expected = model(**batch, use_cache=cached).logits
    count = batch["attention_mask"].cumsum(1) - 1
    numbers = {
        "of columns, for all rows": torch.arange(length).unsqueeze(0),
        "from anywhere": torch.arange(5, 5 + length).repeat(2, 1),
        "of tokens, as generate counts them": count.masked_fill(count < 0, 0),
        "in another type": torch.arange(length, dtype=torch.int32).repeat(2, 1),
    }
    for name, position_ids in numbers.items():
        output = model(**batch, position_ids=position_ids, use_cache=cached)
        assert torch.equal(output.logits, expected), name


def test_hidden_columns_inside_a_document_may_be_counted_or_not() -> None:
    model, ids = tiny_model(), random_ids(1, 9)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 1, 1]])
    expected = model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 1, 9, 9, 2, 3, 9, 0, 1]])).logits
    given = model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 1, 0, 0, 4, 5, 0, 0, 1]])).logits
    assert torch.equal(given, expected)
    kept = model(ids[:, mask[0].bool()], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]])).logits
    torch.testing.assert_close(given[:, mask[0].bool()], kept)


def test_generate_takes_prompts_that_are_padded_on_the_right() -> None:
    # transformers would number what follows the padding from 1 again
    model, batch = tiny_model(), ragged([random_ids(14), random_ids(9, seed=1)])
    right = {name: torch.stack([x[0], x[1].roll(9)]) for name, x in batch.items()}
    cached, uncached = (model.generate(**right, do_sample=False, max_new_tokens=6, use_cache=x) for x in (True, False))
    assert torch.equal(cached, uncached)


def test_generate_takes_positions_that_count_on() -> None:
    model, ids = tiny_model(), random_ids(2, 40)
    expected = model.generate(ids, do_sample=False, max_new_tokens=6)
    for position_ids in (torch.arange(40).unsqueeze(0), torch.arange(40).repeat(2, 1)):
        assert torch.equal(model.generate(ids, position_ids=position_ids, do_sample=False, max_new_tokens=6), expected)
    with pytest.raises(ValueError, match="position_ids, row 0, column 30: a document begins"):
        model.generate(ids, position_ids=torch.arange(40).unsqueeze(0) % 30, max_new_tokens=6)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 1, 2, 3]], r"torch.int64 of shape \(1, 4\); expected integers .* \(2, 6\)"),
        ([[0, 1, 2, 3, 4, 5]] * 3, r"shape \(3, 6\)"),
        ([0, 1, 2, 3, 4, 5], r"shape \(6,\)"),
        ([[0.0, 1, 2, 3, 4, 5]], "torch.float32"),
        ([[False] * 6], "torch.bool"),
        ([[0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5, 6]], "row 1, column 3: 4 after 2; positions count on by one"),
        ([[0, 1, 2, 1, 2, 3]], "row 0, column 3: 1 after 2;"),
        ([[0, 1, 1, 2, 3, 4]], "row 0, column 2: 1 after 1;"),
        ([[0, 1, 0, 1, 1, 0], [0, 1, 2, 3, 5, 0]], "row 0, column 4: 1 after 1;"),
        ([[-1, 0, 1, 2, 3, 4]], "row 0, column 0: -1;"),
    ],
)
def test_wrong_positions_are_named_with_row_and_column(positions: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"position_ids.*{message}"):
        tiny_model()(random_ids(2, 6), position_ids=torch.tensor(positions))


def test_positions_of_padding_are_not_looked_at() -> None:
    mask, position_ids = torch.tensor([[0, 0, 1, 1, 1, 0]]), torch.tensor([[7, -3, 0, 1, 2, 9]])
    model, ids = tiny_model(), random_ids(1, 6)
    assert torch.equal(
        model(ids, attention_mask=mask, position_ids=position_ids).logits, model(ids, attention_mask=mask).logits
    )


def test_documents_do_not_go_together_with_a_cache() -> None:
    model, ids, restart = tiny_model(), random_ids(2, 6), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
    for cache in ({"use_cache": True}, {"past_key_values": LandmarkCache(model.config)}):
        with pytest.raises(ValueError, match="position_ids, row 1, column 3: a document begins .* cache"):
            model(ids, position_ids=restart, **cache)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="position_ids, row 0, column 0: a document begins .* cache"):
        model(ids, position_ids=torch.arange(6).unsqueeze(0), past_key_values=cache)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("training", [True, False])
def test_a_document_that_exceeds_the_training_context_is_named(training: bool) -> None:
    model, ids = tiny_model().train(training), random_ids(2, 40)
    position_ids = torch.stack([torch.arange(40) % 20, torch.cat([torch.arange(15), torch.arange(25)])])
    with pytest.raises(
        ValueError, match="position_ids, row 1, column 15: the document .* 33 landmarked .*train_context_length=32"
    ):
        model(ids, position_ids=position_ids)


def test_documents_share_a_call_of_attention_where_padding_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(*lengths: int) -> int:
        begins = torch.zeros(1, sum(lengths), dtype=torch.bool)
        begins[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
        real = torch.ones_like(begins)
        columns = sum(n + n // 15 for n in lengths)
        return len(documents.Documents.of(begins, real, columns, whole=WholeRows(16), longest=10_000).shapes)

    assert calls(*[20, 30, 17, 1] * 20) == 1
    assert calls(4000, 3900) == 2
    assert calls(4000, 10, 4000, 20, 30) == 2


def test_documents_may_be_told_by_their_ends_or_their_numbers() -> None:
    batch = pack(texts())
    model = tiny_model()
    by_positions = model(batch["input_ids"][:1], position_ids=batch["position_ids"][:1]).logits
    ends = torch.tensor([0, *LENGTHS[0]]).cumsum(0).int()
    assert torch.equal(model(batch["input_ids"][:1], cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits, by_positions)
    # a document of no column begins where the next one does
    assert torch.equal(
        model(batch["input_ids"][:1], cu_seq_lens_q=ends.repeat_interleave(2)[1:-1]).logits, by_positions
    )
    number = torch.repeat_interleave(torch.arange(len(LENGTHS[0])), torch.tensor(LENGTHS[0])).unsqueeze(0)
    assert torch.equal(model.model(batch["input_ids"][:1], seq_idx=number).last_hidden_state, model.model(
        batch["input_ids"][:1], position_ids=batch["position_ids"][:1]
    ).last_hidden_state)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 3, 8])}, "cu_seq_lens_q"),
        ({"seq_idx": torch.zeros(1, 7)}, "seq_idx"),
    ],
)
def test_ends_and_numbers_that_do_not_fit_the_row_are_refused(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        tiny_model()(random_ids(1, 8), **given)


def test_what_other_libraries_pass_to_any_model_changes_nothing() -> None:
    model, ids = tiny_model(), random_ids(1, 40)
    expected = model(ids).logits
    extras = {"token_type_ids": torch.zeros_like(ids), "cache_position": torch.arange(40)}
    assert torch.equal(model(ids, max_length_q=40, max_length_k=40, **extras).logits, expected)
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, **extras), tokens)
