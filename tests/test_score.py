"""Bits per byte: the formula, and that the bytes of tokens are the bytes of their text."""

import math

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import config, examples, make_documents, train_tokenizer

# Any text that SentencePiece gives back: U+2581 is its sign for a space, and a zero byte ends its strings.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\u2581\u0000"), max_size=60)
PIECES = ["the", "river", "  ", "\n", "\t", "Å", "e\u0301", "日本", "🙂", "a", "12345", " ", ".", "“"]
PROSE = st.lists(st.sampled_from(PIECES), max_size=20).map("".join)


@pytest.fixture(scope="module")
def vocabulary(data):
    return tg.Vocabulary(config(DATA_PATH=data))


def test_the_formula():
    score = tg.Score(nats=8 * math.log(2) * 100, tokens=50, bytes=200)
    assert score.bpb == pytest.approx(4.0, rel=1e-15)
    assert score.loss == pytest.approx(16 * math.log(2), rel=1e-15)
    assert str(score) == f"val_loss:{16 * math.log(2):.4f} val_bpb:4.0000"


def test_a_uniform_guess_of_bytes_costs_eight_bits():
    assert tg.Score(1000 * math.log(256), 1000, 1000).bpb == pytest.approx(8.0, rel=1e-15)


def test_nothing_scored_is_not_a_number():
    assert math.isnan(tg.Score(0.0, 0, 0).bpb) and math.isnan(tg.Score(0.0, 0, 0).loss)


def text_bytes(vocabulary, documents):
    """Bytes of the targets of a stream of documents."""
    ids = np.array([t for text in documents for t in (tg.BOS_ID, *vocabulary.model.encode(text))], dtype=np.uint16)
    return int(vocabulary.target_bytes(ids[:-1], ids[1:]).sum())


@examples(max_examples=300)
@given(st.lists(TEXT | PROSE, min_size=1, max_size=4))
def test_bytes_of_tokens_are_the_bytes_of_the_text(vocabulary, documents):
    assume(all(vocabulary.model.decode(vocabulary.model.encode(text)) == text for text in documents))
    assert text_bytes(vocabulary, documents) == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   x",
        "a  b",
        "\n\n",
        "naïve café",
        "日本語",
        "🙂🙂",
        "1999 12 345",
        "\t tab",
        "x" * 500,
        " leading",
        "trailing ",
        "\u00a0",
        "\x7f\x01",
    ],
)
def test_bytes_of_chosen_texts(vocabulary, text):
    assert text_bytes(vocabulary, [text, text]) == 2 * len(text.encode())


def test_bytes_of_the_validation_text(vocabulary, validation_texts):
    assert text_bytes(vocabulary, validation_texts) == sum(len(t.encode()) for t in validation_texts) > 10_000


def test_the_bytes_of_each_kind_of_piece(vocabulary):
    model = vocabulary.model
    wide = np.arange(model.vocab_size())

    def bytes_after(previous, target):
        return int(vocabulary.target_bytes(np.array([previous]), np.array([target]))[0])

    for special in range(4):  # pad, bos, eos, unk
        assert bytes_after(50, special) == 0
    byte, letter = model.piece_to_id("<0xE2>"), model.piece_to_id("e")
    marked = next(i for i in wide.tolist() if model.id_to_piece(i) == "\u2581the")
    assert bytes_after(letter, byte) == 1 and bytes_after(tg.BOS_ID, byte) == 1
    assert bytes_after(letter, letter) == 1
    assert bytes_after(letter, marked) == 4 and bytes_after(byte, marked) == 4
    for special in range(4):  # the space that SentencePiece puts before a text is no byte of it
        assert bytes_after(special, marked) == 3
    pieces = {i: model.id_to_piece(i) for i in wide.tolist() if not model.is_byte(i)}
    multibyte = [i for i, piece in pieces.items() if not piece.isascii() and "\u2581" not in piece]
    assert multibyte and all(bytes_after(letter, i) == len(model.id_to_piece(i).encode()) for i in multibyte)


def test_bytes_are_summed_without_overflow(vocabulary):
    """70,000 tokens of the longest piece: more than 16 bits hold."""
    longest = int(np.argmax(vocabulary.width))
    ids = np.full(70_001, longest, np.uint16)
    total = int(vocabulary.target_bytes(ids[:-1], ids[1:]).sum())
    assert total == 70_000 * len(vocabulary.model.id_to_piece(longest).replace("\u2581", " ").encode()) > 2**16


def test_a_tokenizer_with_other_ids_is_refused(tmp_path):
    model = tmp_path / "other.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the river and the stone"] * 20),
        model_prefix=str(tmp_path / "other"),
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        bos_id=0,
        eos_id=1,
        unk_id=2,
        pad_id=-1,
        minloglevel=3,
        num_threads=1,
    )
    with pytest.raises(tg.ConfigError, match="its BOS is 0"):
        tg.Vocabulary(config(VOCAB_SIZE=280, TOKENIZER_PATH=model))


def test_the_size_of_the_vocabulary_must_be_the_tokenizers(tmp_path):
    (tmp_path / "small.model").write_bytes(train_tokenizer(["the river and the stone"] * 20, 290))
    assert len(tg.Vocabulary(config(VOCAB_SIZE=290, TOKENIZER_PATH=tmp_path / "small.model")).width) == 290
    with pytest.raises(tg.ConfigError, match="VOCAB_SIZE=289: .* 290 tokens"):
        tg.Vocabulary(config(VOCAB_SIZE=289, TOKENIZER_PATH=tmp_path / "small.model"))


def test_another_tokenizer_than_the_artifacts_is_refused(data, tmp_path):
    digest = tg.Vocabulary(config(DATA_PATH=data)).digest
    assert tg.Vocabulary(config(DATA_PATH=data, TOKENIZER_SHA256=digest)).digest == digest
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(make_documents(77, 300)))
    with pytest.raises(tg.ConfigError, match="^TOKENIZER_SHA256=.*other.model is another tokenizer"):
        tg.Vocabulary(config(DATA_PATH=data, TOKENIZER_PATH=other, TOKENIZER_SHA256=digest))
