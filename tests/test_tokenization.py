"""Inserting and stripping landmarks, and the coordinates that follow."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from landmark_llama import add_landmark_token, insert_landmarks, strip_landmarks
from landmark_llama.tokenization import landmarked_length, landmarked_position, plain_length


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def insert_by_hand(ids: list[int], block_size: int, landmark: int) -> list[int]:
    result = []
    for count, token in enumerate(ids, start=1):
        result.append(token)
        if count % (block_size - 1) == 0:
            result.append(landmark)
    return result


@pytest.mark.parametrize("block_size", [2, 3, 4, 16, 51])
def test_a_landmark_follows_every_block_of_ordinary_tokens_and_goes_again(block_size: int) -> None:
    for length in (0, 1, 2, 3, 15, 16, 49, 50, 51, 100, 153):
        plain = list(range(100, 100 + length))
        landmarked = insert_landmarks(plain, block_size, 5)
        assert landmarked == insert_by_hand(plain, block_size, 5)
        assert len(landmarked) == landmarked_length(length, block_size)
        assert strip_landmarks(landmarked, block_size, 5) == plain
        for token in range(length):
            assert landmarked[landmarked_position(token, block_size)] == plain[token]
        for positions in range(len(landmarked) + 1):
            assert plain_length(positions, block_size) == sum(token != 5 for token in landmarked[:positions])


def test_lists_stay_lists_and_tensors_stay_tensors_of_their_shape_and_type() -> None:
    ids = torch.arange(10, 34, dtype=torch.int32).view(2, 3, 4)
    landmarked = insert_landmarks(ids, 3, 7)
    assert landmarked.shape == (2, 3, 6) and landmarked.dtype == torch.int32
    assert landmarked[1, 2].tolist() == insert_landmarks(ids[1, 2].tolist(), 3, 7) == [30, 31, 7, 32, 33, 7]
    assert torch.equal(strip_landmarks(landmarked, 3, 7), ids)
    assert isinstance(insert_landmarks([1, 2], 3, 7), list)


def test_coordinates_of_tensors_are_those_of_their_numbers() -> None:
    numbers = torch.arange(60)
    for function in (landmarked_position, landmarked_length, plain_length):
        assert function(numbers, 7).tolist() == [function(number, 7) for number in range(60)]


@pytest.mark.parametrize(
    ("landmarked", "row", "position"),
    [
        ([[1, 2, 7, 3, 7]], 0, 4),  # too early
        ([[1, 2, 7], [1, 2, 3]], 1, 2),  # missing
        ([[7, 1, 2]], 0, 0),
        ([[1, 2, 7, 7]], 0, 3),  # twice
    ],
)
def test_a_landmark_in_the_wrong_place_is_named(landmarked: list[list[int]], row: int, position: int) -> None:
    with pytest.raises(ValueError, match=f"row {row}, position {position}"):
        strip_landmarks(torch.tensor(landmarked), 3, 7)


def test_landmarks_are_not_inserted_twice() -> None:
    with pytest.raises(ValueError, match="row 1, position 2"):
        insert_landmarks(torch.tensor([[1, 2, 3], [1, 2, 7]]), 4, 7)


@pytest.mark.parametrize("function", [insert_landmarks, strip_landmarks])
def test_a_block_without_an_ordinary_token_is_refused(function) -> None:
    with pytest.raises(ValueError, match="block_size=1"):
        function([1, 2], 1, 7)


def test_the_landmark_token_is_special_added_once_and_leaves_the_others_alone(tmp_path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    before = tokenizer.get_vocab()
    landmark = add_landmark_token(tokenizer)
    assert add_landmark_token(tokenizer) == landmark == len(before)
    assert tokenizer.get_vocab() == before | {"<landmark>": landmark}
    assert {landmark, tokenizer.convert_tokens_to_ids("<user>")} <= set(tokenizer.all_special_ids)
    ids = tokenizer("a <landmark> b")["input_ids"]
    assert landmark in ids and tokenizer.decode(ids, skip_special_tokens=True).split() == ["a", "b"]
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert add_landmark_token(loaded) == landmark and len(loaded) == len(tokenizer)


def test_another_name_for_the_landmark_token() -> None:
    tokenizer = word_tokenizer()
    assert tokenizer.convert_ids_to_tokens(add_landmark_token(tokenizer, "<memory>")) == "<memory>"


def test_with_its_landmark_a_tokenizer_calls_no_text_too_long(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 4
    add_landmark_token(tokenizer)
    assert len(tokenizer("a b a b a").input_ids) == 5 and not caplog.records
    assert tokenizer.model_max_length > 10**12
