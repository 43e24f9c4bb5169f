"""What only a GPU can show: a compiled training step, Muon over NCCL, quantization at size, test-time training.

`make test-gpu` runs these on CUDA at sizes near the record's. Every test has a form for CPUs too, at tiny sizes, by
gloo and without Inductor: that keeps the tests themselves right on machines without a GPU.
"""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from helpers import NEEDS_CUDA, RECORD_LIKE, ROOT, build_model, fork, launch, strings, tg, write_split
from rank_worker import run_jobs

sys.path.append(str(ROOT / "bench"))
import quantize as quantize_bench  # noqa: E402

needs_two = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
# By device: sizes at which a CPU takes a second, and sizes at which a GPU's kernels have more than one tile.
SIZES = dict(
    cpu=dict(CPU_THREADS=1, NUM_LAYERS=4, LOOP_START=1, LOOP_END=1, NUM_LOOPS=1, PARALLEL_START_LAYER=3, XSA_LAST_N=4),
    cuda=dict(MODEL_DIM=512, NUM_HEADS=8, NUM_KV_HEADS=4, NUM_LAYERS=11, LOOP_START=3, LOOP_END=5, ROPE_DIMS=16)
    | dict(PARALLEL_START_LAYER=8, XSA_LAST_N=11, TRAIN_SEQ_LEN=512, TRAIN_BATCH_TOKENS=16384, MICRO_BATCH_TOKENS=8192),
)


def config_on(device, base=RECORD_LIKE, **knobs):
    """The Config of a base on a device, eager unless a knob says otherwise."""
    values = {**base, **SIZES[device], "DEVICE": device, "COMPILE": 0, **knobs}
    return tg.config_from_env(strings(values), torch.cuda.is_available())[0]


def run_on(device):
    """A Run of one rank without a folder."""
    return tg.Run(0, 1, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))


def model_on(c, device, compiled, **options):
    """A model with random weights, compiled where asked."""
    model = build_model(c, **options).to(device)
    model.runtime = dataclasses.replace(model.runtime, compile=compiled)
    return model


def distance(x, exact):
    """Norm of the difference over the norm."""
    return ((x - exact).double().norm() / exact.double().norm()).item()


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch, request):
    """On a CPU, torch.compile only traces, and runs the graph as it is: seconds, not minutes."""
    device = getattr(request.node, "callspec", None) and request.node.callspec.params.get("device")
    if device == "cpu":
        compiled = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **how: compiled(model, backend="eager", **how))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ a training step


def trained(c, device, compiled):
    """Two steps before the loops and two after: the losses, the change of each weight."""
    model, run = model_on(c, device, compiled, seed=1), run_on(device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = tg.Trainer(model, tg.TrainLoader(c, run), c, run)
    losses = [trainer.step(tg.Progress(step, 0.0), looped=step >= 2).item() for step in range(4)]
    trainer.loader.ahead.close()
    return losses, {name: p.detach() - before[name] for name, p in model.named_parameters()}


@devices
def test_a_compiled_training_step_is_the_eager_one(device, data):
    """Float32, so that a difference is a mistake and no rounding: one graph an order, equal losses, equal updates."""
    c = config_on(device, DATA_PATH=data, COMPUTE_DTYPE="float32", ATTENTION="sdpa")
    eager_losses, eager = trained(c, device, compiled=False)
    graphs = tg.graphs_compiled()
    losses, updates = trained(c, device, compiled=True)
    assert tg.graphs_compiled() - graphs == 2
    np.testing.assert_allclose(losses, eager_losses, rtol=1e-5)
    for name, update in updates.items():
        assert update.isfinite().all() and eager[name].any(), name
        assert distance(update, eager[name]) <= 0.02, name  # Newton-Schulz enlarges the rounding of small directions


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("attention", ["fa3", "fa2", "varlen", "sdpa"])
def test_a_compiled_training_step_in_bfloat16_loses_as_much(device, attention, data):
    """The step of a real run, with each attention that this machine has."""
    fault = "" if attention == "sdpa" else tg.attention_fault(attention)
    if fault:
        pytest.skip(f"{attention}: {fault}")
    exact = config_on(device, DATA_PATH=data, COMPUTE_DTYPE="float32", ATTENTION="sdpa")
    c = config_on(device, DATA_PATH=data, COMPUTE_DTYPE="bfloat16", ATTENTION=attention)
    losses, updates = trained(c, device, compiled=True)
    np.testing.assert_allclose(losses, trained(exact, device, compiled=False)[0], rtol=0.02)
    assert all(update.isfinite().all() for update in updates.values())


# ------------------------------------------------------------------------------------------------- Muon on two ranks


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_two)])
def test_two_ranks_train_as_one(device, data, tmp_path):
    """By NCCL on two GPUs, by gloo on CPUs: both ranks hold the same weights, and those of one rank alone."""
    knobs = dict(SIZES[device], DEVICE=device, DATA_PATH=str(data), COMPILE=0, ATTENTION="sdpa", GRAD_CLIP_NORM=0)
    if device == "cpu":
        knobs |= dict(TRAIN_SEQ_LEN=16, TRAIN_BATCH_TOKENS=192, MICRO_BATCH_TOKENS=96)
    jobs = [
        dict(name=dtype, kind="train", arguments=dict(steps=4), knobs=dict(RECORD_LIKE, **knobs, COMPUTE_DTYPE=dtype))
        for dtype in ("float64", "bfloat16")
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_jobs(jobs, run_on(device), tmp_path / "one")
    worker = ROOT / "tests" / "rank_worker.py"
    start = fork if device == "cpu" else launch
    done = start(worker, dict(OMP_NUM_THREADS=1), tmp_path / "jobs.json", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for dtype, tolerance in dict(float64=1e-9, bfloat16=0.05).items():
        alone = dict(np.load(tmp_path / "one" / f"{dtype}.0.npz"))
        first, second = (dict(np.load(tmp_path / "two" / f"{dtype}.{rank}.npz")) for rank in (0, 1))
        assert all(np.array_equal(first[key], second[key]) for key in alone), f"{dtype}: ranks differ"
        np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-5 if dtype == "float64" else 0.02)
        for key in alone:
            norm = np.linalg.norm(first[key] - alone[key]) / (np.linalg.norm(alone[key]) + 1e-12)
            assert norm <= tolerance, (dtype, key, norm)


# ------------------------------------------------------------------------------------------------- quantization at size


@devices
def test_quantization_at_size_errs_less_than_rounding(device):
    """On a GPU the record's own matrices and method; the artifact reads back as what was quantized there."""
    base = dict(PRESET="record") if device == "cuda" else dict(RECORD_LIKE, QUANTIZER="trellis", TRELLIS_STATES=4)
    c = tg.config_from_env(strings({**base, "DEVICE": device}), torch.cuda.is_available())[0]
    weights = {name: p.detach().clone() for name, p in build_model(c, seed=1).to(device).named_parameters()}
    calibration = quantize_bench.random_calibration(weights, torch.Generator().manual_seed(0))
    stored = tg.quantize(weights, calibration, c)
    back = tg.unpack(tg.pack(stored, c))[1]
    assert back.keys() == stored.keys() == weights.keys()
    for name, hessian in calibration.hessians.items():
        w = tg.as_batch(weights[name])
        bits, sigmas = tg.quantization_bits(name, weights[name].numel(), c)
        rounded = tg.restore(tg.round_to_nearest(w, bits, sigmas)).to(device)
        ours = tg.as_batch(tg.restore(stored[name])).to(device)
        assert torch.equal(tg.as_batch(tg.restore(back[name])).to(device), ours), name
        errors = [tg.weighted_error(w - x, hessian).sum().item() for x in (ours, rounded)]
        assert 0 < errors[0] < 0.7 * errors[1], (name, errors)


# --------------------------------------------------------------------------------------------------- test-time training


def ttt_scores(c, device, compiled, adapt):
    """The score of phased test-time training on the validation text, from random weights."""
    evaluator = tg.Evaluator(c, run_on(device))
    return tg.PhasedTTT(evaluator, model_on(c, device, compiled, seed=1, spread=0.2), adapt=adapt)().loss


@pytest.fixture
def few_documents(data, tmp_path):
    """A folder with the tokenizer and 12 documents that repeat themselves, of 3 to 69 tokens."""
    (tmp_path / "tokenizer.model").symlink_to(data / "tokenizer.model")
    generator = np.random.default_rng(0)
    write_split(tmp_path, "val", [np.tile(generator.integers(4, 384, 9), 8)[: 3 + 6 * n].tolist() for n in range(12)])
    return tmp_path


@devices
def test_compiled_test_time_training_scores_as_eager(device, few_documents):
    """Adapters, phases and the steps of all weights, in float32: what they gain is far above the difference."""
    knobs = dict(COMPUTE_DTYPE="float32", ATTENTION="sdpa", DATA_PATH=few_documents, TTT_MODE="phased")
    knobs |= dict(TTT_BATCH_SIZE=5, TTT_CHUNK_SIZE=16, PHASED_TTT_PREFIX_DOCS=8, PHASED_TTT_NUM_PHASES=1)
    knobs |= dict(GLOBAL_TTT_CHUNK_TOKENS=64, TTT_LORA_LR=1e-3, TTT_LORA_RANK=4)
    if device == "cpu":  # tracing costs seconds for each layer
        knobs |= dict(NUM_LAYERS=2, NUM_LOOPS=0, PARALLEL_START_LAYER=-1, XSA_LAST_N=1)
    c = config_on(device, **knobs)
    fixed, eager = (ttt_scores(c, device, False, adapt) for adapt in (False, True))
    compiled = ttt_scores(c, device, True, True)
    assert abs(compiled - eager) <= 1e-4 * eager
    assert abs(eager - fixed) > 20 * abs(compiled - eager)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [0, 8])
def test_windows_that_are_replayed_as_cuda_graphs_score_as_others(device, compiled, recompute, few_documents, capsys):
    """tests/test_ttt_graphs.py does it without a GPU, on an emulation."""
    knobs = dict(COMPUTE_DTYPE="float32", ATTENTION="sdpa", DATA_PATH=few_documents, TTT_MODE="phased")
    knobs |= dict(TTT_BATCH_SIZE=5, TTT_CHUNK_SIZE=2, TTT_EVAL_SEQ_LEN=16, TTT_RECOMPUTE_TOKENS=recompute)
    knobs |= dict(PHASED_TTT_PREFIX_DOCS=8, PHASED_TTT_NUM_PHASES=1, GLOBAL_TTT_CHUNK_TOKENS=64)
    knobs |= dict(TTT_LORA_LR=1e-3, TTT_LORA_RANK=4)
    found = {}
    for graphs in (0, 1):
        c = config_on(device, **knobs, TTT_CUDA_GRAPHS=graphs)
        evaluator = tg.Evaluator(c, run_on(device))
        ttt = tg.ttt_method(c)(evaluator, model_on(c, device, compiled, seed=1, spread=0.2))
        ttt()
        found[graphs] = ttt.ledger.nll.copy()
        assert (ttt.graphs.replayed > 20) is bool(graphs)
    assert "no CUDA graphs" not in capsys.readouterr().out
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4)
