"""What needles are hidden in: a text of the user's, cut between clauses, to an exact number of tokens."""

import random
from pathlib import Path

import pytest
from prompt_tokenizers import byte_level_tokenizer, sentencepiece_like_tokenizer

from eval_passkey.haystack import Filler, TextHaystack, read_texts
from eval_passkey.prompts import Encoder, InputError

TEXT = "Herons wait, as ever; no fish comes.\n\n  Was it always so?\tNobody can tell! Later, they flew away. " * 3


@pytest.fixture(scope="module", params=[sentencepiece_like_tokenizer, byte_level_tokenizer])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(request.param())


def said(encoder: Encoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(encoder.encode("\n") + ids)[1:]


def test_the_pieces_have_the_asked_number_of_tokens_and_are_the_text_in_order(encoder):
    haystack = TextHaystack(encoder, TEXT, "herons")
    words = " ".join(TEXT.split())
    for room in (0, 1, 7, 40, 200, 3000):
        for cuts in ([], [0.5], [0.0, 0.2, 0.2, 0.9, 1.0]):
            pieces = haystack.split(room, cuts, random.Random(room), first=False)
            assert len(pieces) == len(cuts) + 1 and sum(map(len, pieces)) == room
            whole = said(encoder, [token for piece in pieces for token in piece])
            assert whole.strip() in " ".join([words] * 20)
            assert pieces[0] == [] or cuts[:1] != [0.0]
            assert pieces[-1] == [] or cuts[-1:] != [1.0]


def test_needles_stand_between_clauses_near_the_asked_depth(encoder):
    haystack = TextHaystack(encoder, TEXT, "herons")
    for seed in range(30):
        rng = random.Random(seed)
        cut = rng.uniform(0.1, 0.9)
        before, after = haystack.split(2000, [cut], rng, first=False)
        assert said(encoder, before)[-1] in ",;.?!" and said(encoder, after)[0] == " "
        assert len(before) / 2000 == pytest.approx(cut, abs=0.05)


def test_prompts_begin_at_different_places_of_the_text(encoder):
    haystack = TextHaystack(encoder, TEXT, "herons")
    starts = {tuple(haystack.split(20, [], random.Random(seed), first=False)[0]) for seed in range(30)}
    assert len(starts) > 4


def test_a_text_without_any_clause_is_cut_anywhere(encoder):
    haystack = TextHaystack(encoder, "na " * 5000, "song")
    pieces = haystack.split(1000, [0.25, 0.5], random.Random(0), first=False)
    assert [len(piece) for piece in pieces] == [250, 250, 500]


def test_the_filler_is_said_from_its_beginning_in_each_piece(encoder):
    pieces = Filler(encoder, "Rain falls. Snow, too.").split(300, [0.5], random.Random(0), first=False)
    assert len(pieces[0]) == len(pieces[1]) == 150 and pieces[0] == pieces[1]
    assert encoder.tokenizer.decode(encoder.encode("a") + pieces[0]).startswith("a\nRain falls. Snow, too. Rain")


def test_texts_are_joined_in_order_and_the_same_text_is_the_same_haystack(encoder, tmp_path: Path):
    (tmp_path / "a.txt").write_text("One.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("\ufeffTwo é.\r\n".encode())
    text = read_texts([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    haystack = TextHaystack(encoder, text, "ab")
    assert said(encoder, haystack.ids).strip() == "One. Two é."
    assert haystack.describe() == TextHaystack(encoder, text, "elsewhere").describe()
    assert haystack.describe() != TextHaystack(encoder, text + "Three.", "ab").describe()


def test_what_is_no_text_is_refused_by_name(encoder, tmp_path: Path):
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    for name in ("picture", "nowhere"):
        with pytest.raises(InputError, match=f"^--haystack .*{name}: cannot be read as a text in UTF-8"):
            read_texts([str(tmp_path / name)])
    with pytest.raises(InputError, match="^--haystack blank: holds no text"):
        TextHaystack(encoder, " \n\t ", "blank")


def test_a_long_filler_is_made_of_what_a_short_one_repeats_and_equals_the_tokenised_text(encoder):
    for sentences in ("Rain falls. Snow, too.", "na", "Herons wait, as ever; no fish comes."):
        asked = []

        class Counting:
            def encode(self, text: str, first: bool = False, asked=asked) -> list[int]:
                asked.append(len(text))
                return encoder.encode(text, first)

        got = Filler(Counting(), sentences).split(20_011, [], random.Random(0), first=False)[0]
        assert got == encoder.encode("\n" + " ".join([sentences] * 20_011))[:20_011]
        assert max(asked) <= 50 * (len(sentences) + 1)
