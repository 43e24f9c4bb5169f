"""Shards, documents, batches: the same rows in the same order on any number of ranks."""

import dataclasses
import gc
import json
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import (
    HANG_SECONDS,
    NEEDS_CUDA,
    ROOT,
    TINY,
    clean_environment,
    config,
    examples,
    run_command,
    single_run,
    strings,
    write_shard,
)


@pytest.fixture
def counted(tmp_path):
    """A folder whose training stream is 0, 1, 2, ... in shards of uneven sizes, one of them empty."""
    edges = [0, 100, 101, 101, 700, 1203]
    for number, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", np.arange(start, stop))
    return tmp_path


def small(folder, **knobs):
    values = dict(TRAIN_SEQ_LEN=8, TRAIN_BATCH_TOKENS=8 * 48, MICRO_BATCH_TOKENS=8 * 4, VOCAB_SIZE=2000)
    return config(DATA_PATH=folder, **{**values, **knobs})


def loaders(c, world):
    return [tg.TrainLoader(c, single_run(rank, world)) for rank in range(world)]


def step_rows(group, step):
    """First tokens of the rows of a step, over all ranks and micro-steps, in global order."""
    firsts, layout = [], group[0].layout
    for micro in range(layout.micro_steps):
        for loader in group:
            firsts += loader.batch(step, micro).ids[:, 0].tolist()
    return firsts


# -------------------------------------------------------------------------------------------------------------- shards


def test_a_shard_is_read_as_written(tmp_path):
    tokens = np.arange(500) * 131 % 65536
    write_shard(tmp_path / "s.bin", tokens)
    shard = tg.open_shard(tmp_path / "s.bin")
    assert np.array_equal(shard, tokens) and shard.dtype == np.uint16
    write_shard(tmp_path / "e.bin", [])
    assert len(tg.open_shard(tmp_path / "e.bin")) == 0


@pytest.mark.parametrize("claimed", [499, 501, -1, 2**31 - 1])
def test_a_shard_of_another_length_than_its_header_says_is_refused(claimed, tmp_path):
    write_shard(tmp_path / "s.bin", np.arange(500), claimed=claimed)
    with pytest.raises(tg.ConfigError, match=rf"s\.bin: is damaged: {claimed} tokens, as its header says, take"):
        tg.open_shard(tmp_path / "s.bin")


def test_a_shard_of_another_version_or_byte_order_is_refused(tmp_path):
    write_shard(tmp_path / "s.bin", [1, 2], magic=20240521)
    with pytest.raises(tg.ConfigError, match="is not a token shard"):
        tg.open_shard(tmp_path / "s.bin")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 2, 0
    (tmp_path / "s.bin").write_bytes(header.tobytes())
    with pytest.raises(tg.ConfigError, match="is not a token shard"):
        tg.open_shard(tmp_path / "s.bin")
    (tmp_path / "s.bin").write_bytes(header.astype(">i4").tobytes())
    with pytest.raises(tg.ConfigError, match="is not a token shard"):
        tg.open_shard(tmp_path / "s.bin")


def test_the_stream_joins_shards(counted):
    stream = tg.TokenStream(small(counted), "train")
    assert len(stream) == 1203
    for start, stop in ((0, 1203), (0, 1), (99, 102), (100, 101), (95, 705), (1202, 1203), (101, 102)):
        part = stream.read(start, stop)
        assert part.dtype == np.uint16 and part.tolist() == list(range(start, stop))


@examples(max_examples=100)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 2), st.data())
def test_the_stream_reads_any_slice_of_any_shards(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("shards")
    for number, size in enumerate(sizes):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", sum(sizes[:number]) + np.arange(size))
    stream = tg.TokenStream(small(folder), "train")
    start = data.draw(st.integers(0, len(stream) - 1))
    stop = data.draw(st.integers(start + 1, len(stream)))
    assert stream.read(start, stop).tolist() == list(range(start, stop))


def test_shards_are_taken_in_the_order_of_their_names_and_splits_do_not_mix(tmp_path):
    for number in (11, 2, 100):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", [number])
    write_shard(tmp_path / "fineweb_val_000000.bin", [7, 8])
    write_shard(tmp_path / "fineweb_val_bytes.txt", [9])  # another name is not read
    assert tg.TokenStream(small(tmp_path), "train").read(0, 3).tolist() == [2, 11, 100]
    assert tg.TokenStream(small(tmp_path), "val").read(0, 2).tolist() == [7, 8]


def test_a_stream_of_one_token_is_refused(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1])
    with pytest.raises(tg.ConfigError, match="hold 1 tokens"):
        tg.TokenStream(small(tmp_path), "train")


# ----------------------------------------------------------------------------------------------------------- documents


def test_where_documents_begin():
    ids = np.array([[1, 5, 5, 1, 1, 5], [5, 5, 1, 5, 5, 5], [5, 5, 5, 5, 5, 1]])
    assert tg.document_starts(ids).tolist() == [[0, 0, 0, 3, 4, 4], [0, 0, 2, 2, 2, 2], [0, 0, 0, 0, 0, 5]]
    assert tg.document_starts(ids).dtype == np.int32


@examples(max_examples=100)
@given(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=40))
def test_documents_begin_at_the_last_bos(ids):
    starts = tg.document_starts(np.array([ids]))[0].tolist()
    for t, start in enumerate(starts):
        assert start == max([p for p in range(t + 1) if ids[p] == tg.BOS_ID], default=0)


# -------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_holds_rows_their_successors_and_their_documents(data):
    c = config(DATA_PATH=data)
    loader = tg.TrainLoader(c, single_run())
    whole, seen = loader.stream.read(0, len(loader.stream)), 0
    for step in range(3):
        for micro in range(loader.layout.micro_steps):
            ids, targets, documents = loader.batch(step, micro)
            assert ids.shape == targets.shape == documents.starts.shape == (loader.layout.micro_sequences, 32)
            assert (ids.dtype, targets.dtype, documents.starts.dtype) == (torch.int64, torch.int64, torch.int32)
            assert torch.equal(ids[:, 1:], targets[:, :-1])
            assert np.array_equal(documents.starts.numpy(), tg.document_starts(ids.numpy()))
            places = [loader.parts(p, 32)[0][0] for p in loader.sequence_numbers(step, micro)]
            for row, start in enumerate(places):
                assert np.array_equal(ids[row], whole[start : start + 32])
                assert np.array_equal(targets[row], whole[start + 1 : start + 33])
            seen += int((documents.starts > 0).any())
    assert seen  # some rows hold more than one document


@pytest.mark.parametrize("micro_tokens", [8, 16, 24, 8 * 48])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_global_batch_depends_neither_on_the_ranks_nor_on_the_micro_batches(world, micro_tokens, counted):
    c = small(counted, MICRO_BATCH_TOKENS=micro_tokens)
    group, reference = loaders(c, world), loaders(small(counted), 1)
    for step in (0, 1, 2, 3, 7):  # an epoch has 150 rows: steps 3 and 7 cross from one to the next
        assert step_rows(group, step) == step_rows(reference, step)
    assert len(set(step_rows(reference, 0))) == 48


def test_ranks_share_the_rows_out_without_overlap(counted):
    group = loaders(small(counted), 4)
    places = [
        p for loader in group for micro in range(loader.layout.micro_steps) for p in loader.sequence_numbers(5, micro)
    ]
    assert sorted(places) == list(range(5 * 48, 6 * 48))


def test_each_epoch_visits_every_row_once_in_another_order(counted):
    loader = loaders(small(counted, TRAIN_BATCH_TOKENS=8 * 30), 1)[0]
    assert loader.sequences == 150 == (1203 - 1) // 8
    epochs = [[first for step in range(5 * n, 5 * n + 5) for first in step_rows([loader], step)] for n in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [8 * row for row in range(150)]
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_every_target_of_the_stream_is_trained_on_but_the_last_few(counted):
    loader = loaders(small(counted, TRAIN_BATCH_TOKENS=8 * 150), 1)[0]
    batches = [loader.batch(0, micro).targets for micro in range(loader.layout.micro_steps)]
    assert torch.cat(batches).flatten().sort().values.tolist() == list(range(1, 1201))


def test_batches_do_not_depend_on_what_was_read_before(counted):
    forward, backward = loaders(small(counted), 1)[0], loaders(small(counted), 1)[0]
    steps = [0, 3, 6, 9]
    ahead = {step: step_rows([forward], step) for step in steps}
    assert {step: step_rows([backward], step) for step in reversed(steps)} == ahead


def test_seeds_give_other_orders(counted):
    rows = {seed: step_rows(loaders(small(counted, SEED=seed), 1), 0) for seed in (0, 1, 42, 2**31 - 1)}
    assert len({tuple(r) for r in rows.values()}) == 4


# ----------------------------------------------------------------------------------------------------------- read ahead


def arrays_of(batch):
    return [t.numpy() for t in (*batch[:2], *batch.documents)]


@examples(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 11)), max_size=12), st.integers(1, 5))
def test_reading_ahead_changes_no_bit_whatever_is_asked_for(data, keys, depth):
    """In order, from the beginning again as after a warmup, and at random, as calibration and tests do."""
    plain, ahead = (
        tg.TrainLoader(config(DATA_PATH=data, MICRO_BATCH_TOKENS=64, READ_AHEAD=n), single_run()) for n in (0, depth)
    )
    order = [(step, micro) for step in range(2) for micro in range(plain.layout.micro_steps)]
    for key in (*order, *order[:5], *keys, *order[-3:]):
        for expected, found in zip(arrays_of(plain.batch(*key)), arrays_of(ahead.batch(*key)), strict=True):
            assert expected.dtype == found.dtype and np.array_equal(expected, found)
        assert len(ahead.ahead.pending) == depth and not plain.ahead.pending
    ahead.ahead.close()


def test_the_next_batches_are_made_without_being_asked_for():
    made, threads, done = [], set(), threading.Semaphore(0)

    def make(key):
        made.append(key)
        threads.add(threading.get_ident())
        done.release()
        return -key

    ahead = tg.Prefetcher(make, lambda key: key + 1, 2)
    assert ahead(5) == -5
    for _ in range(3):
        assert done.acquire(timeout=HANG_SECONDS)
    assert made == [5, 6, 7] and threads and threading.get_ident() not in threads
    assert ahead(6) == -6 and done.acquire(timeout=HANG_SECONDS) and made == [5, 6, 7, 8]
    assert ahead(0) == 0 and set(ahead.pending) == {1, 2}  # another place: what was guessed is dropped
    ahead.close()
    assert ahead(3) == -3 and not ahead.pending  # from then on without a thread


def test_an_error_on_the_thread_is_raised_where_its_batch_is_asked_for():
    broken = {3}

    def make(key):
        if key in broken:
            raise OSError(5, f"Input/output error at {key}")
        return key

    ahead = tg.Prefetcher(make, lambda key: key + 1, 2)
    assert [ahead(key) for key in (0, 1, 2)] == [0, 1, 2]  # the thread has met 3, and nobody has asked for it
    for _ in range(2):
        with pytest.raises(OSError, match="error at 3"):
            ahead(3)
    assert ahead(4) == 4
    broken.clear()
    assert ahead(3) == 3
    ahead.close()


def readers():
    return {thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")}


def test_the_thread_ends_with_its_loader(data):
    before = readers()
    loader = tg.TrainLoader(config(DATA_PATH=data), single_run())
    assert readers() == before  # nothing starts before it is needed
    loader.batch(0, 0)
    assert len(readers() - before) == 1
    loader.ahead.close()
    assert readers() <= before
    loader = tg.TrainLoader(config(DATA_PATH=data), single_run())
    loader.batch(0, 0)
    (thread,) = readers() - before
    del loader  # as after an exception, where nobody closes it
    for _ in range(20):
        gc.collect()
        thread.join(timeout=1)
        if not thread.is_alive():
            break
    assert not thread.is_alive()


CRASH = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from helpers import config, single_run, tg
loader = tg.TrainLoader(config(DATA_PATH=sys.argv[2]), single_run())
loader.batch(0, 0)
print("reading", flush=True)
raise SystemExit(7)
"""


def test_a_process_that_fails_while_reading_ahead_ends(data):
    done = run_command([sys.executable, "-c", CRASH, ROOT, data], env=clean_environment({}))
    assert (done.returncode, done.stdout, done.stderr) == (7, "reading\n", "")


def test_a_training_is_the_same_with_and_without_and_says_how_long_data_stalled_it(data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    models = []
    for depth in (0, 3):
        values = dict(
            TINY,
            DATA_PATH=data,
            READ_AHEAD=depth,
            RUN_ID=f"ahead{depth}",
            MODE="train",
            WARMUP_STEPS=1,
            NEFTUNE_ALPHA=5,
            ITERATIONS=4,
        )
        assert tg.main([], strings(values)) == 0
        folder = tmp_path / "logs" / f"ahead{depth}"
        models.append((folder / "model.pgolf").read_bytes())
        share = json.loads((folder / "summary.json").read_text())["data_wait_share"]
        log = (folder / "log.txt").read_text()
        assert 0 < share < 1 and f"data stall: {share:.2%} of step time" in log
        assert f"read_ahead:{depth}" in log
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["data_wait_share"] for row in rows if "data_wait_share" in row] == [share]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)],
)
def test_batches_read_ahead_on_a_device_are_those_of_the_cpu(device, data):
    run = single_run()
    expected = tg.TrainLoader(config(DATA_PATH=data, READ_AHEAD=0), run)
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    loader = tg.TrainLoader(config(DATA_PATH=data), dataclasses.replace(run, device=place))
    for key in [(step, micro) for step in range(20) for micro in range(expected.layout.micro_steps)]:
        batch = loader.batch(*key)
        for theirs, ours in zip(
            (*expected.batch(*key)[:2], *expected.batch(*key).documents), (*batch[:2], *batch.documents), strict=True
        ):
            assert ours.device == place and torch.equal(ours.cpu(), theirs)
    loader.ahead.close()


# ---------------------------------------------------------------------------------------------------------------- noise


def noise_of(c, world, step=0):
    """The noise of a step's rows in global order."""
    group = loaders(c, world)
    noises = [loader.noise(step, micro) for micro in range(group[0].layout.micro_steps) for loader in group]
    return torch.cat([noise.reach * tg.uniform_noise(noise.keys, 8, 16) for noise in noises])


def lowbias32(x):
    """The hash in Python's integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def test_noise_is_a_hash_of_its_place_and_its_sequence():
    keys = torch.tensor([[5, 7], [-1, 2**31 - 1], [-(2**31), -3]], dtype=torch.int32)
    noise = tg.uniform_noise(keys, 3, 4)
    for b, (first, second) in enumerate(keys.tolist()):
        for place in range(12):
            bits = lowbias32((lowbias32(place ^ (first & 0xFFFFFFFF)) + second) & 0xFFFFFFFF)
            signed = bits - (bits >> 31 << 32)
            assert noise[b].flatten()[place] == (signed >> 8) * 2.0**-23


def test_noise_is_uniform_and_independent():
    """Moments, and products of neighbours along every axis, within five standard deviations."""
    keys = torch.arange(32, dtype=torch.int32).view(16, 2)  # as alike as keys can be
    noise = tg.uniform_noise(keys, 256, 128).double()
    bound = 5 / noise.numel() ** 0.5
    for power, mean in ((1, 0), (2, 1 / 3), (3, 0), (4, 1 / 5)):
        assert abs((noise**power).mean() - mean) < bound
    for axis in range(3):
        for distance in (1, 2, 8):
            ahead = noise.narrow(axis, distance, noise.size(axis) - distance)
            assert abs((ahead * noise.narrow(axis, 0, ahead.size(axis))).mean()) < bound


@pytest.mark.parametrize("world", [2, 3, 8])
def test_noise_does_not_depend_on_the_ranks(world, counted):
    c = small(counted, NEFTUNE_ALPHA=5.0)
    assert torch.equal(noise_of(c, world), noise_of(c, 1))
    assert torch.equal(noise_of(small(counted, NEFTUNE_ALPHA=5.0, MICRO_BATCH_TOKENS=8), world), noise_of(c, 1))


def test_noise_is_uniform_of_the_specified_size(counted):
    c = small(counted, NEFTUNE_ALPHA=5.0)
    noise = torch.cat([noise_of(c, 1, step) for step in range(4)])
    reach = 5 / (c.train_seq_len * c.model_dim) ** 0.5
    assert noise.abs().max() <= reach and noise.abs().max() > 0.99 * reach
    assert abs(noise.mean()) < 0.02 * reach and abs(noise.std() / reach - 3**-0.5) < 0.01


def test_each_row_step_and_seed_has_noise_of_its_own(counted):
    knobs = dict(NEFTUNE_ALPHA=5.0)
    rows = [row for step in (0, 1) for row in noise_of(small(counted, **knobs), 1, step)]
    for seed in (8, 9, 2**24, 2**31 - 1):
        rows += noise_of(small(counted, SEED=seed, **knobs), 1)
    flat = {tuple(row.flatten().tolist()) for row in rows}
    assert len(flat) == len(rows) == 6 * 48


def test_no_noise_without_alpha(counted):
    loader = loaders(small(counted), 1)[0]
    assert loader.noise(0, 0) is None
