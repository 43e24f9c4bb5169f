"""Preparing data: exact round trips and bytes, the split, the files' format, and that a failure leaves nothing."""

import contextlib
import errno
import fcntl
import hashlib
import json
import lzma
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
import caseops  # noqa: E402
import corpus  # noqa: E402
import prepare  # noqa: E402
import processes  # noqa: E402
import shards  # noqa: E402
import sources  # noqa: E402
import tokenizer  # noqa: E402
from helpers import audit_of  # noqa: E402

SYLLABLES = [
    "ba",
    "ko",
    "mi",
    "tu",
    "re",
    "sa",
    "no",
    "li",
    "wen",
    "dor",
    "fa",
    "gu",
    "pel",
    "ish",
    "an",
    "or",
    "ta",
    "vi",
    "qua",
    "ze",
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
]


def story(seed, words=120):
    """A text of made-up words, the same for the same seed."""
    generator = random.Random(seed)
    known = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 3))) for _ in range(60)]
    text = " ".join(generator.choice(known) + generator.choice(["", "", ",", ".", ".\n", "\n\n"]) for _ in range(words))
    return text + f" {seed}"


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def model():
    """A tokenizer trained on stories: (bytes, codec)."""
    data, _ = prepare.train_tokenizer([story(seed) for seed in range(40)], 320)
    return data, prepare.Codec(data)


@pytest.fixture
def source(tmp_path):
    """A .jsonl file of 60 stories."""
    return write_jsonl(tmp_path / "stories.jsonl", [story(seed) for seed in range(60)])


def refused(result, *fragments):
    """Exit code 2, and one line on stderr that holds the fragments."""
    code, out, err = result
    message = err.splitlines()[-1] if err else ""
    assert code == 2 and out == "" and "Traceback" not in err
    assert message.startswith("prepare.py: error: ")
    assert all(str(fragment) in message for fragment in fragments), message
    return True


def options(*sources, out, **changes):
    values = {"vocab_size": 320, "quiet": True, **changes}
    return prepare.Options(tuple(str(item) for item in sources), Path(out), **values)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != prepare.UNFINISHED}


def documents_of(folder, manifest, split):
    """Texts decoded from the shards, by nothing but SentencePiece and the format's description."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "tokenizer.model"))
    texts = []
    for shard in manifest["splits"][split]["shards"]:
        ids = shards.read_shard(Path(folder) / shard["file"])
        starts = np.flatnonzero(ids == 1)
        assert len(ids) == 0 or starts[0] == 0
        texts += [processor.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])]
    return texts


def chained(texts):
    """A split's `documents_sha256`."""
    chain = bytes(32)
    for text in texts:
        chain = hashlib.sha256(chain + hashlib.sha256(text.encode()).digest()).digest()
    return chain.hex()


def naive_bytes(processor, ids):
    """The score's rule for bytes, written as it is said."""
    total = 0
    for before, number in zip([None, *ids[:-1]], ids, strict=True):

        def silent(piece):
            return processor.is_control(piece) or processor.is_unknown(piece) or processor.is_unused(piece)

        if processor.is_byte(number):
            total += 1
        elif not silent(number):
            piece = processor.id_to_piece(number)
            total += len(piece.removeprefix("▁").encode())
            total += piece.startswith("▁") and before is not None and not silent(before)
    return total


# ------------------------------------------------------------------------------------------------------- round trip


PIECES = [
    "▁",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\0",
    "\t",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<0x0A>",
    "<0xE2>",
    "ba",
    "the",
    "\ue000",
    "\ue001",
    "\uf8ff",
    "\ufffe",
    "\uffff",
    "\u2585",
    "\u2047",
    " \u2047 ",
    "\ufffd",
    "\ufeff",
    "e\u0301",
    "é",
    "字",
    "😀",
    "\U0010ffff",
    "12",
    "\x7f",
    "\x85",
    "\u2028",
    "\u00a0",
    "\u3000",
]
TEXTS = st.one_of(
    st.text(min_size=1),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join),
    st.text(alphabet="▁ \ue000\ue001a", min_size=1),
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_every_text_round_trips_with_exact_bytes(model, text):
    _, codec = model
    ids = codec.encode(text)
    assert ids.dtype == np.uint16 and ids[0] == tokenizer.BOS and not set(ids[1:].tolist()) & {0, 1, 2, 3}
    assert codec.processor.decode(ids[1:].tolist()) == text
    assert naive_bytes(codec.processor, ids.tolist()) == codec.token_bytes(ids).sum() == len(text.encode())


def test_every_character_round_trips(model):
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    blocks = ["".join(map(chr, points[start : start + 512])) for start in range(0, len(points), 512)]
    assert all(model[1].encode(block) is not None for block in blocks)


def test_a_literal_space_mark_is_written_as_its_bytes(model):
    _, codec = model
    ids = codec.encode("\ue000a▁b ▁")
    marks = [codec.processor.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
    assert sum(ids[i : i + 3].tolist() == marks for i in range(len(ids))) == 2
    everything = "".join(map(chr, [*range(0x800, 0xD800), *range(0xE000, 0x10000)]))
    ids = codec.encode(everything)
    assert codec.processor.decode(ids[1:].tolist()) == everything
    assert codec.token_bytes(ids).sum() == len(everything.encode())


def test_pieces_of_a_trained_tokenizer(model):
    data, codec = model
    processor = codec.processor
    pieces = [processor.id_to_piece(number) for number in range(320)]
    assert pieces[:4] == ["<pad>", "<s>", "</s>", "<unk>"] and len(set(pieces)) == 320
    assert pieces[4:260] == [f"<0x{value:02X}>" for value in range(256)]
    assert not any("▁" in piece[1:] for piece in pieces)
    assert not any(re.search(r"\d.|.\d", piece) for piece in pieces[260:])
    assert any("\n" in piece for piece in pieces)
    assert data == prepare.train_tokenizer([story(seed) for seed in range(40)], 320)[0]


def test_sample_with_characters_that_the_trainer_reserves():
    texts = [f"▁{story(seed)}\0\u2585 <s>" for seed in range(30)]
    _, codec = prepare.Codec, prepare.Codec(prepare.train_tokenizer(texts, 320)[0])
    assert codec.vocab_size == 320 and all(codec.encode(text) is not None for text in texts)


def test_more_characters_than_the_vocabulary_holds():
    generator = random.Random(0)
    texts = ["".join(chr(0x4E00 + int(abs(generator.gauss(0, 900)))) for _ in range(300)) for _ in range(20)]
    data, made = prepare.train_tokenizer(texts, 400)
    codec = prepare.Codec(data)
    assert made["removed_characters"] > 500 and codec.vocab_size == 400
    assert all(codec.encode(text) is not None for text in texts)


def train(**changes):
    made = {
        "model_type": "bpe",
        "vocab_size": 330,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "byte_fallback": True,
        "minloglevel": 3,
        **changes,
    }
    path = made.pop("path")
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([story(seed) + "    four  two" for seed in range(40)]), model_writer=file, **made
        )
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_id": -1, "bos_id": 2, "eos_id": 1, "unk_id": 0}, "they must have (0, 1, 2, 3)"),
        ({"byte_fallback": False, "vocab_size": 200}, "lacks byte pieces"),
        ({"user_defined_symbols": ["a▁b"]}, "not in front"),
    ],
)
def test_tokenizers_that_cannot_be_scored_are_refused(tmp_path, source, command, changes, message):
    path = train(path=tmp_path / "given.model", **changes)
    assert refused(command(source, "--out", tmp_path / "out", "--tokenizer", path), f"--tokenizer {path}", message)
    assert not (tmp_path / "out").exists()


def test_given_tokenizer_is_used_and_inexact_documents_are_dropped(tmp_path, command):
    path = train(path=tmp_path / "given.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=False)
    texts = [" ".join(story(seed).split()) for seed in range(40)]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "ﬁ becomes fi and is lost", "half a pair \ud800", ""])
    code, out, _ = command(source, "--out", tmp_path / "out", "--tokenizer", path, "--val-fraction", "0.2", "--quiet")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert code == 0 and "dropped: 2 documents" in out
    assert manifest["dropped_documents"] == 2 and manifest["empty_documents"] == 1
    assert manifest["tokenizer"]["vocab_size"] == 330 == manifest["options"]["vocab_size"]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == path.read_bytes()
    kept = [text for split in ("train", "val") for text in documents_of(tmp_path / "out", manifest, split)]
    assert sorted(kept) == sorted(texts)


# ------------------------------------------------------------------------------------------------ what is written


def test_shards_and_manifest_agree_with_the_text(tmp_path, source):
    out = tmp_path / "out"
    manifest, before = prepare.prepare(options(source, out=out, shard_tokens=700, val_fraction=0.2))
    assert not before and manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["source"][0]["path"] == str(source)
    assert set(manifest["created_with"]) >= {"python", "sentencepiece", "numpy"}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert hashlib.sha256((out / "tokenizer.model").read_bytes()).hexdigest() == manifest["tokenizer"]["sha256"]
    listed, everything = {"tokenizer.model", "manifest.json"}, []
    for split, entry in manifest["splits"].items():
        for number, shard in enumerate(entry["shards"]):
            assert shard["file"] == f"fineweb_{split}_{number:06d}.bin"
            listed.add(shard["file"])
            raw = (out / shard["file"]).read_bytes()
            header = struct.unpack("<256i", raw[:1024])
            assert header == (20240520, 1, shard["tokens"]) + (0,) * 253
            ids = struct.unpack(f"<{shard['tokens']}H", raw[1024:])
            assert ids.count(1) == shard["documents"] and ids[0] == 1
            assert naive_bytes(processor, ids) == shard["bytes"]
            assert hashlib.sha256(raw).hexdigest() == shard["sha256"]
            assert shard["tokens"] <= 700
        for key in ("documents", "tokens", "bytes"):
            assert entry[key] == sum(shard[key] for shard in entry["shards"])
        texts = documents_of(out, manifest, split)
        assert entry["bytes"] == len("".join(texts).encode())
        assert entry["documents_sha256"] == chained(texts)
        everything += texts
    assert len(manifest["splits"]["train"]["shards"]) > 3
    assert listed == set(contents(out))
    assert sorted(everything) == sorted(story(seed) for seed in range(60))


def test_the_manifest_holds_the_audit_of_its_shards(tmp_path, source, command):
    out = tmp_path / "out"
    manifest, _ = prepare.prepare(options(source, out=out, shard_tokens=700, caseops=True))
    listed = [row for split in manifest["splits"].values() for row in (*split["shards"], *split.get("sidecars", ()))]
    assert manifest["audit"] == audit_of(out)
    assert manifest["audit"]["sha256"] == {row["file"]: row["sha256"] for row in listed} and len(listed) > 4
    # A folder from before there were audits gets its own when it is asked for again.
    old = {key: value for key, value in manifest.items() if key != "audit"}
    (out / "manifest.json").write_text(json.dumps(old))
    assert prepare.prepare(options(source, out=out, shard_tokens=700, caseops=True)) == (manifest, True)
    assert json.loads((out / "manifest.json").read_text()) == manifest


def test_a_shard_that_the_disk_has_changed_ends_the_preparation(tmp_path, source, command, monkeypatch):
    out, original = tmp_path / "out", prepare.write_shards

    def write_shards(*arguments):
        splits = original(*arguments)
        path = out / prepare.UNFINISHED / "fineweb_train_000000.bin"
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        return splits

    monkeypatch.setattr(prepare, "write_shards", write_shards)
    result = command(source, "--out", out, "--vocab-size", 320, "--quiet")
    assert refused(result, "fineweb_train_000000.bin", "was changed after its SHA-256 was taken")
    assert not out.exists() or not list(out.iterdir())
    monkeypatch.undo()
    assert command(source, "--out", out, "--vocab-size", 320, "--quiet")[0] == 0


def test_a_document_is_never_parted_by_a_shards_end(tmp_path, source):
    manifest, _ = prepare.prepare(options(source, out=tmp_path / "out", shard_tokens=1))
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) > 40 and {shard["documents"] for shard in shards} == {1}


def test_reference_compressors(tmp_path, source):
    manifest, _ = prepare.prepare(options(source, out=tmp_path / "out", val_fraction=0.5))
    text = "".join(documents_of(tmp_path / "out", manifest, "val")).encode()
    expected = {"xz -9": lzma.compress(text, preset=9), "zstd -22": zstandard.compress(text, 22)}
    assert manifest["reference_bytes"] == len(text)
    assert manifest["reference_compressors"] == {
        name: pytest.approx(8 * len(packed) / len(text), abs=1e-4) for name, packed in expected.items()
    }


def test_output_does_not_depend_on_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 2000)
    source = write_jsonl(tmp_path / "a.jsonl", [story(seed) for seed in range(60)] + ["", "▁ and \ue000"])
    for workers in (1, 2):
        prepare.prepare(options(source, out=tmp_path / str(workers), workers=workers, shard_tokens=900))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_sources_of_all_kinds_in_a_stable_order(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    texts = [story(seed) for seed in range(5)]
    (folder / "b" / "one.txt").write_text(texts[0])
    (folder / "b" / "notes.csv").write_text("not read")
    write_jsonl(folder / "a.jsonl", [texts[1]], "body")
    line = json.dumps({"body": texts[2]}).encode()
    packed = zstandard.compress(b"\xef\xbb\xbf" + line[:20]) + zstandard.compress(line[20:] + b"\r\n \r\n" + line)
    (folder / "c.jsonl.zst").write_bytes(packed)
    alone = tmp_path / "alone.txt"
    alone.write_bytes("\ufefffirst\r\nsecond\u0085".encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    made = options(alone, folder, tmp_path / "empty.txt", out=tmp_path / "out", text_field="body")
    assert list(prepare.Sources(made)) == ["first\r\nsecond\u0085", texts[1], texts[0], texts[2], texts[2]]
    names = [Path(name).name for name, _ in prepare.list_files(made.sources)]
    assert names == ["alone.txt", "a.jsonl", "one.txt", "c.jsonl.zst", "empty.txt"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(alphabet="ab \n字😀", max_size=300), limit=st.integers(4, 40))
def test_cut_text_is_whole(text, limit, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"cut-{os.getpid()}.txt"
    path.write_bytes(text.encode())
    pieces = list(sources.read_texts(path, limit, "text"))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= limit for piece in pieces)


def test_cuts_prefer_blank_lines_then_lines_then_spaces():
    assert prepare.cut(b"aaaa bbb\n\ncc\nd e f g", 16) == len(b"aaaa bbb\n\n")
    assert prepare.cut(b"aaaa bbbb cc\nd e f g", 16) == len(b"aaaa bbbb cc\n")
    assert prepare.cut(b"aaaa bbbb cc d e f g", 16) == len(b"aaaa bbbb cc d ")
    assert prepare.cut("字".encode() * 9, 16) == 15


def test_a_large_text_file_is_read_in_little_memory(tmp_path):
    path = tmp_path / "large.txt"
    line = (story(1, 30).replace("\n", " ") + "\n").encode()
    with open(path, "wb") as file:
        for _ in range(20_000_000 // len(line)):
            file.write(line)
    tracemalloc.start()
    try:
        digest, count = hashlib.sha256(), 0
        for text in sources.read_texts(path, 32 << 10, "text"):
            digest.update(text.encode())
            count += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert 600 < count < 1300 and peak < 1 << 20


def test_one_text_file_is_enough(tmp_path, command):
    source = tmp_path / "book.txt"
    source.write_text("".join(story(seed) for seed in range(200)))
    code, out, _ = command(source, "--out", tmp_path / "out", "--vocab-size", 300, "--max-document-bytes", 2000)
    assert code == 0 and "val: " in out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    sizes = [entry["bytes"] for entry in manifest["splits"].values()]
    assert min(sizes) > 0 and sum(sizes) == source.stat().st_size


# ------------------------------------------------------------------------------------------------------------ split


def test_equal_documents_share_a_side(tmp_path):
    texts = [story(seed, 20) for seed in range(50)]
    one = write_jsonl(tmp_path / "one.jsonl", texts)
    two = write_jsonl(tmp_path / "two.jsonl", texts[::-1])
    manifest, _ = prepare.prepare(options(one, two, out=tmp_path / "out", val_fraction=0.3))
    train_texts, val_texts = (documents_of(tmp_path / "out", manifest, split) for split in ("train", "val"))
    assert not set(train_texts) & set(val_texts)
    assert len(train_texts) + len(val_texts) == 100 and 10 < len(val_texts) < 50
    again, _ = prepare.prepare(options(one, two, out=tmp_path / "seed", val_fraction=0.3, seed=1))
    assert set(documents_of(tmp_path / "seed", again, "val")) != set(val_texts)


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_each_side_has_a_document(tmp_path, fraction):
    source = write_jsonl(tmp_path / "a.jsonl", [story(seed, 200) for seed in range(3)])
    manifest, _ = prepare.prepare(options(source, out=tmp_path / "out", val_fraction=fraction, vocab_size=300))
    assert sorted(entry["documents"] for entry in manifest["splits"].values()) == [1, 2]


def test_tokenizer_never_sees_validation_text(tmp_path, source):
    made = options(source, out=tmp_path / "out", val_fraction=0.3, sample_bytes=16000)
    texts = sources.Sources(made)
    found, sample = prepare.survey(texts, made)
    assert found.documents == 60 and len(sample) > 5 and sum(len(text.encode()) + 256 for text in sample) <= 16000
    splitter = sources.Splitter(found.threshold, {})
    sides = {text: splitter.side(sources.text_hash(text.encode(), 0)) for text in texts}
    assert {sides[text] for text in sample} == {"train"} and set(sides.values()) == {"train", "val"}
    # The sample depends on the texts, not on their order.
    write_jsonl(source, [story(seed) for seed in reversed(range(60))])
    assert prepare.survey(sources.Sources(made), made)[1] == sample


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.permutations(range(12)), st.lists(st.integers(1, 3000), min_size=12, max_size=12), st.integers(500, 9000))
def test_the_sample_is_what_fits_of_the_largest_hashes(order, sizes, limit):
    sample = prepare.Sample(limit)
    for number in (*order, *order[::-1]):
        sample.add(number, b"x" * sizes[number])
    largest = min(1 << 20, limit - 256)
    expected, held = [], 0
    for number in range(11, -1, -1):
        held += min(sizes[number], largest) + 256
        if held > limit:
            break
        expected.insert(0, "x" * min(sizes[number], largest))
    assert sample.texts(sources.Splitter(0, {})) == expected


def test_groups_are_on_one_side_and_large_ones_train():
    documents = [corpus.Document(f"n{i}", story(i, 10), f"g{i % 40}" if i < 200 else "large") for i in range(400)]
    chosen = sources.validation_groups(documents, 0.1, 0)
    share = sum(len(d.text) for d in documents if d.group in chosen) / sum(len(d.text) for d in documents)
    assert "large" not in chosen and 0.07 < share <= 0.1
    assert sources.validation_groups(documents, 0.1, 1) != chosen
    assert len(sources.validation_groups(documents, 1e-9, 0)) == 1
    assert "large" not in sources.validation_groups(documents, 1e-9, 0)
    assert sources.validation_groups(documents[:1], 0.5, 0) == set()


def test_builtin_split_shares_no_passage(tmp_path):
    manifest, _ = prepare.prepare(options("builtin:networkx", out=tmp_path / "out", vocab_size=1024))
    train_texts, val_texts = (documents_of(tmp_path / "out", manifest, split) for split in ("train", "val"))

    def windows(texts):
        for text in texts:
            words = re.findall(r"\w+", text.lower())
            yield from (tuple(words[i : i + 30]) for i in range(len(words) - 29))

    assert not set(windows(train_texts)) & set(windows(val_texts))
    entry = manifest["splits"]["val"]
    assert 0.03 < entry["bytes"] / (entry["bytes"] + manifest["splits"]["train"]["bytes"]) <= 0.05
    described = manifest["source"][0]
    assert set(described["builtin"]) == {"networkx"} and described["documents"] == len(train_texts) + len(val_texts)
    # Shuffled: a document's neighbours are not its neighbours in the package.
    ranks = {d.text: i for i, d in enumerate(corpus.gather(["networkx"]).documents)}
    order = [ranks[text] for text in train_texts]
    assert sum(abs(a - b) == 1 for a, b in zip(order, order[1:], strict=False)) < 0.05 * len(order)


def test_builtin_beside_files(tmp_path):
    copied = corpus.gather(["networkx"]).documents[:40]
    source = write_jsonl(tmp_path / "copies.jsonl", [document.text for document in copied])
    manifest, _ = prepare.prepare(options(source, "builtin:networkx", out=tmp_path / "out", val_fraction=0.3))
    train_texts, val_texts = (documents_of(tmp_path / "out", manifest, split) for split in ("train", "val"))
    assert not set(train_texts) & set(val_texts)
    assert manifest["source"][0]["path"] == str(source) and "builtin" in manifest["source"][1]


# ------------------------------------------------------------------------------------------- again, other, replaced


def test_the_same_again_is_recognized(tmp_path, source, command):
    out = tmp_path / "out"
    arguments = (source, "--out", out, "--vocab-size", 320)
    assert command(*arguments)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    code, printed, err = command(*arguments, "--workers", 2)
    assert code == 0 and printed.startswith("already prepared\n") and err == ""
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert command(*arguments, "--force")[0] == 0
    assert before["manifest.json"] != (out / "manifest.json").stat().st_mtime_ns


def test_a_lost_or_cut_file_is_made_again(tmp_path, source, command):
    out = tmp_path / "out"
    arguments = (source, "--out", out, "--vocab-size", 320)
    command(*arguments)
    before = contents(out)
    (out / "fineweb_val_000000.bin").unlink()
    (out / "tokenizer.model").write_bytes(b"cut")
    code, printed, _ = command(*arguments)
    assert code == 0 and "already" not in printed and contents(out) == before


def test_other_options_or_sources_need_force(tmp_path, source, command):
    out = tmp_path / "out"
    arguments = (source, "--out", out, "--vocab-size", 320, "--shard-tokens", 500)
    command(*arguments)
    before = contents(out)
    (out / "notes.md").write_text("a user's own file")
    assert refused(command(*arguments[:-1], 600), "shard_tokens 500 there, 600 asked", "--force", out)
    os.utime(source, (1, 1))
    assert refused(command(*arguments), "changed sources", "--force", out)
    assert {**before, "notes.md": b"a user's own file"} == contents(out)
    code, _, _ = command(source, "--out", out, "--vocab-size", 300, "--force")
    assert code == 0
    assert set(contents(out)) == {
        "tokenizer.model",
        "manifest.json",
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
        "notes.md",
    }


@pytest.mark.parametrize(
    "name", ["fineweb_train_000007.bin", "fineweb_val_000000.bin", "tokenizer.model", "fineweb_val_bytes_000000.bin"]
)
def test_files_of_others_are_not_touched(tmp_path, source, command, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"someone's")
    for force in ([], ["--force"]):
        assert refused(command(source, "--out", out, "--vocab-size", 320, *force), out / name, "move it")
    assert contents(out) == {name: b"someone's"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"format": 1, "options": {}, "fingerprint": "", "splits": [], "tokenizer": {"file": 1, "bytes": 1}}',
        '{"format": 1}',
        '{"format": 2, "splits": {}}',
        json.dumps(
            {
                "format": 1,
                "options": {},
                "fingerprint": "",
                "splits": {},
                "tokenizer": {"file": "../precious", "bytes": 1},
            }
        ),
    ],
)
def test_a_manifest_of_others_is_not_touched(tmp_path, source, command, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(text)
    assert refused(command(source, "--out", out, "--force"), "manifest.json: not a manifest of this program")
    assert contents(out) == {"manifest.json": text.encode()}


# ---------------------------------------------------------------------------------------------------------- caseops


NASTY = [
    "\ue001",
    "\ue004\ue004\ue002Ab",
    "ESC \ue004",
    "▁ THE ▁The ",
    "A\ud7ffB \uf8ff",
    "ıİ ß ﬁ e\u0301 É",
    "🙂 I\n\n",
    "X" * 3000,
    "\0 iPhone\r\n",
    " ",
    "\ue003" * 99,
    "The THE the tHe McDonald's",
]


def check_caseops(out, expected, dropped=0):
    """What --caseops wrote stands for the expected texts: tokens, sidecars, manifest, by the formats' description."""
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["options"]["caseops"] is True and manifest["dropped_documents"] == dropped
    assert "sidecars" not in manifest["splits"]["train"]
    split, found = manifest["splits"]["val"], []
    for number, (shard, sidecar) in enumerate(zip(split["shards"], split["sidecars"], strict=True)):
        assert sidecar["file"] == f"fineweb_val_bytes_{number:06d}.bin"
        raw = (out / sidecar["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == sidecar["sha256"]
        assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, shard["tokens"]) + (0,) * 253
        counts = np.frombuffer(raw[1024:], "<u2").astype(int)
        starts = np.flatnonzero(shards.read_shard(out / shard["file"]) == 1)
        assert len(counts) == shard["tokens"] == sidecar["tokens"] and not counts[starts].any()
        assert (
            {key: shard[key] for key in ("documents", "bytes")}
            == {"documents": len(starts), "bytes": counts.sum()}
            == {key: sidecar[key] for key in ("documents", "bytes")}
        )
        found += [part.sum() for part in np.split(counts, starts[1:])]
    texts = {side: [caseops.decode(text) for text in documents_of(out, manifest, side)] for side in ("train", "val")}
    assert found == [len(text.encode()) for text in texts["val"]] and sum(found) == split["bytes"]
    assert split["documents_sha256"] == chained(texts["val"])
    assert sorted(texts["train"] + texts["val"]) == sorted(expected)
    assert set(prepare.manifest_files(manifest)) | {"manifest.json"} == set(contents(out))
    return manifest


def test_caseops_of_nasty_documents(tmp_path, monkeypatch, command):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 2000)
    texts = [f"{nasty} {number} {story(number, 20).title()}" for number in range(12) for nasty in NASTY] + NASTY
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "", "half a pair \ud800"])
    for workers in (1, 2):
        code, printed, _ = command(
            source,
            "--out",
            tmp_path / str(workers),
            "--caseops",
            "--vocab-size",
            320,
            "--val-fraction",
            0.4,
            "--shard-tokens",
            3000,
            "--workers",
            workers,
            "--quiet",
        )
        assert code == 0 and "VOCAB_SIZE=320 CASEOPS_ENABLED=1 " in printed
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    manifest = check_caseops(tmp_path / "1", texts, dropped=1)
    assert len(manifest["splits"]["val"]["sidecars"]) > 2
    assert manifest["tokenizer"]["options"]["user_defined_symbols"] == list(caseops.OPERATORS.values())


def test_caseops_of_builtin(tmp_path):
    made = options("builtin:networkx", out=tmp_path / "case", vocab_size=512, caseops=True)
    manifest, before = prepare.prepare(made)
    assert not before and prepare.prepare(made) == (manifest, True)
    check_caseops(tmp_path / "case", [document.text for document in corpus.gather(["networkx"]).documents])
    plain, _ = prepare.prepare(options("builtin:networkx", out=tmp_path / "plain", vocab_size=512))
    for split in ("train", "val"):  # The split and all figures of the text are those of the plain preparation.
        for key in ("bytes", "documents_sha256"):
            assert plain["splits"][split][key] == manifest["splits"][split][key]
    assert plain["reference_compressors"] == manifest["reference_compressors"]


def test_caseops_folders_are_recognized_completed_and_replaced(tmp_path, source, command):
    out = tmp_path / "out"
    plain = (source, "--out", out, "--vocab-size", 320)
    assert command(*plain)[0] == 0
    assert refused(command(*plain, "--caseops"), "caseops False there, True asked", "--force")
    assert command(*plain, "--caseops", "--force")[0] == 0
    before = contents(out)
    assert "fineweb_val_bytes_000000.bin" in before and command(*plain, "--caseops")[1].startswith("already prepared")
    (out / "fineweb_val_bytes_000000.bin").write_bytes(b"cut")
    assert command(*plain, "--caseops")[0] == 0 and contents(out) == before
    assert refused(command(*plain), "caseops True there, False asked", "--force")
    assert command(*plain, "--force")[0] == 0 and "fineweb_val_bytes_000000.bin" not in contents(out)


def test_caseops_with_a_given_tokenizer(tmp_path, command):
    path = train(
        path=tmp_path / "given.model",
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=False,
        vocab_size=334,
        user_defined_symbols=list(caseops.OPERATORS.values()),
    )
    texts = [" ".join(story(seed).split()).title() for seed in range(40)]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "ﬁ Becomes fi and is lost"])
    code, _, _ = command(source, "--out", tmp_path / "out", "--caseops", "--tokenizer", path, "--val-fraction", 0.2)
    assert code == 0 and (tmp_path / "out" / "tokenizer.model").read_bytes() == path.read_bytes()
    check_caseops(tmp_path / "out", texts, dropped=1)


@pytest.mark.parametrize(
    ("changes", "symbol"),
    [
        ({}, "U+E001 (TITLE)"),
        ({"user_defined_symbols": ["\ue001", "\ue002", "\ue004"]}, "U+E003 (CAPNEXT)"),
        ({"user_defined_symbols": [*caseops.OPERATORS.values(), "\ue002a"]}, "U+E002 (ALLCAPS)"),
        ({"control_symbols": list(caseops.OPERATORS.values())}, "U+E001 (TITLE)"),
    ],
)
def test_tokenizers_without_the_operators_are_refused(tmp_path, source, command, changes, symbol):
    path = train(path=tmp_path / "given.model", **changes)
    result = command(source, "--out", tmp_path / "out", "--caseops", "--tokenizer", path)
    assert refused(result, f"--tokenizer {path}: --caseops needs the user-defined symbol {symbol}, in no other piece")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- errors


def damaged_zst(text):
    return zstandard.compress(text)[:-9]


GOOD = (json.dumps({"text": "good"}) + "\n").encode()


@pytest.mark.parametrize(
    ("name", "data", "fragments"),
    [
        ("a.txt", b"good\n\xff", ["a.txt: not UTF-8 at byte offset 5"]),
        ("a.txt", b"x" * 40000 + b"\xc3", ["a.txt: not UTF-8 at byte offset 40000"]),
        ("a.txt", b"", ["no text"]),
        ("a.txt", b"one document", ["only one distinct document"]),
        ("a.jsonl", GOOD + b"{", ["a.jsonl:2: not JSON"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl:1: not JSON"]),
        ("a.jsonl", GOOD + b"\n" + b'{"body": "x"}', ['a.jsonl:3: no text in field "text"']),
        ("a.jsonl", b'{"text": 1}', ["a.jsonl:1: no text in field"]),
        ("a.jsonl", b'["text"]', ["a.jsonl:1: no text in field"]),
        ("a.jsonl", GOOD + b'{"text": "\xff"}', ["a.jsonl:2: not UTF-8 at byte offset 27"]),
        ("a.jsonl.zst", damaged_zst(GOOD * 500), ["a.jsonl.zst: damaged zstd file: it ends too early"]),
        ("a.jsonl.zst", b"not zstd at all", ["a.jsonl.zst: damaged zstd file"]),
        (
            "a.csv",
            b"a,b",
            ["a.csv: unknown kind of file; allowed are .txt, .md, .rst, .jsonl (each also .gz, .zst, .xz)"],
        ),
    ],
)
def test_bad_input_is_named(tmp_path, command, name, data, fragments):
    path = tmp_path / name
    path.write_bytes(data)
    assert refused(command(path, "--out", tmp_path / "new" / "out"), *fragments)
    assert sorted(item.name for item in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--vocab-size", "299"], ["--vocab-size", "299", "from 300 to 65,535"]),
        (["--vocab-size", "65536"], ["--vocab-size", "65536", "from 300 to 65,535"]),
        (["--vocab-size", "many"], ["--vocab-size", "many", "whole number"]),
        (["--val-fraction", "0"], ["--val-fraction", "between 0 and 1"]),
        (["--val-fraction", "1"], ["--val-fraction", "between 0 and 1"]),
        (["--val-fraction", "nan"], ["--val-fraction", "nan", "between 0 and 1"]),
        (["--shard-tokens", "0"], ["--shard-tokens", "from 1"]),
        (["--workers", "0"], ["--workers", "from 1"]),
        (["--seed", "-1"], ["--seed", "from 0"]),
        (["--max-document-bytes", "1"], ["--max-document-bytes", "from 64"]),
        (["--tokenizer", "missing.model"], ["--tokenizer missing.model: No such file"]),
        (["--tokenizer", __file__], [f"--tokenizer {__file__}: not a SentencePiece model"]),
        (["--vocab-size", "60000"], ["--vocab-size 60000: the training text supports at most"]),
        (["--nonsense"], ["unrecognized arguments: --nonsense"]),
        (["missing.txt"], ["missing.txt: no such file or folder"]),
        (["builtin:nothing"], ["builtin:nothing: allowed packages are networkx, numpy, python, sympy, torch"]),
        (["builtin", "builtin:numpy"], ["builtin:numpy: builtin can be given once"]),
    ],
)
def test_bad_options_are_named(tmp_path, source, command, arguments, fragments):
    assert refused(command(source, "--out", tmp_path / "out", *arguments), *fragments)
    assert not (tmp_path / "out").exists()


def test_largest_vocabulary_that_is_told_works(tmp_path, source, command):
    _, _, err = command(source, "--out", tmp_path / "out", "--vocab-size", 60000)
    largest = int(re.search(r"at most (\d+)", err)[1])
    assert refused(command(source, "--out", tmp_path / "out", "--vocab-size", largest + 1), f"at most {largest}")
    assert command(source, "--out", tmp_path / "out", "--vocab-size", largest)[0] == 0


@pytest.mark.parametrize("asked", [[], ["--vocab-size", "auto"]])
def test_a_size_that_nobody_gave_falls_back_to_what_the_text_supports(tmp_path, command, asked):
    texts = write_jsonl(tmp_path / "small.jsonl", [story(seed, 6) for seed in range(4)])
    out = tmp_path / "out"
    code, printed, err = command(texts, "--out", out, *asked)
    assert code == 0, err
    size = json.loads((out / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    assert 300 <= size < 512 and f"the text supports {size} pieces, so the tokenizer has as many" in err
    assert (
        f"VOCAB_SIZE={size} " in printed
        and sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model")).vocab_size() == size
    )
    assert refused(command(texts, "--out", tmp_path / "given", "--vocab-size", 1024), "supports at most")
    assert command(texts, "--out", out, *asked)[1] == "already prepared\n" + printed
    assert refused(command(texts, "--out", out, "--vocab-size", size), "--force")


def test_a_text_that_supports_no_tokenizer_is_refused(tmp_path, command):
    texts = write_jsonl(tmp_path / "small.jsonl", ["ab", "ba", "aab"])
    assert refused(command(texts, "--out", tmp_path / "out"), "supports a tokenizer of", "300 are needed")


def test_the_amount_of_text_decides_the_size():
    sizes = [0, 99_999, 100_000, 2_000_000, 4_000_000, 10**12]
    assert [prepare.vocab_size_of(size) for size in sizes] == [512, 512, 1024, 2048, 4096, 4096]


def test_the_command_that_is_printed_runs_when_pasted(tmp_path, source, command):
    out = tmp_path / "a 'b' $(c)\n\u00fc"
    printed = command(source, "--out", out, "--vocab-size", 320)[1]
    line = next(line for line in printed.splitlines() if line.startswith("train on it: "))
    pasted = line.removeprefix("train on it: ") + " --dry-run"
    done = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["config"]
    assert config["data_path"] == str(out) and config["vocab_size"] == 320
    written = next(line for line in printed.splitlines() if line.startswith("written: "))
    listed = subprocess.run(["bash", "-c", "ls " + written.removeprefix("written: ")], capture_output=True)
    assert listed.returncode == 0


def test_bad_places_for_output_are_named(tmp_path, source, command):
    file = tmp_path / "file"
    file.write_text("a file")
    assert refused(command(source, "--out", file), f"--out {file}: a file, not a folder")
    assert refused(command(source, "--out", file / "inside"), f"--out {file / 'inside'}: Not a directory")
    assert refused(command(source, "--out", "/proc/nowhere/out"), "--out /proc/nowhere/out: ")
    assert refused(command(source), "required: --out")
    (tmp_path / "folder").mkdir()
    assert refused(
        command(tmp_path / "folder", "--out", tmp_path / "out"),
        "folder: the folder holds no file of .txt, .md, .rst, .jsonl",
    )


def test_permissions(tmp_path, source, command):
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    if os.access(out, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert refused(command(source, "--out", out, "--vocab-size", 320), f"--out {out}: Permission denied")
    source.chmod(0)
    assert refused(command(source, "--out", tmp_path / "new"), f"{source}: Permission denied")


def test_text_without_words(tmp_path, command):
    source = write_jsonl(tmp_path / "a.jsonl", ["\n", "\n\n", "\n\n\n"])
    assert refused(command(source, "--out", tmp_path / "out"), "no words to train a tokenizer on")


def test_all_documents_dropped(tmp_path, command):
    path = train(path=tmp_path / "given.model", normalization_rule_name="nmt_nfkc")
    source = write_jsonl(tmp_path / "a.jsonl", ["ﬁ a", "ﬁ b"])
    assert refused(command(source, "--out", tmp_path / "out", "--tokenizer", path), "2 of 2 documents dropped")
    assert not (tmp_path / "out").exists()


def test_source_that_changes_between_the_passes(tmp_path, source, command, monkeypatch):
    trained = prepare.train_tokenizer

    def meddling(*arguments):
        write_jsonl(source, [story(seed) for seed in range(59)])
        return trained(*arguments)

    monkeypatch.setattr(prepare, "train_tokenizer", meddling)
    assert refused(command(source, "--out", tmp_path / "out", "--vocab-size", 300), "changed while it was being read")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", range(14))
def test_full_disk_keeps_what_is_finished(tmp_path, source, command, monkeypatch, call):
    out, calls = tmp_path / "new" / "out", []
    arguments = (source, "--out", out, "--vocab-size", 320, "--shard-tokens", 4000)
    assert command(source, "--out", tmp_path / "expected", *arguments[3:])[0] == 0

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        code, printed, err = command(*arguments)
    assert refused((code, printed, err), f"--out {out}: No space left on device") and len(calls) > call
    kept = out / prepare.UNFINISHED
    if kept.exists():
        assert f"what is finished is kept in {kept}, and the same command goes on" in err and not contents(out)
    else:
        assert call < 4 and "kept" not in err and not (tmp_path / "new").exists()
    assert command(*arguments)[0] == 0 and contents(out) == contents(tmp_path / "expected")


def test_full_disk_keeps_what_was_there(tmp_path, source, command, monkeypatch):
    out = tmp_path / "out"
    command(source, "--out", out, "--vocab-size", 320)
    before = contents(out)

    class Full(shards.ShardWriter):
        def add(self, tokens, document):
            if self.shards and self.shards[-1]["documents"] > 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().add(tokens, document)

    monkeypatch.setattr(shards, "ShardWriter", Full)
    assert refused(command(source, "--out", out, "--vocab-size", 300, "--force"), "No space left on device")
    assert contents(out) == before


def start(*arguments, **more):
    return processes.start(
        [sys.executable, str(DATA / "prepare.py"), *map(str, arguments)],
        supervised=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def test_file_size_limit_in_a_real_process(tmp_path, source):
    out = tmp_path / "new" / "out"
    process = start(
        source,
        "--out",
        out,
        "--vocab-size",
        320,
        "--quiet",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
    )
    printed, err = process.communicate()
    assert refused((process.returncode, printed, err), f"--out {out}: File too large") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_run_killed_while_renaming_is_completed_by_the_next(tmp_path, source, command, monkeypatch, moment):
    """At no moment does a manifest stand beside files that are not its own."""
    first = (source, "--out", tmp_path / "out", "--vocab-size", 320, "--shard-tokens", 3000)
    second = (source, "--out", tmp_path / "out", "--vocab-size", 300, "--force")
    expected = tmp_path / "expected"
    assert command(*first)[0] == command(source, "--out", expected, *second[3:])[0] == 0
    replace, calls = os.replace, []

    def dying(old, new):
        if Path(old).suffix != ".part":
            calls.append(old)
        if len(calls) == moment:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", dying)
        command(*second)
    assert len(calls) == moment
    assert moment == 1 or not (tmp_path / "out" / "manifest.json").exists()
    code, printed, _ = command(*second[:-1])
    assert code == 0 and printed.startswith("already prepared")
    assert contents(tmp_path / "out") == contents(expected)


def test_folder_is_released(tmp_path, source, command):
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert refused(command(source, "--out", out), "another run")
    os.close(descriptor)
    assert command(source, "--out", out, "--vocab-size", 320)[0] == 0


def test_a_dead_worker_is_reported(tmp_path, source, command, monkeypatch):
    def broken(*arguments):
        raise prepare.BrokenProcessPool("dead")

    monkeypatch.setattr(corpus, "map_in_order", broken)
    assert refused(
        command(source, "--out", tmp_path / "out", "--vocab-size", 320),
        "a worker process was killed",
        f"kept in {tmp_path / 'out' / prepare.UNFINISHED}",
    )


def test_help_and_silence(tmp_path, source, command, capfd):
    with pytest.raises(SystemExit) as done:
        command("--help")
    text = capfd.readouterr().out
    assert done.value.code == 0
    for word in (
        "SOURCE",
        "--out",
        "--vocab-size",
        "--val-fraction",
        "--shard-tokens",
        "--workers",
        "--tokenizer",
        "--seed",
        "--max-document-bytes",
        "--caseops",
        "--force",
        "--text-field",
        "--sample-bytes",
        "builtin",
        "exit codes",
    ):
        assert word in text
    code, printed, err = command(source, "--out", tmp_path / "out", "--vocab-size", 320, "--quiet")
    assert (code, err) == (0, "") and "bits per byte" in printed and "windows of 50 tokens" in printed
    code, _, err = command(source, "--out", tmp_path / "loud", "--vocab-size", 320)
    assert code == 0 and [line.split()[0] for line in err.splitlines()] == [
        "reading",
        "training",
        "tokenizing",
        "auditing",
        "compressing",
    ]


def test_read_shard_checks_size(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 3
    path.write_bytes(header.tobytes() + np.array([1, 500, 65535], "<u2").tobytes())
    assert shards.read_shard(path).tolist() == [1, 500, 65535]
    for data in (header.tobytes(), b"", bytes(1024), path.read_bytes() + b"\0\0"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="fineweb_val"):
            shards.read_shard(path)
