"""Trains a small SentencePiece tokenizer in LLaMA's way, and saves it as a Hugging Face tokenizer folder.

    python finetune/demo/tokenizer.py --data runs/corpus/train.jsonl --output runs/tokenizer --vocabulary_size 1536

LLaMA's way: byte-pair pieces, unknown characters as bytes, white space kept as it is, `<unk> <s> </s>` as ids 0, 1, 2,
`<s>` in front of a text and no `</s>` behind it. Digits stand in pairs (LLaMA 2 has single ones, LLaMA 3 up to three a
piece): copied digit by digit a number repeats itself after a step or two, and a tiny model loses its place.
"""

import argparse
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"  # how SentencePiece writes a space
DIGIT_PAIRS = [f"{pair:02d}" for pair in range(100)]


def train_sentencepiece(texts: Iterable[str], vocabulary_size: int) -> sentencepiece.SentencePieceProcessor:
    """Trains the pieces on the texts' lines. One thread and no sampling: the same texts give the same pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary_size,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=DIGIT_PAIRS,  # taken from a number's start on, whatever stands around it
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def to_fast_tokenizer(
    processor: sentencepiece.SentencePieceProcessor, model_max_length: int
) -> PreTrainedTokenizerFast:
    """The same pieces as a fast tokenizer that gives SentencePiece's own ids.

    Args:
        processor: a byte-pair SentencePiece model of `train_sentencepiece`.
        model_max_length: positions of the model it is for, in tokens.
    """
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    bpe = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=list(_merges(pieces, processor)),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]{1,2}"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", processor.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def _merges(pieces: list[str], processor: sentencepiece.SentencePieceProcessor) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two pieces, in the order in which SentencePiece learned the pieces."""
    mergeable = {
        piece
        for i, piece in enumerate(pieces)
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    }
    # Learned pieces come in order of their score; single characters stand behind them and are made by no merge.
    for piece in pieces:
        if piece in mergeable:
            splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            yield from (pair for pair in splits if mergeable.issuperset(pair))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL files with a `text` field")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer")
    parser.add_argument("--vocabulary_size", type=int, default=1536)
    parser.add_argument("--model_max_length", type=int, default=512, help="in tokens")
    parser.add_argument("--max_documents", type=int, default=8000, help="how many documents to learn from")
    options = parser.parse_args()
    rows = (line for path in options.data for line in path.open(encoding="utf-8"))
    texts = (json.loads(row)["text"] for row, _ in zip(rows, range(options.max_documents), strict=False))
    processor = train_sentencepiece(texts, options.vocabulary_size)
    to_fast_tokenizer(processor, options.model_max_length).save_pretrained(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
