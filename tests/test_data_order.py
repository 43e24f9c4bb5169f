"""DATA_ORDER and TRAIN_SEQ_SCHEDULE: whole documents without gaps, the same on any number of ranks, at any context."""

import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import TINY, config, examples, fork_script, single_run, write_shard

LENGTH = 16


def write_documents(folder, lengths, shards=1):
    """Training shards of documents of these lengths. Every token but BOS is its place in the stream, above 1."""
    tokens = np.arange(sum(lengths)) % 60000 + 2
    tokens[np.cumsum([0, *lengths[:-1]])] = tg.BOS_ID
    for number, part in enumerate(np.array_split(tokens, shards)):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", part)
    return tokens


def loader_of(folder, rank=0, world=1, **knobs):
    values = dict(
        TRAIN_SEQ_LEN=LENGTH,
        TRAIN_BATCH_TOKENS=LENGTH * 8,
        MICRO_BATCH_TOKENS=LENGTH * 2,
        VOCAB_SIZE=65536,
        DATA_ORDER="documents",
    )
    return tg.TrainLoader(config(DATA_PATH=folder, **{**values, **knobs}), single_run(rank, world))


@pytest.fixture
def some(tmp_path):
    """300 documents of 1 to 59 tokens in three shards, and their tokens."""
    lengths = np.random.default_rng(0).integers(1, 60, 300).tolist()
    return tmp_path, write_documents(tmp_path, lengths, 3), lengths


def rows(loader, step, context=None):
    """(ids, targets, starts) of this rank's sequences of a step."""
    batches = [loader.batch(step, micro, context) for micro in range(loader.layout.micro_steps)]
    return [torch.cat([pick(b) for b in batches]).numpy() for pick in (lambda b: b.ids, lambda b: b.targets)] + [
        torch.cat([b.documents.starts for b in batches]).numpy()
    ]


# ------------------------------------------------------------------------------------------------------------- packing


@examples(max_examples=200)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.integers(0, 15))
def test_pieces_fill_their_sequences_exactly_and_few_are_cut(lengths, spare):
    lengths = [*lengths, *[1] * (-sum(lengths) % 16)]
    sequences = sum(lengths) // 16
    parts = tg.pack_pieces(np.array(lengths), sequences, 16)
    assert np.bincount(parts[:, 0], parts[:, 3], sequences).tolist() == [16] * sequences
    for piece, length in enumerate(lengths):  # its parts follow each other, and are all of it
        own = parts[parts[:, 1] == piece]
        assert own[:, 2].tolist() == [0, *np.cumsum(own[:, 3])[:-1]] and own[:, 3].sum() == length
    assert len(parts) - len(lengths) <= sequences  # at most one cut for each sequence
    assert (parts[:, 3] > 0).all()


def test_pieces_that_fit_are_not_cut():
    parts = tg.pack_pieces(np.array([9, 7, 10, 6, 12, 4, 16, 8, 8]), 5, 16)
    assert len(parts) == 9


@pytest.mark.parametrize("context", [16, 5])
def test_an_epoch_holds_every_token_once(some, context):
    folder, tokens, _ = some
    loader = loader_of(folder)
    seen = np.zeros(len(tokens), int)
    for epoch in (0, 1):
        for place in range(loader.sequences):
            parts = loader.parts(epoch * loader.sequences + place, context)
            assert sum(count for _, count in parts) == LENGTH and max(count for _, count in parts) <= context
            for start, count in parts:
                seen[start : start + count] += 1
    assert seen.max() == 2 and (seen < 2).sum() <= 2 * LENGTH + 1  # the end of an epoch fills no sequence


def test_windows_are_packed_for_themselves(some, monkeypatch):
    folder, tokens, _ = some
    monkeypatch.setattr(tg, "PACK_WINDOW", 7)
    monkeypatch.setattr(tg, "PACK_BLOCK", 13)
    loader = loader_of(folder)
    seen = np.zeros(len(tokens), int)
    for place in reversed(range(loader.sequences)):  # in any order
        for start, count in loader.parts(place, LENGTH):
            seen[start : start + count] += 1
    assert seen.max() == 1 and (seen == 0).sum() <= LENGTH
    ahead = [loader_of(folder).parts(place, LENGTH) for place in (60, 3, 60)]
    assert ahead[0] == ahead[2] == loader.parts(60, LENGTH)


def test_orders_differ_by_epoch_and_seed_and_are_not_the_streams(some):
    folder, _, _ = some

    def epoch(number, seed):
        loader = loader_of(folder, SEED=seed)
        n = loader.sequences
        return [loader.parts(p, LENGTH)[0][0] for p in range(number * n, number * n + n)]

    orders = [epoch(0, 1), epoch(1, 1), epoch(0, 2)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("order", ["documents", "rows", "stream"])
def test_targets_follow_their_tokens_and_documents_begin_where_they_do(some, order):
    folder, tokens, _ = some
    loader = loader_of(folder, DATA_ORDER=order)
    place = {token: i for i, token in enumerate(tokens.tolist()) if token != tg.BOS_ID}
    for step in range(6):
        ids, targets, starts = rows(loader, step)
        for row in range(len(ids)):
            for t, start in enumerate(starts[row]):
                token, target = int(ids[row, t]), int(targets[row, t])
                if token != tg.BOS_ID:
                    assert target == tokens[place[token] + 1]
                assert 0 <= t - start < LENGTH
                assert start == t or ids[row, t] != tg.BOS_ID
                if t > start and token != tg.BOS_ID and int(ids[row, t - 1]) != tg.BOS_ID:
                    assert place[int(ids[row, t - 1])] == place[token] - 1  # a document's tokens lie together


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("order", ["documents", "rows"])
def test_a_step_is_the_same_on_any_number_of_ranks(some, order, world):
    folder, _, _ = some
    whole = loader_of(folder, DATA_ORDER=order, MICRO_BATCH_TOKENS=LENGTH * 8)
    group = [loader_of(folder, rank, world, DATA_ORDER=order) for rank in range(world)]
    for step in (0, 5, 70):
        for context in (None, 7):
            shares = [rows(loader, step, context) for loader in group]
            ours = sorted(map(bytes, np.concatenate([np.dstack(share) for share in shares])))
            assert ours == sorted(map(bytes, np.dstack(rows(whole, step, context))))


def test_the_stream_is_read_as_it_lies(some):
    folder, tokens, _ = some
    loader = loader_of(folder, DATA_ORDER="stream", TRAIN_BATCH_TOKENS=LENGTH * 4, MICRO_BATCH_TOKENS=LENGTH * 4)
    for step in range(5):
        ids, targets, starts = rows(loader, step)
        n = LENGTH * 4
        assert ids.shape == (1, n)
        assert np.array_equal(ids[0], tokens[step * n : step * n + n])
        assert np.array_equal(targets[0], tokens[step * n + 1 : step * n + n + 1])
        context = np.arange(n) - starts[0]
        assert context.max() == LENGTH - 1  # documents go on over the rows, up to a whole context
        document = np.arange(n) - tg.document_starts(ids)[0]
        assert np.array_equal(context, document % LENGTH)
    # From the last sequence to the first: no document goes on there.
    last = loader.sequences - 1
    assert loader.read_sequences(range(last, last + 2)).documents.starts[0, LENGTH].item() == LENGTH


def test_context_that_documents_keep(some):
    """Packed documents keep nearly all of the context that they could have; rows lose much of it."""
    folder, _, lengths = some
    pieces = [min(LENGTH, left) for n in lengths for left in range(n, 0, -LENGTH)]
    best = sum(n * (n + 1) / 2 for n in pieces) / sum(pieces)
    kept = {order: loader_of(folder, DATA_ORDER=order).mean_context() / best for order in ("documents", "rows")}
    assert 0.97 < kept["documents"] <= 1.001 and kept["rows"] < 0.95


def test_mean_context_counts_the_token_itself(tmp_path):
    write_documents(tmp_path, [4] * 40 + [1])
    assert loader_of(tmp_path).mean_context() == pytest.approx(2.5)
    assert loader_of(tmp_path).mean_context(2) == pytest.approx(1.5)


@pytest.mark.parametrize("order", ["documents", "rows", "stream"])
def test_a_context_bounds_what_a_token_sees(some, order):
    folder, _, _ = some
    loader = loader_of(folder, DATA_ORDER=order)
    for context in (1, 3, LENGTH):
        _, _, starts = rows(loader, 2, context)
        assert (np.arange(starts.shape[1]) - starts).max() == context - 1


def test_blocks_of_attention_do_not_pay_for_the_longest_document_of_a_batch():
    """Scores that are computed for a long document and short ones together: those for each of them alone."""

    def area(lengths):
        starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths).astype(np.int32)
        shapes = tg.document_blocks(torch.from_numpy(starts)[None], 1, 1).shapes
        ends = np.cumsum([width for _, width in shapes])
        return sum(n * width * end for (n, width), end in zip(shapes, ends, strict=True))

    short, long = [64] * 32, [2048]
    assert area(long + short) == area(short + long) == area(long) + area(short)
    assert area(short) == 32 * area([64]) < area(long) / 10


def test_a_token_beyond_the_vocabulary_names_its_file(some):
    folder, _, _ = some
    loader = loader_of(folder, VOCAB_SIZE=70)
    with pytest.raises(
        tg.ConfigError, match=r"fineweb_train_00000\d\.bin: was rewritten during the run: it holds token"
    ):
        loader.batch(0, 0)


# ----------------------------------------------------------------------------------------------------------- the index


def test_documents_are_found_in_all_shards(tmp_path):
    tokens = write_documents(tmp_path, [5, 1, 7, 70000, 3], 4)
    stream = loader_of(tmp_path).stream
    assert tg.find_documents(stream, 2).tolist() == np.flatnonzero(tokens == tg.BOS_ID).tolist()
    write_shard(tmp_path / "fineweb_train_000000.bin", [7, 8, 1, 9])  # a stream that begins inside a document
    assert tg.find_documents(loader_of(tmp_path).stream, 1).tolist()[:2] == [0, 2]


def digests_of(loader):
    return {path.name: tg.sha256_of(path) for path in loader.stream.paths}


def test_the_index_is_made_once_and_again_for_other_shards(some, monkeypatch):
    folder, _, lengths = some
    first = loader_of(folder)
    first.use_index(digests_of(first))
    path = folder / tg.DOCUMENT_INDEX
    assert first.notes == [f"document index: {len(lengths)} documents, made: {path}"]
    with monkeypatch.context() as patch:
        patch.setattr(tg, "find_documents", None)  # not looked for a second time
        second = loader_of(folder)
        second.use_index(digests_of(second))
    assert second.notes == [f"document index: {len(lengths)} documents, read: {path}"]
    assert second.parts(5, LENGTH) == first.parts(5, LENGTH) == loader_of(folder).parts(5, LENGTH)
    write_documents(folder, lengths[::-1], 3)
    third = loader_of(folder)
    third.use_index(digests_of(third))
    assert "made" in third.notes[0] and np.array_equal(np.diff(third.documents.starts)[:-1], lengths[::-1][:-1])


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "link", "folder"])
def test_a_damaged_index_is_made_again(some, damage):
    folder, _, lengths = some
    path = folder / tg.DOCUMENT_INDEX
    loader = loader_of(folder)
    loader.use_index(digests_of(loader))
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "link":
        path.symlink_to(path.name)
    else:
        data[-3] ^= 1
        path.write_bytes(dict(flipped=data, short=data[:-9], empty=b"")[damage])
    again = loader_of(folder)
    again.use_index(digests_of(again))
    assert np.array_equal(again.documents.starts, loader.documents.starts)
    assert f"{len(lengths)} documents" in again.notes[0] and "read" not in again.notes[0].split(str(folder))[0]


def test_a_folder_that_cannot_be_written_costs_the_file_alone(some, monkeypatch):
    folder, _, _ = some

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tg, "write_tensors", refuse)
    loader = loader_of(folder)
    loader.use_index(digests_of(loader))
    assert "(Read-only file system)" in loader.notes[0] and loader.parts(0, LENGTH)


def test_memory_and_time_for_many_documents_are_small():
    """A million documents: what an epoch keeps is 4 bytes for each, and a window's parts."""
    lengths = np.random.default_rng(0).integers(100, 2000, 1_000_000)
    starts = np.cumsum(lengths) - lengths
    order = tg.DocumentOrder(starts, int(lengths.sum()), 2048, 0)
    last = order.parts(0, order.sequences - 1, 2048)
    kept, firsts, used = order.epoch(0, 2048)
    assert sum(count for _, count in last) == 2048
    assert kept.nbytes == 4 * len(lengths) == 2 * order.pieces(2048)[1].nbytes and firsts.nbytes + used.nbytes < 10_000
    assert order.window.cache_info().currsize == 1 and not [t for t in threading.enumerate() if "pack" in t.name]


# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize(
    "value", ["1024", "8@0.5", "8@0.5,16@0.4,16@1", "0@1", "17@1", "8@x,16@1", "8@0.5;16@1", "8@0,16@1", "8@0.5,16@nan"]
)
def test_schedules_that_make_no_sense_are_refused(value, data):
    with pytest.raises(tg.ConfigError, match="TRAIN_SEQ_SCHEDULE"):
        config(DATA_PATH=data, TRAIN_SEQ_LEN=16, TRAIN_SEQ_SCHEDULE=value)


def test_context_follows_its_schedule_and_the_rate_rises_again(data):
    knobs = dict(TRAIN_SEQ_LEN=32, TRAIN_SEQ_SCHEDULE="8@0.1,16@0.7,32@1", ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=0)
    c = config(DATA_PATH=data, SEQ_CHANGE_WARMUP_STEPS=32, **knobs)
    at = [tg.Progress(step, 0.0) for step in (0, 99, 100, 699, 700, 999, 1000)]
    assert [tg.context_at(p, c) for p in at] == [8, 8, 16, 16, 32, 32, 32]
    rates = [tg.context_warmup(tg.Progress(step, 0.0), c) for step in (0, 99, 100, 115, 131, 400, 700, 731, 999)]
    assert rates == pytest.approx([1, 1, 1 / 32, 16 / 32, 1, 1, 1 / 32, 1, 1])
    assert tg.context_warmup(tg.Progress(100, 0.0), config(DATA_PATH=data, SEQ_CHANGE_WARMUP_STEPS=0, **knobs)) == 1
    timed = config(DATA_PATH=data, **{**knobs, "ITERATIONS": 100000, "MAX_WALLCLOCK_SECONDS": 100})
    timed = tg.dataclasses.replace(timed, gptq_reserve_seconds=0.0)
    assert tg.context_at(tg.Progress(7, 9.9), timed) == 8 and tg.context_at(tg.Progress(7, 10.1), timed) == 16


def test_a_run_says_what_context_its_tokens_have(data, tmp_path):
    folder = tmp_path / "run"
    knobs = dict(DATA_ORDER="documents", TRAIN_SEQ_SCHEDULE="8@0.5,32@1", ITERATIONS=4, ARTIFACT_DIR=folder)
    result = fork_script({**TINY, "DATA_PATH": data, "MODE": "train", **knobs})
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if "context: at most" in line]
    assert [line.split(" context:")[0] for line in said] == [
        "step:0 data_order:documents",
        "step:2 data_order:documents",
    ]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    means = [(row["context"], row["mean_context"]) for row in rows if "mean_context" in row]
    assert [context for context, _ in means] == [8, 32] and 1 < means[0][1] <= 8 < means[1][1] < 32
