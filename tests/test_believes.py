"""What a run believes of the files that others made: nothing before it is checked, and every refusal is one line."""

import ast
import json
import math
import resource
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import (
    RECORD_LIKE,
    ROOT,
    TINY,
    build_model,
    config,
    examples,
    fork_script,
    full_manifest,
    loaded_apart,
    shards_of,
    single_run,
    strings,
    train_tokenizer,
    write_shard,
    write_sidecars,
)

sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402
import tokenizer as data_tokenizer  # noqa: E402
from errors import PrepareError  # noqa: E402

RUN = dict(TINY, ITERATIONS=1, GPTQ_CALIBRATION_BATCHES=1, NUM_LAYERS=2, RUN_ID="run", EVAL_SCORES=1)


@pytest.fixture
def copy(data, tmp_path):
    """A copy of the data that a test may damage."""
    return shutil.copytree(data, tmp_path / "data")


def refused(values, folder, capfd, monkeypatch):
    """Runs main() in a folder; asserts one line, code 2 and no score in any file; returns the line."""
    monkeypatch.chdir(folder)
    capfd.readouterr()
    code = tg.main([], strings(values))
    errors = capfd.readouterr().err
    assert code == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1, errors
    assert not list(folder.rglob("*summary.json"))
    return errors


def strict_json(text):
    """What a parser without Python's NaN and Infinity reads."""

    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


# ------------------------------------------------------------------------------------------------------------- sidecars


def evaluator_with(folder, change, **knobs):
    """The evaluator of a folder whose sidecars hold the table's counts, changed by `change(counts, tokens)`."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shards = iter(shards_of(folder, "val"))
    write_sidecars(folder, lambda counts: change(counts, np.asarray(tg.open_shard(next(shards)))))
    return tg.Evaluator(config(DATA_PATH=folder, **knobs), single_run())


def test_counts_up_to_the_tables_are_accepted(copy, data):
    whole = tg.Evaluator(config(DATA_PATH=data), single_run()).bytes
    assert evaluator_with(copy, lambda counts, _: counts).bytes == whole
    assert evaluator_with(copy, lambda counts, _: counts // 2).bytes < whole


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("above", [1, 60_000])
def test_one_count_above_its_piece_is_named(shard, above, copy):
    """Any token of any shard, by one byte or by many: the file, the place, the count and what is allowed."""
    vocabulary = tg.Vocabulary(config(DATA_PATH=copy))
    tokens = np.asarray(tg.open_shard(shards_of(copy, "val")[shard]))
    places = np.flatnonzero((tokens != tg.BOS_ID) & ~vocabulary.is_byte[tokens])
    for place in [*places[:3], *places[-3:], *np.random.default_rng(0).choice(places, 5)]:
        number = iter(range(2))

        def change(counts, _, place=place, number=number):
            counts[place] += above if next(number) == shard else 0
            return counts

        with pytest.raises(tg.ConfigError) as caught:
            evaluator_with(copy, change)
        message, name = str(caught.value), f"fineweb_val_bytes_{shard:06d}.bin"
        assert message.startswith(f"{copy / name}: counts ") and "\n" not in message
        assert f"bytes for token {place} of fineweb_val_{shard:06d}.bin" in message and "must be at most" in message


def test_what_is_no_text_counts_nothing(copy):
    """Special tokens, and the space that the tokenizer puts before a text."""

    def first(counts, tokens):
        begins = np.flatnonzero(tokens[:-1] == tg.BOS_ID) + 1
        counts[begins[:1]] += 1
        return counts

    with pytest.raises(tg.ConfigError, match=r"fineweb_val_bytes_000000\.bin: counts . bytes for token 1 of .*'▁"):
        evaluator_with(copy, first)
    stream = tg.TokenStream(config(DATA_PATH=copy), "val")
    vocabulary = tg.Vocabulary(config(DATA_PATH=copy))
    for special in (0, 2, 3):
        stream.shards = [np.array([1, special, 50], np.uint16)]
        stream.starts = np.array([0, 3])
        with pytest.raises(tg.ConfigError, match="counts 1 bytes for token 1 of .*: must be at most 0"):
            tg.check_sidecar(stream, np.array([0, 1, 0], np.uint16), vocabulary)


# Counts of a row of byte pieces; True: at no place more than it has pieces up to there.
ROWS = [
    ([1, 1, 1], True),
    ([0, 0, 3], True),
    ([0, 2, 1], True),
    ([0, 0, 3, 1], True),
    ([0, 0, 3, 0, 0, 3], True),
    ([2, 0, 0], False),
    ([0, 3, 0], False),
    ([0, 0, 4], False),
    ([0, 0, 3, 2], False),
]


@pytest.mark.parametrize("counts, legal", ROWS)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_character_may_be_counted_at_its_last_byte_piece(counts, legal, before, data):
    """As published sidecars do. What one row leaves uncounted is nothing that another one may count."""
    vocabulary = tg.Vocabulary(config(DATA_PATH=data))
    byte, letter = vocabulary.model.piece_to_id("<0xE6>"), vocabulary.model.piece_to_id("e")
    tokens = np.array([1, *[byte] * before, letter, *[byte] * len(counts)], np.uint16)
    sidecar = np.array([0, *[0] * before, 1, *counts], np.uint16)
    above = tg.byte_pieces_above(tokens, sidecar, vocabulary)
    assert (len(above) == 0) == legal and (above >= before + 2).all()


def test_the_sidecars_of_prepare_are_accepted(tmp_path):
    """CaseOps, with characters that are no pieces, capitals in every form, and operators in the text."""
    texts = ["The HTTP server of McDonald's 日本語 🙂", "ALL CAPS x\ue001y a  b", "plain text", "Ünïcode ÅSE"] * 40
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n, text in enumerate(texts)))
    options = ["--vocab-size", "330", "--caseops", "--val-fraction", "0.3", "--workers", "1"]
    assert prepare.main([str(source), "--out", str(tmp_path / "out"), *options]) == 0
    evaluator = tg.Evaluator(config(DATA_PATH=tmp_path / "out", VOCAB_SIZE=330), single_run())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert evaluator.bytes == manifest["splits"]["val"]["bytes"] > 0


def test_a_run_refuses_a_sidecar_before_it_trains(copy, tmp_path, capfd, monkeypatch):
    (copy / "manifest.json").unlink()
    write_sidecars(copy, lambda counts: counts * 2)
    line = refused(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert "fineweb_val_bytes_000000.bin: counts " in line and not (tmp_path / "logs").exists()


# ----------------------------------------------------------------------------------------------------------- tokenizers

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPECIAL = [("<pad>", CONTROL), ("<s>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN)]
BYTES = [(f"<0x{value:02X}>", BYTE) for value in range(256)]
PIECES = [(piece, NORMAL) for piece in ("▁", "t", "h", "e", "he", "▁the", "▁▁", "a", "b", "é", "e▁", "a▁b", "▁▁a▁")]


def protobuf(number, value):
    """One field of a protocol buffer: bytes, a float, or a whole number."""

    def varint(n):
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(int(value))


def model_of(pieces, prefix=True, suffix=False, trim=False, escape=True):
    """A SentencePiece model by hand: with pieces and settings that its trainer does not offer together."""
    rows = (
        protobuf(1, text if isinstance(text, bytes) else text.encode()) + protobuf(2, -float(n)) + protobuf(3, kind)
        for n, (text, kind) in enumerate(pieces)
    )
    trainer = protobuf(3, 2) + protobuf(24, suffix) + protobuf(35, True)
    normalizer = protobuf(1, b"identity") + protobuf(3, prefix) + protobuf(4, trim) + protobuf(5, escape)
    return b"".join(protobuf(1, row) for row in rows) + protobuf(2, trainer) + protobuf(3, normalizer)


def vocabulary_of(model, folder, size=None):
    (folder / "odd.model").write_bytes(model)
    if size is None:
        size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    return tg.Vocabulary(config(TOKENIZER_PATH=folder / "odd.model", VOCAB_SIZE=size))


COUNTED = {
    "marks anywhere": dict(),
    "no space added": dict(prefix=False),
    "no space added, marks behind": dict(prefix=False, suffix=True),
    "spaces trimmed": dict(trim=True),
    "plain spaces": dict(prefix=False, escape=False),
}
TEXTS = ["the ab the", "a b  the", "the", "ab é日本 the", "e a b e  ", "日", "a\tb\nthe", "a b a b▁a"]


@pytest.mark.parametrize("user", [False, True], ids=["", "user-defined"])
@pytest.mark.parametrize("name", COUNTED)
def test_bytes_are_those_of_the_decoded_text(name, user, tmp_path):
    """Whatever a tokenizer's pieces are: marks in front, inside, behind, several; with and without a space added."""
    more = [("▁a b", USER), ("the▁", USER), ("x▁y", USER)] if user else []
    vocabulary = vocabulary_of(model_of([*SPECIAL, *BYTES, *PIECES, *more], **COUNTED[name]), tmp_path)
    model = vocabulary.model
    for text in TEXTS:
        ids = np.array([1, *model.encode(text)])
        counted = vocabulary.target_bytes(ids[:-1], ids[1:])
        assert counted.sum() == len(model.decode(ids[1:].tolist()).encode()), (text, model.encode(text, out_type=str))
        assert (counted <= vocabulary.most_bytes(ids[:-1], ids[1:])).all()
    letter = model.piece_to_id("t")
    for i in range(vocabulary.width.size):  # by itself after a letter: the same count as the decoder's
        if not (vocabulary.special[i] or vocabulary.is_byte[i]):
            alone = len(model.decode([letter, i]).encode()) - 1
            assert vocabulary.target_bytes(np.array([letter]), np.array([i])) == [alone], model.id_to_piece(i)


def test_a_space_before_a_text_counts_in_a_sidecar_where_the_tokenizer_adds_none(tmp_path):
    """By the table it is no byte after BOS, as the challenge counts; a sidecar of the text may hold it."""
    for prefix in (True, False):
        vocabulary = vocabulary_of(model_of([*SPECIAL, *BYTES, *PIECES], prefix=prefix), tmp_path)
        bos, the = np.array([1]), np.array([vocabulary.model.piece_to_id("▁the")])
        assert (vocabulary.target_bytes(bos, the)[0], vocabulary.most_bytes(bos, the)[0]) == (3, 3 if prefix else 4)


def test_unused_unknown_and_control_pieces_count_nothing(tmp_path):
    pieces = [*SPECIAL, *BYTES, ("▁", NORMAL), ("▁gone", UNUSED), ("<|end|>", CONTROL), ("▁ctl", CONTROL)]
    vocabulary = vocabulary_of(model_of(pieces), tmp_path)
    before = np.full(7, vocabulary.model.piece_to_id("▁"))
    assert vocabulary.target_bytes(before, np.array([0, 1, 2, 3, 261, 262, 263])).tolist() == [0] * 7
    assert vocabulary.most_bytes(before, np.array([0, 1, 2, 3, 261, 262, 263])).tolist() == [0] * 7


REFUSED = {
    "a mark behind": (model_of([*SPECIAL, *BYTES, *PIECES], suffix=True), "writes the text 'a' as 'a\\u2581'"),
    "a plain space": (model_of([*SPECIAL, *BYTES, *PIECES], escape=False), "writes the text 'a' as ' a'"),
    "a plain space behind": (
        model_of([*SPECIAL, *BYTES, *PIECES], escape=False, suffix=True),
        "writes the text 'a' as",
    ),
    "no BOS": (model_of([("<pad>", CONTROL), ("x", NORMAL), *SPECIAL[2:], *BYTES]), "its BOS is -1, and 1 is needed"),
    "a BOS that is text": (model_of([("<pad>", CONTROL), ("<s>", USER), *SPECIAL[2:], *BYTES]), "its BOS is -1"),
    "not UTF-8": (model_of([*SPECIAL, *BYTES, (b"\xff\xfe", NORMAL)]), "is not a SentencePiece model"),
    "a surrogate": (model_of([*SPECIAL, *BYTES, (b"\xed\xa0\x80", NORMAL)]), "is not a SentencePiece model"),
    "an empty piece": (model_of([*SPECIAL, *BYTES, ("", NORMAL)]), "is not a SentencePiece model"),
    "a long piece": (model_of([*SPECIAL, *BYTES, ("x" * 70_000, NORMAL)]), "is not a SentencePiece model"),
    "no byte": (model_of([*SPECIAL, *BYTES, ("▁<0x00>", BYTE)]), "is not a SentencePiece model"),
    "nothing": (b"", "is not a SentencePiece model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_cannot_be_counted_by_is_refused(name, tmp_path, capfd):
    model, message = REFUSED[name]
    with pytest.raises(tg.ConfigError) as caught:
        vocabulary_of(model, tmp_path, size=size_of(model))
    assert str(caught.value).startswith(f"TOKENIZER_PATH={tmp_path / 'odd.model'}: ") and message in str(caught.value)
    assert not capfd.readouterr().err
    with pytest.raises(PrepareError, match="^odd: "):  # data/prepare.py takes no such tokenizer either
        data_tokenizer.Codec(model, "odd")


def size_of(model):
    """The number of pieces of a model, also of one that cannot be read."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size() if model else 300
    except RuntimeError:
        return 300


def test_a_trained_tokenizer_with_its_marks_behind_is_refused(copy, tmp_path, capfd, monkeypatch):
    """treat_whitespace_as_suffix: its pieces counted 1.265 times the bytes."""
    trained = train_tokenizer(["the river and the stone"] * 50, 290, treat_whitespace_as_suffix=True)
    (copy / "tokenizer.model").write_bytes(trained)
    line = refused(dict(RUN, DATA_PATH=copy, VOCAB_SIZE=290), tmp_path, capfd, monkeypatch)
    assert line.startswith(f"error: TOKENIZER_PATH={copy / 'tokenizer.model'}: writes the text 'a' as 'a\\u2581'")
    assert "treat_whitespace_as_suffix=false" in line


# ----------------------------------------------------------------------------------------- validation without any bytes

EMPTY = {"only BOS": [1] * 40, "only special": [1, 0, 2, 3, 1, 2, 0], "one target": [1, 1], "a space": [1, 260, 1]}


@pytest.mark.parametrize("mode", ["all", "train"])
@pytest.mark.parametrize("name", EMPTY)
def test_validation_that_stands_for_no_text_is_refused(name, mode, copy, tmp_path, capfd, monkeypatch):
    for path in (copy / "manifest.json", *shards_of(copy, "val")):
        path.unlink()
    mark = sentencepiece.SentencePieceProcessor(model_file=str(copy / "tokenizer.model")).piece_to_id("▁")
    write_shard(copy / "fineweb_val_000000.bin", [mark if token == 260 else token for token in EMPTY[name]])
    line = refused(dict(RUN, DATA_PATH=copy, MODE=mode), tmp_path, capfd, monkeypatch)
    assert line.startswith(f"error: DATA_PATH={copy}: the ") and "stand for 0 bytes of text" in line
    assert not (tmp_path / "logs").exists()


def test_validation_whose_sidecar_counts_nothing_is_refused(copy, tmp_path, capfd, monkeypatch):
    (copy / "manifest.json").unlink()
    write_sidecars(copy, np.zeros_like)
    assert "stand for 0 bytes of text" in refused(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)


@pytest.mark.parametrize("tokens", [[], [1]])
def test_validation_without_a_target_is_refused(tokens, copy, tmp_path, capfd, monkeypatch):
    for path in (copy / "manifest.json", *shards_of(copy, "val")):
        path.unlink()
    write_shard(copy / "fineweb_val_000000.bin", tokens)
    line = refused(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert f"its val shards hold {len(tokens)} tokens, and 2 are needed" in line


def test_empty_documents_among_others_are_scored(copy, tmp_path, monkeypatch):
    """Documents without text have a BOS as their only target, with loss and no bytes."""
    (copy / "manifest.json").unlink()
    for path in shards_of(copy, "val"):
        tokens = np.asarray(tg.open_shard(path))[:200]
        write_shard(path, [1, 1, 1, *tokens, 1, 1])
    monkeypatch.chdir(tmp_path)
    assert tg.main([], strings(dict(RUN, DATA_PATH=copy, **PHASED))) == 0
    summary = strict_json((tmp_path / "logs/run/summary.json").read_text())
    assert summary["val_bpb"] > 0 and summary["val_tokens"] == 2 * 205 - 1


# --------------------------------------------------------------------------------------------------- what is not finite

PHASED = dict(
    TTT_MODE="phased",
    TTT_BASELINE=1,
    TTT_CHUNK_SIZE=16,
    TTT_EVAL_SEQ_LEN=32,
    TTT_BATCH_SIZE=16,
    PHASED_TTT_PREFIX_DOCS=4,
    PHASED_TTT_NUM_PHASES=1,
    GLOBAL_TTT_CHUNK_TOKENS=2000,
)
CHUNK = dict(TTT_MODE="chunk", TTT_BASELINE=1, TTT_CHUNK_TOKENS=4096, TTT_EPOCHS=1)
STAGES = ["pre_quant", "quantized", "ttt_baseline", "ttt"]


def poison(monkeypatch, stage, value):
    """The n-th stage that a ledger closes has one NLL of this value."""
    close, seen = tg.ScoreLedger.close, []

    def closed(ledger, *arguments, **options):
        seen.append(1)
        if STAGES[len(seen) - 1] == stage:
            ledger.nll[7] = value
        return close(ledger, *arguments, **options)

    monkeypatch.setattr(tg.ScoreLedger, "close", closed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", ["phased", "chunk"])
def test_one_score_that_is_not_finite_ends_the_run(method, stage, value, copy, tmp_path, capfd, monkeypatch):
    if method == "chunk" and not stage.startswith("ttt"):
        pytest.skip("the same stage")
    for path in (copy / "manifest.json", shards_of(copy, "val")[1]):
        path.unlink()
    poison(monkeypatch, stage, value)
    line = refused(dict(RUN, DATA_PATH=copy, **dict(phased=PHASED, chunk=CHUNK)[method]), tmp_path, capfd, monkeypatch)
    rate = "TTT_LR=" if method == "chunk" else "TTT_LORA_LR="
    name = dict(pre_quant="MATRIX_LR=", quantized="artifact: ", ttt_baseline="artifact: ", ttt=rate)[stage]
    assert line.startswith(f"error: {name}") and f"is {value}" in line
    folder = tmp_path / "logs" / "run"
    scored = [row["stage"] for row in rows_of(folder / "metrics.jsonl") if "stage" in row]
    assert scored == STAGES[: STAGES.index(stage)] and not (folder / f"scores_{stage}.npy").exists()


def rows_of(path):
    return [strict_json(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("knob", ["MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR"])
@pytest.mark.parametrize("value", [1e12, 1e300])
def test_a_training_that_runs_away_ends_in_one_line_or_in_a_score(knob, value, data, tmp_path, monkeypatch):
    """No step's loss is logged, so that the weights or the validation must show what is not finite."""
    values = dict(RUN, DATA_PATH=data, ITERATIONS=3, TRAIN_LOG_EVERY=0, WARMDOWN_FRAC=0)
    monkeypatch.chdir(tmp_path)
    code = tg.main([], strings({**values, knob: value}))
    folder = tmp_path / "logs" / "run"
    assert code == 2 or (code == 0 and value < 1e300)
    if code == 0:
        assert math.isfinite(strict_json((folder / "summary.json").read_text())["val_bpb"])
    else:
        assert not (folder / "summary.json").exists() and not (folder / tg.CONTAINER_FILE).exists()


def trained_with(change, monkeypatch):
    """Changes the weights when the training has ended."""
    use_average = tg.Trainer.use_average

    def changed(trainer):
        use_average(trainer)
        with torch.no_grad():
            change(trainer.model)

    monkeypatch.setattr(tg.Trainer, "use_average", changed)


BROKEN = {
    "a NaN": (lambda m: m.qo_bank[0, 0, 0].fill_(math.nan), "the weights 'qo_bank' are not finite after the training"),
    "an infinity": (lambda m: m.embedding[300, 3].fill_(math.inf), "the weights 'embedding' are not finite"),
    "a large vector": (lambda m: m.skip_weights.fill_(1e5), "the quantized weights 'skip_weights' cannot be stored"),
}


@pytest.mark.parametrize("mode", ["all", "train"])
@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_are_not_finite_are_named(name, mode, data, tmp_path, capfd, monkeypatch):
    change, message = BROKEN[name]
    trained_with(change, monkeypatch)
    line = refused(dict(RUN, DATA_PATH=data, MODE=mode), tmp_path, capfd, monkeypatch)
    assert line.startswith("error: MATRIX_LR=") and message in line
    assert not (tmp_path / "logs/run" / tg.CONTAINER_FILE).exists()


def test_activations_that_are_not_finite_during_calibration_are_named(data, tmp_path, capfd, monkeypatch):
    calibrate = tg.calibrate

    def broken(*arguments):
        calibration = calibrate(*arguments)
        calibration.hessians["up_bank"][0, 0, 0] = math.nan
        return calibration

    monkeypatch.setattr(tg, "calibrate", broken)
    line = refused(dict(RUN, DATA_PATH=data), tmp_path, capfd, monkeypatch)
    assert "the inputs of 'up_bank' are not finite during calibration" in line


def test_a_stored_zero_matrix_has_a_row_of_numbers():
    """Nothing is lost of weights without power: no 0/0 gets into summary.json."""
    zero, hessian = torch.zeros(2, 8, 8), torch.eye(8).repeat(2, 1, 1)
    q = tg.Quantized(zero.to(torch.int8), torch.ones(2, 8, dtype=torch.float16), 6, {})
    assert tg.relative_error(q, zero, hessian) == 0.0


STORED = {
    "a softcap beyond 32 bits": "the validation loss of its model is nan",
    "NaN": "its tensor 'skip_weights' is not possible: its 16-bit numbers are not all finite",
    "infinite scale": "its tensor 'up_bank' is not possible: its 16-bit numbers are not all finite",
}


def forged_folder(folder, name):
    """Makes a run's folder with an artifact of such numbers; returns what is said of it."""
    knobs = dict(LOGIT_SOFTCAP=1e308) if "softcap" in name else {}
    c = config(dict(RUN, DATA_PATH="", **knobs))
    weights = {n: p.detach() for n, p in build_model(c, spread=0.1).named_parameters()}
    stored = tg.quantize(weights, tg.Calibration({}), c)
    if name == "NaN":
        stored["skip_weights"].codes[0, 3] = math.nan
    if name == "infinite scale":
        stored["up_bank"].scales[1, 5] = math.inf
    (folder / "logs" / "run").mkdir(parents=True)
    (folder / "logs" / "run" / tg.CONTAINER_FILE).write_bytes(tg.pack(stored, c))
    return STORED[name]


@pytest.mark.parametrize("name", STORED)
def test_an_artifact_that_gives_no_score_is_refused(name, data, tmp_path, capfd, monkeypatch):
    message = forged_folder(tmp_path, name)
    earlier = tmp_path / "logs/run/eval_summary.json"
    earlier.write_text('{"val_bpb": 0.1}')  # a score of an earlier evaluation must not pass for this one's
    line = refused(dict(RUN, DATA_PATH=data, MODE="eval"), tmp_path, capfd, monkeypatch)
    assert line.startswith("error: artifact: ") and message in line


@pytest.mark.parametrize("case", ["training", "quantization", "artifact"])
def test_two_ranks_end_alike(case, data, tmp_path):
    """One line of one rank, and no rank that waits for another."""
    values = dict(RUN, DATA_PATH=data, ITERATIONS=2, TRAIN_LOG_EVERY=0, WARMDOWN_FRAC=0)
    if case == "training":
        values |= dict(LOGIT_SOFTCAP=1e308)
    elif case == "quantization":  # rank 0 alone meets the fault
        values |= dict(SCALAR_LR=1e6)
    else:
        forged_folder(tmp_path, next(iter(STORED)))
        values |= dict(MODE="eval")
    done = fork_script(values, ranks=2, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(errors) == 1 and "Error:" not in errors[0], done.stderr[-3000:]
    assert ("cannot be stored" in errors[0]) == (case == "quantization")
    assert not list(tmp_path.rglob("*summary.json"))


# ----------------------------------------------------------------------------------------------------------------- JSON


@examples(max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)
def test_whatever_a_run_writes_is_json(value):
    written = strict_json(tg.to_json(value))

    def same(a, b):
        if isinstance(a, float):
            return b is None if not math.isfinite(a) else a == b
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list) else a == b

    assert same(value, written)


def test_no_writer_allows_nan():
    """Every `json.dumps` of the product says allow_nan=False."""
    for path in (ROOT / "train_gpt.py", *(ROOT / "data").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("allow_nan") == "False", f"{path.name}:{node.lineno}"


# ------------------------------------------------------------------------------------------------------------ manifests

WRONG = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    "",
    "5",
    "a\nb",
    "\ud800",
    "../x",
    "0" * 64,
    [],
    [None],
    [[]],
    {},
    {"": None},
    {"val": {}},
    [{"file": "fineweb_val_000000.bin"}],
]
NESTED = 100_000


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value, the outermost first."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def replaced(value, at, wrong):
    """A copy with another value at a path."""
    if not at:
        return wrong
    changed = value.copy()
    changed[at[0]] = replaced(value[at[0]], at[1:], wrong)
    return changed


def removed(value, at):
    """A copy without what is at a path."""
    changed = value.copy()
    if len(at) == 1:
        del changed[at[0]]
    else:
        changed[at[0]] = removed(value[at[0]], at[1:])
    return changed


def mutations(manifest):
    """(path, JSON text) of every change: each value replaced by each wrong one, left out, nested, and given twice."""
    for at in places(manifest):
        for wrong in WRONG:
            yield at, json.dumps(replaced(manifest, at, wrong))
        if at:
            yield at, json.dumps(removed(manifest, at))
            deep = json.dumps(replaced(manifest, at, "@"))
            yield at, deep.replace('"@"', "[" * NESTED + "]" * NESTED)
            yield at, deep.replace('"@"', '{"a":' * NESTED + "1" + "}" * NESTED)
            yield at, deep.replace('"@"', "9" * 5000)
            if isinstance(at[-1], str):
                yield at, deep.replace('"@"', f"1, {json.dumps(at[-1])}: null")


BROKEN_FILES = {
    "empty": b"",
    "not UTF-8": b'{"splits": "\xff"}',
    "UTF-16": '{"splits": {}}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "zeros": bytes(1000),
    "half": b'{"splits": {"val": ',
    "two": b"{}{}",
    "deep": b"[" * NESTED,
    "deep objects": b'{"a":' * NESTED,
}


@pytest.fixture(scope="module")
def manifest_folder(data, tmp_path_factory):
    """A folder with sidecars and a whole manifest, which the tests replace."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("manifests") / "data")
    write_sidecars(folder)
    manifest = full_manifest(folder, audited=True)
    rows = [
        dict(file=tg.sidecar_path(path).name, sha256=tg.sha256_of(tg.sidecar_path(path)))
        for path in shards_of(folder, "val")
    ]
    manifest["splits"]["val"]["sidecars"] = rows
    manifest |= dict(reference_compressors={"xz -9": 2.5}, unused={"a": [1, {"b": 2}]})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder, manifest


def test_no_manifest_does_more_than_be_refused(manifest_folder):
    """The stages `data` and `audit` of a run, on every mutation: all is well, or one line says what is not."""
    folder, manifest = manifest_folder
    c = config(DATA_PATH=folder)
    validation, training = tg.TokenStream(c, "val"), tg.TokenStream(c, "train")
    accepted, refusals = set(), {}
    for at, text in [((), json.dumps(manifest)), *mutations(manifest)]:
        (folder / "manifest.json").write_text(text)
        try:
            check = tg.DataCheck(c, single_run(), tg.Manifest.read(folder))
            check.validation(validation)
            check.count_bytes("val", manifest["splits"]["val"]["bytes"])
            check.training(training)
            check.leaks()
            check.refuse()
        except tg.ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 1000
            refusals[at] = str(error)
            continue
        accepted.add(at)
        assert all(line.isprintable() for line in check.lines())
        strict_json(tg.to_json(dict(audit=check.rows, reference=check.manifest.reference)))
    assert {at for at in accepted if at[:1] == ("unused",)} == {at for at in places(manifest) if at[:1] == ("unused",)}
    used = [at for at in places(manifest) if at[:1] in [("splits",), ("audit",), ("tokenizer",)]]
    assert all(at in refusals for at in used if at[-1] != "file" or at[0] != "tokenizer")


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_is_no_manifest_is_named(name, copy, tmp_path, capfd, monkeypatch):
    (copy / "manifest.json").write_bytes(BROKEN_FILES[name])
    line = refused(dict(RUN, DATA_PATH=copy), tmp_path, capfd, monkeypatch)
    assert line.startswith(f"error: {copy / 'manifest.json'}: is not a valid manifest") and len(line) < 500
    assert not (tmp_path / "logs").exists()


def test_prepare_refuses_any_manifest_that_it_cannot_use(tmp_path, monkeypatch):
    """The manifest in --out: a folder that is already prepared, or an error of the user."""
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"{n} the river and the stone"}) + "\n" for n in range(60)))
    options = ["--vocab-size", "300", "--val-fraction", "0.3", "--workers", "1", "--quiet"]
    arguments = prepare.parse_arguments([str(source), "--out", str(tmp_path / "out"), *options])
    prepare.prepare(arguments)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    mark = manifest["fingerprint"]
    monkeypatch.setattr(prepare, "fingerprint", lambda *_: mark)
    monkeypatch.setattr(prepare, "audited", lambda *_: manifest["audit"])
    texts = [text for at, text in mutations(manifest) if len(at) < 4 or at[-1] in ("file", "tokens", "sha256")]
    for content in [*(text.encode() for text in texts), *BROKEN_FILES.values()]:
        path.write_bytes(content)
        try:
            found = prepare.check_folder(arguments, mark)
            if found:
                lines = list(prepare.summary_lines(prepare._with_audit(arguments, found), tmp_path / "out"))
                assert all(line.isprintable() for line in lines)
        except PrepareError as error:
            assert len(str(error)) < 10_000


# ----------------------------------------------------------------------------------------------------- forged artifacts

SMALL = dict(NUM_LAYERS=2, MODEL_DIM=16, VOCAB_SIZE=64, NUM_KV_HEADS=2, GATE_WINDOW=4)
NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    255,
    2**12,
    2**16,
    2**16 + 1,
    2**20,
    2**31 - 1,
    2**31,
    2**63,
    2**64,
    10**400,
    0.0,
    0.5,
    1e308,
    -1e308,
    5e-324,
    math.nan,
    math.inf,
    True,
    False,
    None,
    "",
    "a\nb",
    "a" * 100_000,
    "9" * 5000,
    [],
    [1],
    {},
]


def stored_small(base=RECORD_LIKE, **knobs):
    """A small model's config and stored form: with corrections, residuals and salient columns where there are any."""
    c = config({**base, **SMALL}, **{"NUM_LAYERS": 6, "AWQ_GROUPS": 3, "RVQ_ENABLED": 1, **knobs})
    weights = {name: p.detach() for name, p in build_model(c).named_parameters()}
    hessians = {}
    for name in (*tg.BANKS, "embedding"):
        x = torch.randn(len(tg.as_batch(weights[name])), 50, weights[name].size(-1))
        hessians[name] = x.mT @ x
    stored = tg.quantize(weights, tg.Calibration(hessians), c)
    return c, tg.with_residuals(stored, tg.fit_residuals(stored, weights, hessians, c)[::2])


def forged(header, payload):
    """A container of this header and these sections, with the right checksum."""
    packed = zlib.compress(json.dumps(header).encode(), 1)
    return struct.pack("<8sII", tg.MAGIC, len(packed), zlib.crc32(packed)) + packed + payload


def attack(files):
    """Loads files one after the other; each is refused in one line, or its model can be loaded."""
    loaded = 0
    for number, content in enumerate(files):
        try:
            tg.load_artifact(content, config(), set(), torch.device("cpu"))
            loaded += 1
        except tg.ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 600, (number, str(error)[:600])
    return loaded


def test_no_number_of_a_header_does_more_than_be_refused():
    """Every value of a header replaced by every wrong one; the process never grows by 512 MiB."""
    c, stored = stored_small(ROPE_TYPE="yarn")
    data = tg.pack(stored, c)
    header, offset = tg.read_header(data)
    fields = header.fields()
    paths = [at for at in places(fields) if at[:1] != ("sections",) or len(at) < 2 or at[1] in (0, 3)]
    paths = [at for at in paths if at[:1] != ("tensors",) or len(at) < 2 or at[1] in (0, 3, 5)]
    assert attack([data]) == 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attack(forged(replaced(fields, at, wrong), data[offset:]) for at in paths for wrong in NUMBERS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024


def test_pairs_of_numbers_that_contradict_each_other_are_refused():
    """Shapes of no elements with a huge size, sizes that add up elsewhere, sections exchanged."""
    c, stored = stored_small()
    data = tg.pack(stored, c)
    header, offset = tg.read_header(data)
    fields = header.fields()
    files = []
    for number, tensor in enumerate(fields["tensors"]):
        for part, shape in tensor[3].items():
            for wrong in ([0] * len(shape), [0, *[2**62] * (len(shape) - 1)], [2**40, *[0] * (len(shape) - 1)]):
                files.append(replaced(fields, ("tensors", number, 3, part), wrong))
    for a in range(len(fields["sections"])):
        for b in range(a):
            rows = [row.copy() for row in fields["sections"]]
            rows[a][2:], rows[b][2:] = rows[b][2:], rows[a][2:]
            files.append({**fields, "sections": rows})
            rows = [row.copy() for row in fields["sections"]]
            rows[a][3], rows[b][3] = rows[a][3] + 64, max(0, rows[b][3] - 64)
            files.append({**fields, "sections": rows})
    assert attack(forged(fields, data[offset:]) for fields in files) == 0


@pytest.mark.parametrize("codec", ["zstd", "brotli", "lzma", "pergroup"])
def test_cut_and_flipped_files_are_refused(codec):
    c, stored = stored_small(COMPRESSOR=codec)
    data = tg.pack(stored, c)
    generator = np.random.default_rng(0)
    files = [data[:size] for size in generator.integers(0, len(data), 150).tolist()]
    for place, bit in zip(
        generator.integers(0, len(data), 300).tolist(), [1 << n % 8 for n in range(300)], strict=True
    ):
        files.append(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
    assert attack(files) == 0


def huge_model(codec, **knobs):
    """A small file whose header and sections agree on a large model of zeros, some tensors of which are not finite."""
    c = config({**TINY, "NUM_LAYERS": 1, "NUM_HEADS": 8, "NUM_KV_HEADS": 8, "COMPRESSOR": codec, **knobs})
    stored = {}
    for name, p in tg.meta_model(c).named_parameters():
        if name in tg.BANKS or name == "embedding":
            scales = torch.ones(p.shape[:-1], dtype=torch.float16)
            stored[name] = tg.Quantized(torch.zeros(p.shape, dtype=torch.int8), scales, 6, {})
        else:
            stored[name] = tg.Quantized(torch.full(p.shape, math.nan, dtype=torch.float16), None, 16, {})
    return tg.pack(stored, c)


SIZES = [(codec, width) for codec in ("zstd", "brotli", "lzma") for width in (1024, 4096)] + [("pergroup", 256)]


@pytest.mark.parametrize("codec, width", SIZES)
def test_a_small_file_that_claims_a_large_model_takes_little_memory(codec, width, tmp_path):
    content = huge_model(codec, MODEL_DIM=width, MLP_MULT=1)
    assert len(content) < 200_000
    grown, message = loaded_apart(content, tmp_path)
    assert grown < 512 and message.startswith("artifact: ")
    assert ("of content, which is more than" if width > 1024 else "are not all finite") in message


@pytest.mark.parametrize("rope_dims", [0, 2])
@pytest.mark.parametrize("length", [2**16 + 1, 2**20])
def test_tables_of_many_positions_are_refused(length, rope_dims, tmp_path):
    """Also where few dimensions have rotary embedding: an evaluation would form sequences of that length."""
    c, stored = stored_small(TINY, ROPE_DIMS=rope_dims, COMPRESSOR="brotli", NUM_LAYERS=1, RVQ_ENABLED=0, AWQ_GROUPS=0)
    data = tg.pack(stored, c)
    header, offset = tg.read_header(data)
    content = forged(replaced(header.fields(), ("model", "train_seq_len"), length), data[offset:])
    grown, message = loaded_apart(content, tmp_path)
    assert grown < 64 and f"claims sequences of {length} tokens" in message


def test_a_training_that_could_not_be_read_back_is_refused_at_the_start(data, tmp_path, capfd, monkeypatch):
    values = dict(RUN, DATA_PATH=data, TRAIN_SEQ_LEN=2**17, TRAIN_BATCH_TOKENS=2**17)
    assert refused(values, tmp_path, capfd, monkeypatch).startswith("error: TRAIN_SEQ_LEN=131072: must be at most")
    values = dict(RUN, DATA_PATH=data, MODEL_DIM=8192, MLP_MULT=4)
    assert "an artifact holds at most" in refused(values, tmp_path, capfd, monkeypatch)
    assert not (tmp_path / "logs").exists()


def test_a_file_too_large_to_be_an_artifact_is_not_read(data, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    with open(folder / tg.CONTAINER_FILE, "wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no room
    line = refused(dict(RUN, DATA_PATH=data, MODE="eval"), tmp_path, capfd, monkeypatch)
    assert line.startswith("error: artifact: has 1099511627776 bytes, and at most ")
