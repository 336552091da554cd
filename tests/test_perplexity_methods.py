"""How a model is read for its perplexity: each way against another way of computing the same."""

import copy
from pathlib import Path

import pytest
import torch
from byte_models import POSITIONS, save_dense, save_landmark, some_ids
from tolerance import assert_as_accurate
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from eval_passkey.models import find_subject
from eval_passkey.prompts import InputError
from eval_perplexity import methods
from eval_perplexity.methods import Method, Scorer, nll_of_dense_model, nll_of_landmark_model
from landmark_llama import LandmarkCache, LandmarkLlamaForCausalLM


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def landmark(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_landmark(dense, tmp_path_factory.mktemp("landmark"))


def by_hand(logits: torch.Tensor, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """-log p of the last `scored` of `ids` (1, length + 1), added one by one in float64."""
    total = torch.zeros(1, dtype=torch.float64)
    for column in range(ids.shape[1] - 1 - scored, ids.shape[1] - 1):
        row = logits[0, column].double()
        total -= row[ids[0, column + 1]] - row.exp().sum().log()
    return total


def loss(function, *arguments) -> torch.Tensor:
    with torch.no_grad():
        return torch.tensor([function(*arguments)], dtype=torch.float64)


@torch.no_grad()
def logits_of(model, ids: torch.Tensor, **arguments) -> torch.Tensor:
    return model(ids[:, :-1], **arguments).logits


@pytest.mark.parametrize("scored", [1, 7, 40])
@pytest.mark.parametrize("piece", [1, 6, 1024])
def test_the_loss_of_a_dense_model_is_the_one_by_hand(scored, piece, dense, monkeypatch):
    monkeypatch.setattr(methods, "PIECE", piece)
    model, ids = LlamaForCausalLM.from_pretrained(dense), some_ids(1, 41)
    exact = copy.deepcopy(model).double()
    reference, plain = by_hand(logits_of(exact, ids), ids, scored), by_hand(logits_of(model, ids), ids, scored)
    assert_as_accurate(loss(nll_of_dense_model, exact, ids, scored), plain.float(), reference)


@pytest.mark.parametrize("length", [40, 200])
@pytest.mark.parametrize("local_attention", ["sliding", "chunked"])
def test_the_loss_of_a_landmark_model_is_its_own_with_and_without_streaming(length, local_attention, landmark):
    model = LandmarkLlamaForCausalLM.from_pretrained(landmark, local_attention=local_attention).eval()
    exact, ids = copy.deepcopy(model).double(), some_ids(1, length + 1)
    labels = ids.clone()
    labels[:, :-9] = -100
    with torch.no_grad():
        # the label of the last column, which is not read, is given as a column more
        own = model(ids[:, :-1], labels=labels).loss * 9
    reference, plain = by_hand(logits_of(exact, ids), ids, 9), by_hand(logits_of(model, ids), ids, 9)
    assert_as_accurate(loss(nll_of_landmark_model, exact, ids, 9), plain.float(), reference)
    torch.testing.assert_close(loss(nll_of_landmark_model, model, ids, 9).float()[0], own)


def test_padding_of_the_vocabulary_takes_no_probability(landmark):
    model, ids = LandmarkLlamaForCausalLM.from_pretrained(landmark).eval(), some_ids(1, 41)
    model.resize_token_embeddings(262)  # from 259
    model.config.num_padded_tokens = 3
    with torch.no_grad():
        own = model(ids[:, :-1], labels=ids).loss * 40
    torch.testing.assert_close(loss(nll_of_landmark_model, model, ids, 40).float()[0], own)


def test_streaming_gives_the_loss_of_one_forward_where_all_blocks_fit(dense, tmp_path):
    # 14 blocks, of which a query sees 2 retrieved ones and 11 before its own
    folder = save_landmark(dense, tmp_path / "wide", num_local_blocks=11, num_retrieved_blocks=2)
    model, ids = LandmarkLlamaForCausalLM.from_pretrained(folder).eval(), some_ids(1, 14 * 3 + 1)
    exact = copy.deepcopy(model).double()
    reference, plain = loss(nll_of_landmark_model, exact, ids, 20), loss(nll_of_landmark_model, model, ids, 20)
    streamed = loss(lambda: nll_of_landmark_model(exact, ids, 20, LandmarkCache(exact.config)))
    assert_as_accurate(streamed, plain.float(), reference)


def test_always_stream_reads_through_the_memory_what_fits(landmark):
    subject, ids = find_subject("--model", str(landmark), {}), some_ids(1, 41)
    whole, streamed = (
        Scorer("--model", subject, Method("landmark", always_stream=stream), "auto", "cpu").nll(ids, 40)
        for stream in (False, True)
    )
    assert whole != pytest.approx(streamed, rel=1e-4)  # 13 blocks, of which a query sees 2 + 3


def test_a_later_token_changes_no_loss_before_it(dense, landmark):
    for model in (LlamaForCausalLM.from_pretrained(dense), LandmarkLlamaForCausalLM.from_pretrained(landmark)):
        function = nll_of_landmark_model if isinstance(model, LandmarkLlamaForCausalLM) else nll_of_dense_model
        ids = some_ids(1, 151)
        other = ids.clone()
        other[0, -1] = (ids[0, -1] + 1) % 250 + 2
        both, one = (loss(function, model.double(), x, 2) for x in (ids, other))
        rest, same = (loss(function, model, x, 1) for x in (ids, other))
        torch.testing.assert_close(both - rest, one - same)


@pytest.mark.parametrize("window", [2, 5, 16])
@pytest.mark.parametrize("piece", [3, 1024])
def test_a_sliding_window_is_that_of_mistral(window, piece, dense, monkeypatch):
    monkeypatch.setattr(methods, "PIECE", piece)
    model, ids = LlamaForCausalLM.from_pretrained(dense), some_ids(1, 41)
    settings = {name: getattr(model.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    rope = dict(model.config.rope_parameters)
    mistral = MistralForCausalLM(MistralConfig(**settings, sliding_window=window, rope_parameters=rope)).eval()
    mistral.config.rms_norm_eps = model.config.rms_norm_eps
    for module in mistral.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = model.config.rms_norm_eps
    mistral.load_state_dict(model.state_dict())
    plain, reference = (by_hand(logits_of(x, ids), ids, 40) for x in (mistral, copy.deepcopy(mistral).double()))
    assert_as_accurate(loss(nll_of_dense_model, model.double(), ids, 40, window), plain.float(), reference)
    assert reference != pytest.approx(loss(nll_of_dense_model, model, ids, 40), rel=1e-4)


def test_a_window_as_long_as_the_text_is_dense(dense):
    model, ids = LlamaForCausalLM.from_pretrained(dense), some_ids(1, 41)
    exact = copy.deepcopy(model).double()
    plain, reference = (loss(nll_of_dense_model, x, ids, 40) for x in (model, exact))
    for window in (40, 41, 1000):
        assert_as_accurate(loss(nll_of_dense_model, exact, ids, 40, window), plain.float(), reference)


@pytest.mark.parametrize(("window", "sinks", "length"), [(5, 3, 40), (16, 1, 70), (9, 4, 13), (2, 8, 21)])
def test_sinks_stand_right_before_the_window_as_if_nothing_were_between(window, sinks, length, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "PIECE", 1)
    # in one layer a token's output depends on what it sees alone: the first tokens and the last, one after the other
    model = LlamaForCausalLM.from_pretrained(save_dense(tmp_path), num_hidden_layers=1)
    exact, ids = copy.deepcopy(model).double(), some_ids(1, length + 1)

    def of_what_is_seen(model) -> torch.Tensor:
        first, last = ids[:, :sinks], ids[:, max(sinks, length - window) : length]
        seen = torch.cat([first, last, ids[:, -1:]], dim=1)
        return by_hand(logits_of(model, seen), seen, 1)

    reference, plain = of_what_is_seen(exact), of_what_is_seen(model)
    assert_as_accurate(loss(nll_of_dense_model, exact, ids, 1, window, sinks), plain.float(), reference)
    assert reference != pytest.approx(loss(nll_of_dense_model, exact, ids, 1, window), rel=1e-4) or length < window


@pytest.mark.parametrize("piece", [3, 7, 1024])
def test_sinks_are_seen_beside_the_window_in_every_layer(piece, dense, monkeypatch):
    monkeypatch.setattr(methods, "PIECE", piece)
    model, ids, window, sinks = LlamaForCausalLM.from_pretrained(dense), some_ids(1, 41), 6, 4
    query, key = torch.arange(40).unsqueeze(1), torch.arange(40)
    seen = (key <= query) & ((key > query - window) | (key < sinks))

    def masked(model) -> torch.Tensor:
        mask = torch.zeros(1, 1, 40, 40, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        return by_hand(logits_of(model, ids, attention_mask=mask), ids, scored)

    scored = 40
    exact = copy.deepcopy(model).double()
    if piece == 1024:  # sinks are where they are while the first piece is read
        reference, plain = masked(exact), masked(model)
        assert_as_accurate(loss(nll_of_dense_model, exact, ids, scored, window, sinks), plain.float(), reference)
    else:  # another place of theirs, and the same tokens: the loss of no token changes with one that it does not see
        one, other = ids.clone(), ids.clone()
        other[0, 10] = (ids[0, 10] + 1) % 250 + 2
        losses = [loss(nll_of_dense_model, exact, x, 40 - 10 - 2 * window, window, sinks) for x in (one, other)]
        torch.testing.assert_close(*losses)  # two layers reach back two windows
        changed = ids.clone()
        changed[0, 1] = (ids[0, 1] + 1) % 250 + 2
        assert loss(nll_of_dense_model, exact, changed, 3, window, sinks) != pytest.approx(
            loss(nll_of_dense_model, exact, ids, 3, window, sinks), rel=1e-6
        )


def test_a_window_with_sinks_as_long_as_the_text_is_dense(dense):
    model, ids = LlamaForCausalLM.from_pretrained(dense), some_ids(1, 41)
    exact = copy.deepcopy(model).double()
    plain, reference = (loss(nll_of_dense_model, x, ids, 40) for x in (model, exact))
    assert_as_accurate(loss(nll_of_dense_model, exact, ids, 40, 36, 4), plain.float(), reference)


def scored_by(method: Method, folder: Path, ids: torch.Tensor, dtype: str = "auto") -> torch.Tensor:
    scorer = Scorer("--baseline", find_subject("--baseline", str(folder), {}), method, dtype, "cpu")
    return loss(scorer.nll, ids, 30)


@pytest.mark.parametrize(("given", "factor"), [(None, 3.125), (2.0, 2.0)])
def test_interpolation_divides_the_positions(given, factor, dense):
    ids = some_ids(1, 201)
    model = LlamaForCausalLM.from_pretrained(dense)
    position = torch.arange(200).unsqueeze(0) / factor
    plain, reference = (
        by_hand(logits_of(x, ids, position_ids=position), ids, 30) for x in (model, copy.deepcopy(model).double())
    )
    assert_as_accurate(
        scored_by(Method("interpolation", factor=given), dense, ids, "float64"), plain.float(), reference
    )


def test_yarn_is_that_of_transformers(dense):
    ids = some_ids(1, 201)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 3.125, "original_max_position_embeddings": POSITIONS}
    model = LlamaForCausalLM.from_pretrained(dense, rope_parameters=rope)
    assert scored_by(Method("yarn"), dense, ids) == loss(nll_of_dense_model, model, ids, 30)
    assert scored_by(Method("yarn"), dense, ids) != scored_by(Method("dense"), dense, ids)


def test_ntk_divides_the_slowest_frequency_and_leaves_the_fastest(dense):
    config = find_subject("--baseline", str(dense), {}).config
    plain, scaled = (
        LlamaForCausalLM(c).model.rotary_emb.inv_freq for c in (config, Method("ntk").configuration(config, 4.0))
    )
    torch.testing.assert_close(scaled[-1] * 4, plain[-1])
    assert scaled[0] == plain[0]
    ids = some_ids(1, 201)
    assert scored_by(Method("ntk"), dense, ids) != scored_by(Method("dense"), dense, ids)


@pytest.mark.parametrize("name", methods.SCALED)
def test_inside_the_trained_positions_nothing_is_scaled_unless_a_factor_is_given(name, dense):
    ids = some_ids(1, POSITIONS + 1)
    assert scored_by(Method(name), dense, ids) == scored_by(Method("dense"), dense, ids)
    assert scored_by(Method(name, factor=2.0), dense, ids) != scored_by(Method("dense"), dense, ids)


def test_the_weights_are_read_anew_for_another_factor_only(dense, monkeypatch):
    factors = []
    real = methods.load_model

    def counting(option, subject, dtype, device):
        factors.append(subject.config.rope_parameters.get("factor", 1.0))
        return real(option, subject, dtype, device)

    monkeypatch.setattr(methods, "load_model", counting)
    scorer = Scorer("--baseline", find_subject("--baseline", str(dense), {}), Method("yarn"), "auto", "cpu")
    for length in (20, POSITIONS, 2 * POSITIONS, 2 * POSITIONS, 4 * POSITIONS):
        scorer.nll(some_ids(1, length + 1), 5)
    assert factors == [1.0, 2.0, 4.0]


def test_no_more_logits_are_held_than_those_of_one_piece(dense, landmark, monkeypatch):
    monkeypatch.setattr(methods, "PIECE", 16)
    ids, columns = some_ids(1, 101), []
    models = (LlamaForCausalLM.from_pretrained(dense), LandmarkLlamaForCausalLM.from_pretrained(landmark))
    for model, function in zip(models, (nll_of_dense_model, nll_of_landmark_model), strict=True):
        model.lm_head.register_forward_hook(lambda module, inputs, output: columns.append(output.shape[1]))
        loss(function, model, ids, 40)
        assert max(columns) <= 16 and 40 <= sum(columns) <= 40 + 100 // 16
        columns.clear()


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_a_choice_of_blocks_that_looks_ahead_is_refused(granularity, landmark):
    subject = find_subject("--model", str(landmark), {"retrieval_granularity": granularity})
    with pytest.raises(InputError, match=f"retrieval_granularity='{granularity}' looks at later tokens"):
        Scorer("--model", subject, Method("landmark"), "auto", "cpu")


def test_positions_that_are_scaled_already_are_not_scaled_again(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    subject = find_subject("--baseline", str(save_dense(tmp_path / "scaled", rope_parameters=rope)), {})
    Scorer("--baseline", subject, Method("dense"), "auto", "cpu")
    with pytest.raises(InputError, match="yarn scales plain rotary positions, and this model has 'linear'"):
        Scorer("--baseline", subject, Method("yarn"), "auto", "cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_read_with_its_weights_and_its_landmark_row(tied, tmp_path):
    from test_adapters import IDS, make_base, train_adapter

    model = train_adapter(make_base(tmp_path / "base", tie_word_embeddings=tied), tmp_path / "adapter")
    ids = IDS[:1]
    subject = find_subject("--model", str(tmp_path / "adapter"), {})
    loaded = Scorer("--model", subject, Method("landmark"), "auto", "cpu")
    with torch.no_grad():
        own = model(ids[:, :-1], labels=ids).loss * (ids.shape[1] - 1)
    torch.testing.assert_close(loss(loaded.nll, ids, ids.shape[1] - 1).float()[0], own)
