"""Every target is scored once, inside its document, with the right context; the score is that of a plain loop."""

import json
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
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
    documents_from,
    encode,
    examples,
    fork,
    single_run,
    strings,
    write_shard,
    write_sidecars,
)

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


# ------------------------------------------------------------------------------------------------------------- windows


def test_where_documents_begin_and_end():
    assert tg.document_offsets(np.array([1, 5, 6, 1, 7, 1])).tolist() == [0, 3, 5]  # the last BOS is a target
    assert tg.document_offsets(np.array([1, 1, 1, 5])).tolist() == [0, 1, 2, 3]  # documents of one token
    assert tg.document_offsets(np.array([1, 1])).tolist() == [0, 1]


def test_windows_by_hand():
    assert tg.evaluation_windows(np.array([0, 10]), 4, 4).tolist() == [[0, 4, 0], [4, 4, 0], [8, 2, 0]]
    assert tg.evaluation_windows(np.array([0, 9]), 4, 3).tolist() == [[0, 4, 0], [3, 4, 1], [6, 3, 1]]
    assert tg.evaluation_windows(np.array([0, 10]), 4, 1).tolist() == [[0, 4, 0], *([s, 4, 3] for s in range(1, 7))]
    assert tg.evaluation_windows(np.array([0, 3, 4]), 8, 8).tolist() == [[0, 3, 0], [3, 1, 0]]


@examples(max_examples=300)
@given(LENGTHS, st.integers(1, 20), st.data())
def test_windows_score_each_target_once_with_the_right_context(lengths, context, data):
    stride = data.draw(st.integers(1, context))
    bounds = np.cumsum([0, *lengths])
    windows = tg.evaluation_windows(bounds, context, stride)
    counts, document = np.zeros(bounds[-1], int), np.repeat(np.arange(len(lengths)), lengths)
    for start, size, first in windows.tolist():
        assert 1 <= size <= context and 0 <= first < size
        inputs = range(start, start + size)
        assert len(set(document[list(inputs)])) == 1  # never across documents
        begin = bounds[document[start]]
        for place in range(first, size):
            counts[start + place] += 1
            # Context: all of the document so far, or at least what the stride leaves of the window.
            assert start == begin or place + 1 > context - stride
    assert (counts == 1).all()
    assert windows.dtype == np.int64


@examples(max_examples=200)
@given(LENGTHS, st.integers(1, 20), st.integers(1, 70), st.data())
def test_windows_in_chunks_of_the_stream_score_each_target_once_in_its_chunk(lengths, context, chunk, data):
    """TTT_MODE=chunk: no window scores on both sides of a multiple of the chunk, and none exceeds the context."""
    stride = data.draw(st.integers(1, context))
    bounds = np.cumsum([0, *lengths])
    counts, document = np.zeros(bounds[-1], int), np.repeat(np.arange(len(lengths)), lengths)
    for start, size, first in tg.evaluation_windows(bounds, context, stride, chunk).tolist():
        scored = np.arange(start + first, start + size)
        assert 1 <= size <= context and len(scored) and len(set(scored // chunk)) == 1
        assert len(set(document[start : start + size])) == 1
        counts[scored] += 1
        begin = bounds[document[start]]
        assert start == begin or (scored - start + 1 > context - stride).all()
    assert (counts == 1).all()


def test_windows_without_overlap_count_like_a_division():
    windows = tg.evaluation_windows(np.array([0, 1000]), 100, 100)
    assert len(windows) == 10 and (windows[:, 2] == 0).all()


# ------------------------------------------------------------------------------------------------------------- packing


@examples(max_examples=300)
@given(st.integers(1, 30), st.data())
def test_sequences_hold_every_window_once_and_are_never_overfull(context, data):
    sizes = data.draw(st.lists(st.integers(1, context), min_size=1, max_size=60))
    windows = np.array([(0, size, 0) for size in sizes])
    sequences = tg.pack_sequences(windows, context)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(len(sizes)))
    filled = sorted(sum(sizes[i] for i in sequence) for sequence in sequences)
    assert filled[-1] <= context
    assert len(filled) < 2 or filled[0] + filled[1] > context  # no two sequences would fit into one


def test_packing_wastes_little():
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 257, 5000)
    rows = tg.pack_sequences(np.stack((sizes, sizes, sizes), 1), 256)
    assert len(rows) * 256 < sizes.sum() * 1.02


def lines_executed(compute):
    """How many lines of Python a call executes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        compute()
    finally:
        sys.settrace(before)
    return count


def test_packing_does_no_more_for_each_of_many_windows():
    """A window's row is found without a search through all rows."""
    sizes = np.random.default_rng(0).integers(1, 2049, 20_000)
    windows = np.stack((sizes, sizes, sizes), 1)
    few, many = (lines_executed(lambda n=n: tg.pack_sequences(windows[:n], 2048)) for n in (2_000, 20_000))
    assert few > 2_000 and many < 11 * few


# --------------------------------------------------------------------------------------------------------------- scores


def evaluator_of(folder, data, tokens, **knobs):
    """An Evaluator of a validation stream of these tokens."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "tokenizer.model").symlink_to(data / "tokenizer.model")
    for number, part in enumerate(np.array_split(np.array(tokens), 3)):
        write_shard(folder / f"fineweb_val_{number:06d}.bin", part)
    return tg.Evaluator(config(**{"COMPUTE_DTYPE": "float64", **knobs}, DATA_PATH=folder), single_run())


@torch.no_grad()
def naive_nats(model, tokens, context, stride):
    """Document by document and target by target: each NLL from a forward pass over its own context alone."""
    starts = [i for i, t in enumerate(tokens[:-1]) if t == tg.BOS_ID]
    starts = starts if starts and starts[0] == 0 else [0, *starts]
    total, looped = 0.0, model.config.loops
    for begin, end in pairwise([*starts, len(tokens) - 1]):
        done = begin
        while done < end:
            stop = begin + context if done == begin else done + stride
            first, stop = max(begin, stop - context), min(stop, end)  # where the document ends adds no context
            ids, targets = (torch.tensor([tokens[first + k : stop + k]]) for k in (0, 1))
            documents = documents_from(torch.zeros(1, stop - first, dtype=torch.int32))
            nll, _ = model(ids, targets, documents, looped=looped)
            total += nll[0, done - first :].double().sum().item()
            done = stop
    return total


def streams():
    """Token streams with every odd shape of documents."""
    generator = np.random.default_rng(0)

    def document(length):
        return [1, *generator.integers(4, 384, length - 1).tolist()]

    return {
        "usual": [t for n in (30, 7, 90, 1, 12, 45) for t in document(n)],
        "documents of one token": [1] * 20,
        "one long document": document(200),
        "ends with a bos": document(20) + document(9) + [1],
        "two tokens": [1, 17],
    }


@pytest.mark.parametrize("name", streams())
def test_the_score_is_that_of_a_plain_loop(name, data, tmp_path):
    tokens = streams()[name]
    for base in (TINY, RECORD_LIKE):
        model = build_model(config(base, COMPUTE_DTYPE="float64"), spread=0.1)
        for knobs in (
            dict(),
            dict(EVAL_STRIDE=8),
            dict(EVAL_SEQ_LEN=20, EVAL_STRIDE=7),
            dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=1),
        ):
            evaluator = evaluator_of(tmp_path / "data", data, tokens, **{**base, "COMPUTE_DTYPE": "float64", **knobs})
            score = evaluator(model)
            context = knobs.get("EVAL_SEQ_LEN", 32)
            expected = naive_nats(model, tokens, context, knobs.get("EVAL_STRIDE", context))
            assert score.nats == pytest.approx(expected, rel=1e-11)
            assert score.tokens == len(tokens) - 1
            text = evaluator.vocabulary.model.decode([t for t in tokens[1:] if t > 3])
            assert score.bytes > 0 or not text


def test_the_score_of_the_validation_shards(data, validation_texts):
    """Bytes are those of the text; the manifest agrees and holds the reference compressors."""
    c = config(DATA_PATH=data, COMPUTE_DTYPE="float64", EVAL_STRIDE=16)
    evaluator, model = tg.Evaluator(c, single_run()), build_model(c, spread=0.1)
    score = evaluator(model)
    assert score.bytes == sum(len(t.encode()) for t in validation_texts)
    tokens = encode(evaluator.vocabulary.model, validation_texts).tolist()
    assert score.tokens == len(tokens) - 1 and evaluator.tokens.tolist() == tokens
    assert evaluator.data_check.manifest.reference == {"xz -9": 2.5} and evaluator.notes == []
    assert score.nats == pytest.approx(naive_nats(model, tokens, 32, 16), rel=1e-11)
    assert score.bpb == pytest.approx(score.nats / math.log(2) / score.bytes, rel=1e-15)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-6)])
def test_the_batch_size_does_not_matter(dtype, tolerance, data):
    scores = []
    for size in (1, 200, 1000, 10**6):
        c = config(RECORD_LIKE, DATA_PATH=data, COMPUTE_DTYPE=dtype, VAL_BATCH_SIZE=size)
        evaluator = tg.Evaluator(c, single_run())
        assert evaluator.batch_size == max(1, min(size // 32, len(evaluator.sequences)))
        scores.append(evaluator(build_model(c, spread=0.1)).bpb)
    assert max(scores) - min(scores) < tolerance and scores[0] > 1


def test_ranks_share_the_batches_and_their_scores_add_up(data, monkeypatch):
    """The ledgers of simulated ranks are the whole, whatever their number; a rank may have nothing to do."""
    c = config(DATA_PATH=data, COMPUTE_DTYPE="float64")
    model, evaluator, ledgers = build_model(c, spread=0.1), tg.Evaluator(c, single_run()), []
    whole = evaluator(model)
    monkeypatch.setattr(tg.ScoreLedger, "close", lambda ledger, stage: ledgers.append(ledger) or 0.0)
    for world in (2, 3, 40):
        ledgers.clear()
        for rank in range(world):
            evaluator.run = single_run(rank, world)
            evaluator(model)
        assert (sum(ledger.own_counts.astype(int) for ledger in ledgers) == 1).all() and len(ledgers) == world
        assert sum(ledger.nll.sum() for ledger in ledgers) == pytest.approx(whole.nats, rel=1e-12)


def test_a_missed_target_is_noticed(data):
    c = config(DATA_PATH=data)
    evaluator = tg.Evaluator(c, single_run())
    evaluator.sequences = evaluator.sequences[:-1]
    with pytest.raises(tg.IllegalScore, match="targets were not scored exactly once"):
        evaluator(build_model(c))


def test_a_target_that_is_scored_again_is_noticed(data):
    c = config(DATA_PATH=data)
    evaluator = tg.Evaluator(c, single_run())
    evaluator.sequences = [*evaluator.sequences, evaluator.sequences[0]]
    with pytest.raises(tg.IllegalScore, match="a target was scored twice"):
        evaluator(build_model(c))


def test_windows_that_leave_a_target_out_are_noticed(data, monkeypatch):
    windows = tg.evaluation_windows
    monkeypatch.setattr(tg, "evaluation_windows", lambda *a: windows(*a)[1:])
    with pytest.raises(tg.IllegalScore, match="do not cover every target once"):
        tg.Evaluator(config(DATA_PATH=data), single_run())


def test_warming_up_computes_one_batch_and_scores_nothing(data, monkeypatch):
    c = config(DATA_PATH=data, VAL_BATCH_SIZE=128)
    evaluator, model, shapes = tg.Evaluator(c, single_run()), build_model(c), []
    monkeypatch.setattr(tg.ScoreLedger, "score", lambda *_: pytest.fail("a score was entered"))

    def forward(ids, targets, *rest, **how):
        assert not ids.any() and not targets.any()  # nothing of the text
        shapes.append(tuple(ids.shape))
        return model(ids, targets, *rest, **how)

    evaluator.warm_up(forward)
    assert shapes == [(4, 32)] == [(evaluator.batch_size, c.eval_context)]


def test_batches_hold_documents_and_their_targets(data):
    c = config(DATA_PATH=data, EVAL_STRIDE=10, VAL_BATCH_SIZE=256)
    evaluator, seen = tg.Evaluator(c, single_run()), []
    whole = evaluator.tokens
    for sequences in evaluator.batches(evaluator.sequences):
        (ids, targets, documents), scored = evaluator.batch(sequences, evaluator.windows)
        assert ids.shape == targets.shape == documents.starts.shape == scored.shape == (8, 32)
        b, t = np.nonzero(scored >= 0)
        assert np.array_equal(ids.numpy()[b, t], whole[scored[b, t]])
        assert np.array_equal(targets.numpy()[b, t], whole[scored[b, t] + 1])
        assert (documents.starts.numpy() <= np.arange(32)).all()
        seen += scored[b, t].tolist()
    assert sorted(seen) == list(range(len(whole) - 1))


def test_longer_context_is_never_worse_on_a_copying_model(data, tmp_path):
    """The context reaches the model: its NLL of a late target depends on a token at the context's distance."""
    c = config(COMPUTE_DTYPE="float64", EVAL_SEQ_LEN=24, EVAL_STRIDE=4)
    model = build_model(c)
    tokens = [1, *np.random.default_rng(1).integers(4, 384, 99).tolist()]
    before = evaluator_of(tmp_path / "data", data, tokens, EVAL_SEQ_LEN=24, EVAL_STRIDE=4)
    far = [*tokens]
    far[40] = 4 + (far[40] - 3) % 300
    after = evaluator_of(tmp_path / "data", data, far, EVAL_SEQ_LEN=24, EVAL_STRIDE=4)
    changed = []
    for evaluator in (before, after):
        nlls = np.zeros(99)
        for sequences in evaluator.batches(evaluator.sequences):
            batch, scored = evaluator.batch(sequences, evaluator.windows)
            nll = model(*batch, looped=False)[0].detach().numpy()
            nlls[scored[scored >= 0]] = nll[scored >= 0]
        changed.append(nlls)
    different = np.flatnonzero(changed[0] != changed[1])
    assert different[0] == 39 and set(range(39, 39 + 20)) <= set(different.tolist()) and different[-1] < 40 + 24


# ------------------------------------------------------------------------------------------------------------- manifest


def manifest(folder, content):
    (folder / "manifest.json").write_text(content)


@pytest.mark.parametrize(
    "content", ['{"splits": {"val": {"tokens": %d, "bytes": 1}}}', '{"splits": {"val": {"tokens": 1, "bytes": %d}}}']
)
def test_a_manifest_that_disagrees_is_refused(content, data, tmp_path):
    evaluator = evaluator_of(tmp_path / "data", data, streams()["usual"])
    right = len(evaluator.tokens), evaluator.bytes
    assert any("manifest.json does not exist" in note for note in evaluator.notes)
    assert evaluator.data_check.manifest.reference == {}
    manifest(tmp_path / "data", content % (right[0] if "1}}}" in content else right[1]))
    with pytest.raises(tg.ConfigError, match=rf"manifest\.json: says 1 .* hold ({right[0]}|{right[1]})$"):
        tg.Evaluator(evaluator.config, single_run())
    manifest(tmp_path / "data", json.dumps(dict(splits=dict(val=dict(tokens=right[0], bytes=right[1])))))
    assert tg.Evaluator(evaluator.config, single_run()).notes == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"splits": 3}',
        '{"splits": {"val": {}}}',
        '"text"',
        '{"splits": {"val": {"tokens": "many", "bytes": 1}}}',
        '{"splits": {"val": {"tokens": null, "bytes": 1}}}',
        "\xff\xfe",
    ],
)
def test_a_file_that_is_no_manifest_is_refused(content, data, tmp_path):
    evaluator = evaluator_of(tmp_path / "data", data, streams()["usual"])
    manifest(tmp_path / "data", content)
    with pytest.raises(tg.ConfigError, match=r"manifest\.json: is not a valid manifest"):
        tg.Evaluator(evaluator.config, single_run())


# -------------------------------------------------------------------------------------------------------- byte sidecar


def with_sidecars(data, folder, change=lambda counts: counts):
    """The validation shards with sidecars that count half the bytes of the table, so that one tells them apart."""
    folder.mkdir()
    for file in (data / "tokenizer.model", *sorted(data.glob("fineweb_val_0*.bin"))):
        (folder / file.name).symlink_to(file)
    write_sidecars(folder, lambda counts: change(counts // 2))
    return folder


def test_the_sidecar_replaces_the_byte_table(data, tmp_path):
    folder, plain = with_sidecars(data, tmp_path / "d"), tg.Evaluator(config(DATA_PATH=data), single_run())
    assert tg.sidecar_path(folder / "fineweb_val_000001.bin").name == "fineweb_val_bytes_000001.bin"
    for setting in ("1", "auto"):
        evaluator = tg.Evaluator(config(DATA_PATH=folder, CASEOPS_ENABLED=setting), single_run())
        assert 0.2 * plain.bytes < evaluator.bytes < 0.5 * plain.bytes and np.array_equal(
            evaluator.tokens, plain.tokens
        )
        assert any("sidecar" in note for note in evaluator.notes)


@pytest.mark.parametrize(
    "setting, change, message",
    [
        ("0", lambda x: x, "CASEOPS_ENABLED=0: .*fineweb_val_bytes_000000.bin says"),
        ("1", lambda x: x[:-1], "fineweb_val_bytes_000000.bin: does not hold the byte counts of the"),
        ("auto", lambda x: x + 1, "fineweb_val_bytes_000000.bin: does not hold"),
    ],
)
def test_a_sidecar_that_does_not_fit_is_refused(setting, change, message, data, tmp_path):
    folder = with_sidecars(data, tmp_path / "d", change)
    with pytest.raises(tg.ConfigError, match=message):
        tg.Evaluator(config(DATA_PATH=folder, CASEOPS_ENABLED=setting), single_run())


def test_a_missing_sidecar_is_named(data, tmp_path):
    folder = with_sidecars(data, tmp_path / "d")
    tg.sidecar_path(folder / "fineweb_val_000001.bin").unlink()
    for setting in ("1", "auto"):
        with pytest.raises(tg.ConfigError, match="fineweb_val_bytes_000001.bin is missing"):
            tg.Evaluator(config(DATA_PATH=folder, CASEOPS_ENABLED=setting), single_run())
    with pytest.raises(tg.ConfigError, match="CASEOPS_ENABLED=1: .*fineweb_val_bytes_000000.bin is missing"):
        tg.Evaluator(config(DATA_PATH=data, CASEOPS_ENABLED="1"), single_run())


@pytest.mark.parametrize("ranks, budget, warned", [(1, 600, False), (1, 2, True), (4, 2, False)])
def test_the_time_is_projected_before_the_start(ranks, budget, warned, data, tmp_path, monkeypatch, capsys):
    """Half a second for each batch: of one rank all, of four ranks the share of the one that has most."""
    evaluator = evaluator_of(
        tmp_path / "data",
        data,
        [1, *range(4, 84)],
        EVAL_SEQ_LEN=16,
        EVAL_STRIDE=8,
        VAL_BATCH_SIZE=32,
        EVAL_BUDGET_SECONDS=budget,
    )
    evaluator.run = single_run(0, ranks)
    computed = []
    monkeypatch.setattr(tg.Run, "time_second_call", lambda run, compute: compute() or 0.5)
    monkeypatch.setattr(tg.Evaluator, "compute", lambda evaluator, forward, batch: computed.append(batch.ids.shape))
    evaluator.project(None)
    lines = capsys.readouterr().out.splitlines()
    batches = len(evaluator.batches(evaluator.sequences))
    assert batches == 5 and computed == [(2, 16)]
    assert lines[0] == (
        f"sliding: 9 windows of up to 16 tokens, stride 8, 5 batches, projected to take "
        f"{0.5 * math.ceil(5 / ranks):.1f} s"
    )
    assert [("EVAL_BUDGET_SECONDS=2" in line) for line in lines[1:]] == [True] * warned


def test_a_run_projects_its_evaluation_before_it_trains(data, tmp_path):
    out = fork(
        ROOT / "train_gpt.py",
        dict(strings(TINY), DATA_PATH=str(data), ARTIFACT_DIR=str(tmp_path / "run"), ITERATIONS="2", WARMUP_STEPS="0"),
    ).stdout
    assert 0 < out.index("sliding: ") < out.index("projected to take") < out.index("step:1/2")
