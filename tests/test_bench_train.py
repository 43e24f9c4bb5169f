"""bench/train.py: what it prints and writes, that its FLOPs are those that torch counts, and its errors."""

import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from helpers import (
    POLY_LIKE,
    RECORD_LIKE,
    ROOT,
    TINY,
    build_model,
    config,
    documents_from,
    fork,
    random_batch,
    single_run,
    tg,
)

sys.path.append(str(ROOT / "bench"))
import train as bench  # noqa: E402

SCRIPT = ROOT / "bench" / "train.py"
SHAPE = dict(RECORD_LIKE, COMPUTE_DTYPE="float32", TRAIN_BATCH_TOKENS=512)
VARIANTS = [
    ("plain", "forward+backward"),
    ("plain", "whole step"),
    ("looped", "forward+backward"),
    ("looped", "whole step"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command, run tiny: (its output, the JSON object of its file)."""
    folder = tmp_path_factory.mktemp("bench")
    done = fork(
        SCRIPT,
        SHAPE,
        "--repeats",
        3,
        "--warmup",
        1,
        "--document-tokens",
        12,
        "--json",
        folder / "result.json",
        cwd=folder,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [path.name for path in folder.iterdir()] == ["result.json"]
    return done.stdout, json.loads((folder / "result.json").read_text())


def test_the_last_line_is_the_json_object_of_the_file(finished):
    out, result = finished
    assert json.loads(out.splitlines()[-1]) == result


def test_every_field_says_what_was_measured_and_on_what(finished):
    _, r = finished
    assert r["torch"] == torch.__version__ and r["chip"] == tg.hardware(single_run()) and r["dtype"] == "float32"
    assert r["backend"] == dict(attention="blocked", compile=False, triton=False) and r["cuda"] is None
    assert r["parameters"] == tg.parameter_count(config(SHAPE))
    assert (r["tokens_per_step"], r["micro_steps"], r["micro_sequences"]) == (512, 2, 8)  # as TRAIN_BATCH_TOKENS says
    assert r["layers_run"] == dict(plain=[0, 1, 2, 3, 4, 5], looped=[0, 1, 2, 1, 2, 1, 2, 3, 4, 5])
    assert 1 < r["mean_context"] < 12 and r["process_peak_memory_bytes"] > 2**20
    assert [(x["order"], x["part"]) for x in r["rows"]] == VARIANTS


def test_two_ranks_share_a_step_and_print_it_once(tmp_path):
    """Each rank takes its micro-batch unless TRAIN_BATCH_TOKENS is given; tokens are those of both."""
    shape = {name: value for name, value in SHAPE.items() if name != "TRAIN_BATCH_TOKENS"}
    options = ("--repeats", 2, "--warmup", 1, "--document-tokens", 12, "--json", tmp_path / "result.json")
    done = fork(SCRIPT, shape, *options, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / "result.json").read_text())
    assert (r["ranks"], r["tokens_per_step"], r["micro_steps"], r["micro_sequences"]) == (2, 512, 1, 8)
    assert [(x["order"], x["part"]) for x in r["rows"]] == VARIANTS and r["first_round_seconds"] > 0
    assert all(x["tokens_per_second"] == pytest.approx(512 / x["ms_per_step"] * 1000) for x in r["rows"])
    assert done.stdout.count("tokens a step in") == 1 and "2 ranks: tokens are those of all" in done.stdout


def test_every_row_follows_from_its_times(finished):
    _, r = finished
    for x in r["rows"]:
        assert x["repeats"] == 3 and 0 < x["ms_lowest"] <= x["ms_per_step"] <= x["ms_highest"]
        assert x["tokens_per_second"] == pytest.approx(512 / x["ms_per_step"] * 1000)
        assert x["mfu"] is None and x["peak_memory_bytes"] is None  # no chip whose peak is known; one process, one peak
        model = tg.new_model(config(SHAPE))
        variant = next(v for v in tg.all_step_variants(config(SHAPE)) if v.title(config(SHAPE)) == x["order"])
        assert x["flops_per_token"] == bench.flops_per_token(model, variant, r["mean_context"])


def test_the_table_says_the_same(finished):
    out, r = finished
    for x in r["rows"]:
        row = rf"^{x['order']} +{re.escape(x['part'])} +{x['ms_per_step']:.1f} .* {x['tokens_per_second']:.0f} "
        assert re.search(row, out, re.M), out
    assert r["formula"] in out and r["not_counted"] in out and "MFU is not given" in out
    assert f"mean context {r['mean_context']:.1f}" in out and "peak memory is" in out


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        dict(TIE_EMBEDDINGS=0),
        dict(SPARSE_ATTN_GATE_ENABLED=0, SMEAR_GATE_ENABLED=0),
        dict(SPARSE_ATTN_GATE_ENABLED=0, GATED_ATTN_ENABLED=1, MLP_MULT=1.5),
        dict(BIGRAM_VOCAB_SIZE=11, VE_DIM=6),
        POLY_LIKE,
    ],
)
def test_flops_are_those_that_torch_counts(knobs, looped, monkeypatch):
    """The matrix products of the linear part exactly, without the zeros that fill up narrow ones.

    Attention's too: the first 16 queries of a document of 32 tokens meet 16 keys, the others 32.
    """
    monkeypatch.setattr(tg, "linear", F.linear)
    c = config({**SHAPE, **knobs}, ATTENTION="blocked", COMPUTE_DTYPE="float32")
    model, batch = build_model(c), random_batch(c, 4, c.train_seq_len)
    one = documents_from(torch.zeros_like(batch.documents.starts))
    batch = batch._replace(documents=one)
    with FlopCounterMode(display=False) as counter:
        model(*batch, looped=looped)[0].sum().backward()
    counted = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    tokens = batch.ids.numel()
    layers = len(tg.execution_order(c, looped))
    assert counted == {
        "aten.mm": 6 * bench.matmul_parameters(model, looped) * tokens,
        "aten.bmm": bench.attention_flops(c, layers * (16 + 32) / 2) * tokens,
    }


def test_frozen_layers_cost_no_gradient_of_their_weights(monkeypatch):
    """A third of the FLOPs of their linear part is saved; gradients still pass through them to what lies below."""
    monkeypatch.setattr(tg, "linear", F.linear)
    c = config(POLY_LIKE, COMPUTE_DTYPE="float32")
    model, batch = build_model(c), random_batch(c, 4, c.train_seq_len)
    with FlopCounterMode(display=False) as counter:
        model(*batch, looped=False, trainable_layers=2)[0].sum().backward()
    counted = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    without_attention = bench.flops_per_token(model, tg.StepVariant(False, 2, False), 0.0)
    assert counted["aten.mm"] == without_attention * batch.ids.numel()
    assert without_attention < bench.flops_per_token(model, tg.StepVariant(False, 6, False), 0.0)


def test_layers_with_a_window_attend_to_fewer_keys():
    """Of six layers every second has a window, and one of those is looped twice more."""
    c = config(RECORD_LIKE, WINDOW_ATTN_SIZE=3)
    model, variant = tg.new_model(c), tg.StepVariant(True, c.num_layers, False)
    order = tg.execution_order(c, True)
    nearby = sum(layer % 2 == 0 for layer in order)
    saved = bench.flops_per_token(model, variant, 20.0) - bench.flops_per_token(model, variant, 20.0, 4.0)
    assert 0 < nearby < len(order) and saved == pytest.approx(bench.attention_flops(c, 16 * nearby))


def test_the_context_is_what_attention_may_see(data):
    c = config(SHAPE, DATA_PATH=data)
    loader = tg.TrainLoader(c, single_run())
    masks = [tg.document_mask(loader.batch(step, micro).documents.starts) for step in (2, 3) for micro in (0, 1)]
    expected = torch.stack(masks).sum(-1).double().mean().item()
    assert bench.mean_context(loader, range(2, 4)) == pytest.approx(expected, rel=1e-12)
    masks = [tg.document_mask(loader.batch(step, micro).documents.starts, 3) for step in (2, 3) for micro in (0, 1)]
    nearby = torch.stack(masks).sum(-1).double().mean().item()
    assert bench.mean_context(loader, range(2, 4), 3) == pytest.approx(nearby, rel=1e-12) and nearby < expected


def test_documents_are_as_long_as_asked(tmp_path):
    c = config(TINY, DATA_PATH=tmp_path)
    bench.write_tokens(tmp_path, c, 400_000, 100.0)
    stream = tg.TokenStream(c, "train")
    tokens = stream.read(0, len(stream))
    lengths = np.diff(np.flatnonzero(tokens == tg.BOS_ID))
    assert len(tokens) == 400_000 and tokens[0] == tg.BOS_ID and set(tokens[tokens != tg.BOS_ID]) <= set(range(4, 384))
    assert lengths.mean() == pytest.approx(100, rel=0.1) and np.log(lengths).std() == pytest.approx(1, abs=0.1)


def test_nothing_is_updated_where_only_the_passes_are_measured(data):
    measured = bench.Bench(config(SHAPE, DATA_PATH=data), single_run())
    states = [[p.clone() for p in measured.trainer.parameters()]]
    for part in ("forward+backward", "whole step"):
        measured.measure(0, tg.StepVariant(False, 6, False), part)
        states.append([p.clone() for p in measured.trainer.parameters()])
    same = [all(map(torch.equal, states[i], states[i + 1])) for i in (0, 1)]
    assert same == [True, False] and all(p.grad is None for p in measured.trainer.model.parameters())


def test_the_whole_step_is_the_trainers(data):
    """Two updates by the benchmark, passes alone in between, leave the weights of two steps of a training."""
    c = config(SHAPE, DATA_PATH=data)
    measured = bench.Bench(c, single_run())
    measured.samples(0, 2)
    model = tg.new_model(c)
    trainer = tg.Trainer(model, tg.TrainLoader(c, single_run()), c, single_run())
    for step in range(2):
        for looped in (False, True):
            trainer.step(tg.Progress(step, 0.0), looped)
    found, expected = ([*each.parameters(), *(each.ema or ())] for each in (measured.trainer, trainer))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 NVL", None), ("", None)],
)
def test_utilization_is_given_for_known_chips_only(name, peak, monkeypatch):
    monkeypatch.setattr(bench, "chip", lambda run: name)
    c = config(TINY)
    fake = SimpleNamespace(run=single_run(), trainer=SimpleNamespace(config=c, model=tg.new_model(c)))
    variant = tg.StepVariant(False, c.num_layers, False)
    row = bench.row(fake, (variant, "whole step"), [(0.5, 7), (0.25, 9), (0.75, 8)], (10.0, 5.0))
    assert row["peak_memory_bytes"] == 9 and row["tokens_per_second"] == 2 * 768
    expected = None if peak is None else 2 * 768 * row["flops_per_token"] / peak
    assert row["mfu"] == (expected if expected is None else pytest.approx(expected))


def test_every_variant_of_a_preset_is_measured(tmp_path):
    """Multi-token and prefix prediction, which need a tokenizer in a training, and layers that begin to train late."""
    extra = dict(
        MTP_WEIGHTS="0.5", PREFIX_LOSS_WEIGHT=0.25, PROGRESSIVE_DEPTH_SCHEDULE="0.08,0.25", TRAIN_BATCH_TOKENS=256
    )
    options = ("--repeats", 1, "--warmup", 0, "--document-tokens", 12, "--json", tmp_path / "result.json")
    done = fork(SCRIPT, {**SHAPE, **extra}, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    variants = tg.all_step_variants(config({**SHAPE, **extra}))
    assert {x["order"] for x in rows} >= {"plain, 2 layers, ahead", "looped, ahead", "looped"}, rows
    assert len({x["order"] for x in rows}) == len(variants) == len(rows) / 2


def test_defaults():
    """Full `record` in one micro-batch with CUDA, a small `record` without; the environment goes first."""
    full, _ = bench.configuration({}, True)
    small, _ = bench.configuration({}, False)
    assert (full.vocab_size, full.model_dim, full.train_seq_len, full.train_batch_tokens) == (8192, 512, 2048, 98304)
    assert small.model_dim < 512 and small.train_batch_tokens == small.micro_batch_tokens
    switches = [f for f, v in tg.PRESETS["record"].items() if v is True]
    assert switches and all(getattr(c, f) for c in (full, small) for f in switches)
    assert all(c.loops and c.parallel_residual and c.num_layers == 11 for c in (full, small))
    other, _ = bench.configuration(dict(PRESET="poly5", MICRO_BATCH_TOKENS="5000", SEED="3"), False)
    assert (other.preset, other.seed, other.train_batch_tokens, other.model_dim) == ("poly5", 3, 4096, 512)
    assert bench.configuration(dict(DEVICE="cpu"), True)[0].model_dim == small.model_dim


@pytest.mark.parametrize(
    "knobs, arguments, words",
    [
        (dict(MODEL_DIM=33), (), "NUM_HEADS=4"),
        (dict(TRAIN_BATCH_TOKENS=33), (), "TRAIN_BATCH_TOKENS=33"),
        ({}, ("--repeats", 0), "--repeats"),
        ({}, ("--document-tokens", math.nan), "--document-tokens"),
        ({}, ("--json", "no/such/folder.json"), "no/such/folder.json"),
    ],
)
def test_what_a_user_can_mend(knobs, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    environment = {name: str(value) for name, value in {**SHAPE, **knobs}.items()}
    try:
        code = bench.main([str(a) for a in arguments], environment)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and words in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())
