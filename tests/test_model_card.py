"""The model card: what it says, and that nobody's README is overwritten."""

from pathlib import Path

from huggingface_hub import ModelCard

from landmark_llama.model_card import CARD, is_own_card, model_card, write_card
from tests.tiny import tiny_config, tiny_model


def test_a_saved_model_has_a_card_that_tells_its_window(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.library_name == "transformers" and card.data.license is None and card.data.base_model is None
    for told in (
        "24 tokens (32 positions", "3 tokens and a landmark", "2 blocks (`token_and_head`)", "4 blocks before its own",
        "pip install landmark-llama", "id 7",
    ):  # fmt: skip
        assert told in card.text


def test_a_card_names_base_licence_data_and_results_but_no_path(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("---\nlicense: apache-2.0\n---\nThe base.\n")
    data = [str(tmp_path / "books.jsonl"), "somebody/corpus"]
    text = model_card(tiny_config(), base=str(tmp_path), data=data, results={"perplexity": 7.5})
    assert str(tmp_path) not in text and "base_model" not in text
    assert "license: apache-2.0\n" in text and "books.jsonl, " in text and "| perplexity | 7.5 |" in text
    assert "base_model: somebody/base\n" in model_card(tiny_config(), base="somebody/base")


def test_a_readme_that_somebody_wrote_or_edited_stays(tmp_path: Path) -> None:
    path = tmp_path / CARD
    write_card(tmp_path, "first")
    write_card(tmp_path, "second")
    assert path.read_text().startswith("second\n") and is_own_card(path)
    for own in (path.read_text().replace("second", "mine"), path.read_text() + "more\n", "mine", ""):
        path.write_text(own)
        tiny_model().save_pretrained(tmp_path)
        assert path.read_text() == own and not is_own_card(path)
