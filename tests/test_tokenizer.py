"""data/tokenizer.py: its tokens are SentencePiece's own, decode to the text, and no text is too long or too odd."""

import functools
import io
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import caseops  # noqa: E402
import tokenizer  # noqa: E402
from test_prepare import NASTY, PIECES, naive_bytes, story  # noqa: E402

examples = functools.partial(settings, deadline=None, derandomize=True, database=None)
SCRIPTS = [
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश",
    "いろはにほへと ちりぬるを わかよたれそ",
    "視野無限廣，窗外有藍天。",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "ང་རང་ཨེ་ཤེལ་ནས།",
    "ᚠᛇᚻ᛫ᛒᛦᚦ",
    "𝒯𝒽𝑒 𐐀𐐁 𓀀𓁐",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇭 ☕️ 🫠",
    "".join(map(chr, range(0x20))),
    "a\x7f\x80\x9f\u200b\u200d\u202e\u2066b\u2028\u2029",
    "Z̸̧͎a̷l̵͈g̶̜o",
    "Ĳ ﬃ ǅ İ ı ſ ẞ",
    "\ufeff\ufffe\uffff\U0010ffff",
    "  ▁▁ ▁a▁ ▁",
    "\ue001\ue004 Mc\ue003Donald's \ue002",
]


def trained(with_caseops=False, **changes):
    """A Codec of a small model, as `train_tokenizer` or with other options."""
    texts = [story(seed) for seed in range(40)] + SCRIPTS
    if not changes:
        return tokenizer.Codec(tokenizer.train_tokenizer(texts, 700, with_caseops)[0], with_caseops=with_caseops)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\0", "").replace("▁", " ") for text in texts),
        model_writer=model,
        **{
            "vocab_size": 1000,
            "pad_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "unk_id": 3,
            "byte_fallback": True,
            "model_type": "bpe",
            "minloglevel": 3,
            **changes,
        },
    )
    return tokenizer.Codec(model.getvalue())


MODELS = {
    "ours": {},
    "caseops": {"with_caseops": True},
    "normalizing": {"normalization_rule_name": "nmt_nfkc"},
    "normalizing, spaces kept": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False},
    "no space in front": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "no space in front, trimming": {"add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
}
BPE = [name for name in MODELS if name != "unigram"]


@pytest.fixture(scope="module")
def codecs():
    return functools.cache(lambda name: trained(**MODELS[name]))


WORDS = st.lists(st.sampled_from([*PIECES, *NASTY, *SCRIPTS, "ba", "komi", "The", "MITU", "reTu", " the"]), min_size=1)
TEXTS = st.one_of(st.text(min_size=1), WORDS.map("".join), WORDS.map(" ".join), st.text("ab \n▁\ue004AB", min_size=1))


def check(codec, text, naive=True):
    """The codec's tokens by SentencePiece's own decoder, and the score's own count of bytes."""
    ids = codec.encode(text)
    if ids is None:
        return None
    decoded = codec.processor.decode(ids[1:].tolist())
    assert (caseops.decode(decoded) if codec.operators else decoded) == text
    assert codec.token_bytes(ids).sum() == len(text.encode())
    if naive and not codec.operators:
        assert naive_bytes(codec.processor, ids.tolist()) == len(text.encode())
    return ids.tolist()


@pytest.mark.parametrize("name", BPE)
@examples(max_examples=100)
@given(text=TEXTS)
@example(text=" a")
@example(text="a ")
@example(text="a  b")
def test_tokens_are_sentencepieces_own(codecs, name, text):
    """Also where it is dropped: then SentencePiece loses it, or its bytes can't be counted."""
    codec = codecs(name)
    ids = check(codec, text)
    written = caseops.encode(text) if codec.operators else text
    if "▁" in text:
        return
    plain = codec.processor.encode(written)
    if ids is None:
        lost = codec.processor.decode(plain) != written
        assert lost or naive_bytes(codec.processor, [1, *plain]) != len(text.encode())
    else:
        assert ids == [1, *plain]


@examples(max_examples=100)
@given(text=TEXTS)
def test_unigram_models_are_exact_too(codecs, text):
    codec = codecs("unigram")
    assert not codec.ranked and check(codec, text) is not None
    codec.cache.clear()
    again = check(codec, text)
    assert again == check(codec, text)


@pytest.mark.parametrize("name", ["ours", "caseops"])
@pytest.mark.parametrize("text", [*SCRIPTS, *NASTY], ids=lambda text: f"U+{ord(text[0]):04X}")
def test_every_script_round_trips(codecs, name, text):
    assert check(codecs(name), text) is not None


@pytest.mark.parametrize("name", list(MODELS))
@examples(max_examples=50)
@given(text=TEXTS, limit=st.integers(12, 60))
def test_parts_of_a_document_are_the_document(codecs, name, text, limit):
    codec = codecs(name)
    with pytest.MonkeyPatch.context() as patch:
        whole = check(codec, text * 3)
        patch.setattr(tokenizer, "SEGMENT_CHARACTERS", limit)
        patch.setattr(tokenizer, "SEARCHED_CHARACTERS", limit // 2)
        parts = [part for part, _ in codec.segments(text * 3)]
        assert "".join(parts) == text * 3 and all(0 < len(part) <= limit for part in parts)
        cut = check(codec, text * 3)
    if whole is None:
        return
    spaced = all(part[0] == " " for part in parts[1:])
    assert cut is not None or codec.operators and not spaced
    if spaced and name in BPE:
        assert cut == whole


@pytest.mark.parametrize("name", ["ours", "caseops"])
def test_a_document_is_parted_where_no_piece_reaches_over(codecs, name, monkeypatch):
    """Without a single space: at the ends of pieces, so that the tokens stay SentencePiece's own."""
    codec = codecs(name)
    text = "".join(SCRIPTS).replace(" ", "").replace("▁", "") + "Windows95,XP;iPhone" * 9
    whole = check(codec, text)
    monkeypatch.setattr(tokenizer, "SEGMENT_CHARACTERS", 70)
    monkeypatch.setattr(tokenizer, "SEARCHED_CHARACTERS", 50)
    assert len(list(codec.segments(text))) > 5 and check(codec, text) == whole


@pytest.mark.parametrize("name", ["ours", "caseops"])
def test_few_words_are_remembered(codecs, name, monkeypatch):
    """What is looked up, what has been forgotten, and in which order texts come, changes no token."""
    codec = codecs(name)
    texts = [story(seed).title() for seed in range(30)] + [*SCRIPTS, "x" * 70, "x" * 70 + " " + "y" * 70]
    expected = [check(codec, text) for text in texts]
    monkeypatch.setattr(tokenizer, "CACHED_WORDS", 20)
    for seed in range(3):
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        assert all(check(codec, texts[number]) == expected[number] for number in order)
        assert len(codec.cache) <= 20
    assert max(map(len, codec.cache), default=0) <= tokenizer.CACHED_WORD_CHARACTERS


LONG = {
    "words": lambda size: (story(1, 4000) + "\n") * (size // 20_000),
    "letter": lambda size: "x" * size,
    "capital": lambda size: "X" * size,
    "space": lambda size: " " * size,
    "mark": lambda size: "▁" * (size // 3),
    "nul": lambda size: "\0" * size,
    "emoji": lambda size: "👩‍👩‍👧‍👦🫠" * (size // 30),
    "chinese": lambda size: "視野無限廣" * (size // 15),
    "digit": lambda size: "7" * size,
    "operator": lambda size: "\ue004" * (size // 3),
    "mixed": lambda size: "aB" * (size // 2),
}


@pytest.mark.parametrize("name", ["ours", "caseops"])
@pytest.mark.parametrize("kind", list(LONG))
def test_long_lines_of_one_kind(codecs, name, kind):
    """Several segments; bench/prepare_speed.py takes 100 MB. CaseOps can't part endless capitals: they are dropped."""
    text = LONG[kind](600_000)
    assert len(list(codecs(name).segments(text))) >= 2 or kind in ("mark", "operator", "emoji", "chinese")
    ids = check(codecs(name), text, naive=False)
    assert (ids is None) == (name == "caseops" and kind in ("capital", "mixed"))


def test_training_is_deterministic():
    texts = [story(seed) for seed in range(40)] + SCRIPTS
    first, options = tokenizer.train_tokenizer(texts, 700)
    assert tokenizer.train_tokenizer(iter(texts), 700) == (first, options)
    assert options["sample_documents"] == len(texts)
    assert options["sample_bytes"] == sum(len(text.encode()) for text in texts)
    # The pieces don't depend on the number of threads, which is an option in the model file.
    given = {key: value for key, value in options.items() if "sample" not in key and key != "removed_characters"}
    pieces = []
    for threads in (1, 3):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([story(seed) for seed in range(40)]),
            model_writer=model,
            minloglevel=3,
            **{**given, "vocab_size": 320, "num_threads": threads},
        )
        made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces.append([(made.id_to_piece(n), made.get_score(n)) for n in range(320)])
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_what_a_signal_raises_in_the_training_is_not_an_error_of_sentencepiece(kind, monkeypatch):
    class Rare(dict):
        """A table of rare characters whose use raises, once the training has begun."""

        uses = 0

        def __missing__(self, key):
            self.uses += 1
            if self.uses > 200:  # beyond the first look at the text
                raise kind
            raise LookupError

    monkeypatch.setattr(tokenizer, "_rare_characters", lambda *_: Rare())
    with pytest.raises(kind):
        tokenizer.train_tokenizer(["the river and the stone were not far from here"] * 20, 290)
