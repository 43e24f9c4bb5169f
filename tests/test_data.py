"""Shards, documents, batches: the same rows in the same order on any number of ranks."""

import numpy as np
import pytest
import torch
import train_gpt as tg
from helpers import config, examples, single_run, write_shard
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def counted(tmp_path):
    """A folder whose training stream is 0, 1, 2, ... in shards of uneven sizes, one of them empty."""
    edges = [0, 100, 101, 101, 700, 1203]
    for number, (start, stop) in enumerate(zip(edges, edges[1:])):
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


@pytest.mark.parametrize("promised", [499, 501, -1, 2**31 - 1])
def test_a_shard_of_another_length_than_promised_is_refused(promised, tmp_path):
    write_shard(tmp_path / "s.bin", np.arange(500), promised=promised)
    with pytest.raises(tg.ConfigError, match=r"s\.bin: is damaged: the header promises"):
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
            assert ids.shape == targets.shape == documents.starts.shape == (loader.layout.micro_rows, 32)
            assert (ids.dtype, targets.dtype, documents.starts.dtype) == (torch.int64, torch.int64, torch.int32)
            assert torch.equal(ids[:, 1:], targets[:, :-1])
            assert np.array_equal(documents.starts.numpy(), tg.document_starts(ids.numpy()))
            places = [loader.row_index(p) * 32 for p in loader.row_numbers(step, micro)]
            for row, start in enumerate(places):
                assert np.array_equal(ids[row], whole[start:start + 32])
                assert np.array_equal(targets[row], whole[start + 1:start + 33])
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
    places = [p for loader in group for micro in range(loader.layout.micro_steps) for p in loader.row_numbers(5, micro)]
    assert sorted(places) == list(range(5 * 48, 6 * 48))


def test_each_epoch_visits_every_row_once_in_another_order(counted):
    loader = loaders(small(counted, TRAIN_BATCH_TOKENS=8 * 30), 1)[0]
    assert loader.rows == 150 == (1203 - 1) // 8
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


# ---------------------------------------------------------------------------------------------------------------- noise


def noise_of(c, world, step=0):
    """The noise of a step's rows in global order."""
    group = loaders(c, world)
    return torch.cat([loader.noise(step, micro, (8, 16)) for micro in range(group[0].layout.micro_steps)
                      for loader in group])


@pytest.mark.parametrize("world", [2, 3, 8])
def test_noise_does_not_depend_on_the_ranks(world, counted):
    c = small(counted, NEFTUNE_ALPHA=5.0)
    assert torch.equal(noise_of(c, world), noise_of(c, 1))
    assert torch.equal(noise_of(small(counted, NEFTUNE_ALPHA=5.0, MICRO_BATCH_TOKENS=8), world), noise_of(c, 1))


def test_noise_is_uniform_of_the_specified_size(counted):
    c = small(counted, NEFTUNE_ALPHA=5.0)
    noise = torch.cat([noise_of(c, 1, step) for step in range(4)])
    reach = 5 / (8 * 16) ** 0.5
    assert noise.abs().max() <= reach and noise.abs().max() > 0.99 * reach
    assert abs(noise.mean()) < 0.02 * reach and abs(noise.std() / reach - 3 ** -0.5) < 0.01


def test_each_row_step_and_seed_has_noise_of_its_own(counted):
    knobs = dict(NEFTUNE_ALPHA=5.0)
    rows = [row for step in (0, 1) for row in noise_of(small(counted, **knobs), 1, step)]
    for seed in (8, 9, 2**24, 2**31 - 1):  # a generator on a CPU keeps 32 bits of its seed only
        rows += noise_of(small(counted, SEED=seed, **knobs), 1)
    flat = {tuple(row.flatten().tolist()) for row in rows}
    assert len(flat) == len(rows) == 6 * 48


def test_no_noise_without_alpha(counted):
    loader = loaders(small(counted), 1)[0]
    assert loader.noise(0, 0, (8, 16)) is None
