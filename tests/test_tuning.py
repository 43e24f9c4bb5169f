"""Tuning after quantization: what it computes with is what is stored, its gradients, what it gains, when it is kept."""

import json
import math

import pytest
import torch

import train_gpt as tg
from helpers import POLY_LIKE, RECORD_LIKE, TINY, build_model, config, single_run, strings

TUNE = dict(TUNE_STEPS=12, TRAIN_BATCH_TOKENS=256, COMPUTE_DTYPE="float32", MATRIX_BITS=3, EMBED_BITS=4)
TUNE |= dict(ATTN_CLIP_SIGMAS=3, MLP_CLIP_SIGMAS=3, EMBED_CLIP_SIGMAS=3, MATRIX_CLIP_SIGMAS=3)
FORMS = {
    "uniform": dict(RECORD_LIKE, LQER_SELECT="norm", AWQ_GROUPS=2),
    "trellis": dict(RECORD_LIKE, LQER_SELECT="norm", QUANTIZER="trellis", COLUMN_STEPS=0.75, SCALE_GRID=0),
    "tables": dict(POLY_LIKE, BIGRAM_VOCAB_SIZE=6000, QUANTIZER="uniform", COLUMN_STEPS=0.5, RVQ_ENABLED=1),
    "gptq_lite": dict(POLY_LIKE, RVQ_ENABLED=1),
}


def quantized(form, data, **knobs):
    """What a training would leave of random weights, and its artifact, coarsely quantized."""
    c = config(FORMS[form], DATA_PATH=data, **{**TUNE, **knobs})
    model, run = build_model(c, seed=3, spread=0.1), single_run()
    trainer = tg.Trainer(model, tg.TrainLoader(c, run), c, run)
    calibration = tg.calibrate(trainer, 0)
    trained = tg.Trained(model, calibration, tg.Progress(0, 0.0), tg.Score(0.0, 1, 1), 0.0, trainer.loader)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return c, trained, tg.make_artifact(weights, calibration, 10**9, c, lambda line: None)


def same(x, y):
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
def test_the_tuned_model_is_bit_for_bit_what_is_stored(form, data):
    """Before any step that is the artifact; corrections, residuals, column scales and scales off the grid included."""
    c, trained, artifact = quantized(form, data)
    stored = tg.unpack(artifact)[1]
    tuning = tg.Tuning(stored, trained.model, c)
    before = tg.dequantize(stored)
    assert same(parameters(tuning.student), before)
    extras = {part for q in stored.values() for part in q.extras}
    assert extras >= {"uniform": {"columns", "left"}, "trellis": {"columns", "left"}}.get(form, {"residual"})
    for step in range(3):
        tuning.step(tg.tuning_batch(trained.loader, c, step))
    tuned = tuning.tuned()
    assert same(parameters(tuning.student), tg.dequantize(tuned))
    for name, q in tuned.items():
        tg.check_stored(q)
        assert q.bits == stored[name].bits and q.states == stored[name].states
        assert (q.scales is None) or torch.equal(q.codes, stored[name].codes)
    moved = [name for name, q in tuned.items() if not torch.equal(tg.restore(q), before[name])]
    assert len(moved) > len(tuned) / 2
    back = tg.unpack(tg.pack(tuned, c))[1]
    assert same(tg.dequantize(back), tg.dequantize(tuned))
    assert same(parameters(trained.model), parameters(tuning.teacher))  # the float model is left alone


def test_scales_stay_on_their_grid(data):
    c, trained, artifact = quantized("uniform", data)
    tuning = tg.Tuning(tg.unpack(artifact)[1], trained.model, c)
    for step in range(4):
        tuning.step(tg.tuning_batch(trained.loader, c, step))
    for name in tg.BANKS:
        logs = tuning.tuned()[name].scales.float().log2() * c.scale_grid
        assert (logs - logs.round()).abs().max() < 0.02


@pytest.mark.parametrize("form", ["uniform", "trellis"])
def test_gradients_are_those_through_the_dequantization(form, data):
    """Autograd's, of log2 of the scales and of fp16 values, in a model that is dequantized as a function of them."""
    c, trained, artifact = quantized(form, data, TUNE_SCALE_LR=0, TUNE_VECTOR_LR=0)
    stored = tg.unpack(artifact)[1]
    tuning, batch = tg.Tuning(stored, trained.model, c), tg.tuning_batch(trained.loader, c, 2)
    leaves, values = {}, {}
    for name, q in stored.items():
        if q.scales is None:
            leaves[name] = values[name] = q.codes.float().requires_grad_()
            continue
        leaves[name] = q.scales.float().log2().requires_grad_()
        levels = tg.trellis_levels(q.codes, q.states)[0] if q.states else q.codes
        columns = torch.exp2(q.extras["columns"].float() / 2)[:, None] if "columns" in q.extras else 1.0
        grid = tg.as_batch(levels.float() * torch.exp2(leaves[name])[..., None]) * columns
        fixed = tg.as_batch(tg.restore(q)) - grid.detach()
        values[name] = (grid + fixed).view(q.codes.shape)
    hidden = []
    handle = tuning.student.logits.register_forward_hook(lambda module, inputs, y: hidden.append(y))
    torch.func.functional_call(
        tuning.student, values, (batch.ids, batch.targets, batch.documents), dict(looped=c.loops)
    )
    handle.remove()
    found = tg.softcap_plain(hidden[0].double(), c.logit_softcap, c.softcap_type).log_softmax(-1)
    expected = trained.model.log_probabilities(batch.ids, batch.documents, looped=c.loops).detach().double()
    loss = torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert tuning.step(batch) == pytest.approx(loss.item(), rel=1e-3)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        own = tuning.masters[name].grad
        assert own.shape == leaf.shape
        assert torch.allclose(own, gradient, rtol=5e-3, atol=2e-3 * gradient.abs().max().item() + 1e-9), name
    assert same(parameters(tuning.student), tg.dequantize(stored))  # at a rate of 0


@pytest.mark.parametrize("form", ["uniform", "trellis", "gptq_lite"])
def test_the_divergence_falls(form, data):
    knobs = dict(TUNE_STEPS=25, TUNE_SCALE_LR=0.01, TUNE_VECTOR_LR=0.003, RVQ_ENABLED=0)
    c, trained, artifact = quantized(form, data, **knobs)
    tuning = tg.Tuning(tg.unpack(artifact)[1], trained.model, c)
    seen = [tg.tuning_batch(trained.loader, c, step) for step in range(4)]
    before = tuning.mean_divergence(seen)
    losses = [tuning.step(seen[step % 4]) for step in range(25)]
    assert losses[0] > 0 and tuning.mean_divergence(seen) < 0.97 * before


def test_the_divergence_is_kls_definition(data):
    c, trained, artifact = quantized("uniform", data)
    tuning, batch = tg.Tuning(tg.unpack(artifact)[1], trained.model, c), tg.tuning_batch(trained.loader, c, 0)
    with torch.no_grad():
        p, q = (
            model.log_probabilities(batch.ids, batch.documents, looped=c.loops).double()
            for model in (trained.model, tuning.student)
        )
        nll = trained.model(*batch, looped=c.loops)[0]
    assert torch.allclose(p.exp().sum(-1), torch.ones(p.shape[:2], dtype=p.dtype), atol=1e-5)
    assert torch.allclose(-p.gather(-1, batch.targets[..., None])[..., 0], nll.double(), atol=1e-4)
    assert tuning.mean_divergence([batch]) == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    same_model = tg.Tuning(
        {n: tg.Quantized(x.half(), None, 16, {}) for n, x in parameters(trained.model).items()}, trained.model, c
    )
    assert same_model.mean_divergence([batch]) < 1e-3 * tuning.mean_divergence([batch])


def test_tuning_reads_training_text_after_calibrations(data, monkeypatch):
    c, trained, artifact = quantized("uniform", data, TUNE_STEPS=3)
    trained = trained._replace(end=tg.Progress(10, 0.0))
    read, places = trained.loader.read_sequences, []
    trained.loader.read_sequences = lambda positions: places.append(positions) or read(positions)
    tg.tune_artifact(artifact, trained, 10**9, c, single_run())
    size = trained.loader.layout.sequences
    steps = [place.start // size for place in places]
    assert steps == [15, 16, 17, 18, 12, 13, 14]  # unseen text, then 10 + 2 of calibration, and on
    assert all(len(place) == size and place.start % size == 0 for place in places)
    monkeypatch.setattr(tg, "CALIBRATION_TOKENS", 100)
    assert tg.tuning_batch(trained.loader, c, 0).ids.shape == (3, 32)


def test_an_artifact_that_tuning_helps_is_replaced(data, capsys):
    c, trained, artifact = quantized("uniform", data, TUNE_STEPS=20, TUNE_SCALE_LR=0.01, TUNE_VECTOR_LR=0.003)
    tuned = tg.tune_artifact(artifact, trained, 10**9, c, single_run())
    line = capsys.readouterr().out
    assert tuned != artifact and line.rstrip().endswith("bytes, kept")
    assert f"{len(artifact)} -> {len(tuned)} bytes" in line
    for before, after in zip(tg.unpack(artifact)[1].items(), tg.unpack(tuned)[1].items(), strict=True):
        assert before[0] == after[0] and (before[1].scales is None or torch.equal(before[1].codes, after[1].codes))
    assert tg.tune_artifact(artifact, trained, 10**9, c, single_run()) == tuned


@pytest.mark.parametrize(
    "reason, knobs", [("worse", dict(TUNE_VECTOR_LR=5.0)), ("not a number", dict(TUNE_VECTOR_LR=1e15))]
)
def test_an_artifact_that_tuning_harms_is_given_back(reason, knobs, data, capsys):
    c, trained, artifact = quantized("uniform", data, TUNE_STEPS=3, **knobs)
    assert tg.tune_artifact(artifact, trained, 10**9, c, single_run()) == artifact
    line = capsys.readouterr().out
    assert line.rstrip().endswith("bytes, not kept")
    after = float(line.partition(" -> ")[2].split()[0])
    assert math.isnan(after) or after > float(line.partition("divergence ")[2].split()[0])


def test_an_artifact_that_would_be_too_large_is_given_back(data, monkeypatch, capsys):
    c, trained, artifact = quantized("uniform", data, TUNE_STEPS=6, TUNE_SCALE_LR=0.01, TUNE_VECTOR_LR=0.003)
    tuned = tg.tune_artifact(artifact, trained, 10**9, c, single_run())
    assert tuned != artifact
    monkeypatch.setattr(tg, "pack", lambda *_: tuned + bytes(500))
    for limit, kept in ((len(tuned) + 500, True), (len(tuned) + 499, len(tuned) + 500 <= len(artifact)), (10, False)):
        found = tg.tune_artifact(artifact, trained, limit, c, single_run())
        assert (found != artifact) is kept


def test_a_tuning_step_is_reserved_too(data, capsys):
    knobs = dict(DATA_PATH=data, GPTQ_RESERVE_SECONDS=-1, MAX_WALLCLOCK_SECONDS=5000, GPTQ_CALIBRATION_BATCHES=1)
    reserved = {}
    for steps in (0, 2000):
        c = config(TINY, TUNE_STEPS=steps, **knobs)
        model, run = build_model(c), single_run()
        before = {name: p.clone() for name, p in parameters(model).items()}
        trainer = tg.Trainer(model, tg.TrainLoader(c, run), c, run)
        run.time_second_call = lambda compute: compute() is None or 0.5  # each call takes half a second
        tg.reserve_calibration(trainer)
        assert same(parameters(model), before) and all(p.grad is None for p in model.parameters())
        reserved[steps] = trainer.config.gptq_reserve_seconds
    margin = tg.CALIBRATION_MARGIN
    assert reserved[0] == pytest.approx(margin * 0.5) and reserved[2000] == pytest.approx(margin * (0.5 + 2000 * 0.5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("calibration: 1 batches, ")
    assert lines[1].startswith("calibration: 1 batches and 2000 steps of tuning, ")


def test_seconds_over_the_limit_count_tuning(capsys):
    run = single_run()
    run.seconds |= {"calibrate": 3.0, "tune": 20.0}
    c = config(TINY, MAX_WALLCLOCK_SECONDS=100)
    assert tg.log_overrun(c, run, tg.Progress(100, 90.0)) == 13.0
    assert "training, calibration and tuning took 113.0 s, 13.0 s over" in capsys.readouterr().out


def test_a_run_tunes_in_a_stage_of_its_own(data, tmp_path, capfd, monkeypatch):
    """The score is of the tuned artifact, and the summary has the stage's seconds."""
    monkeypatch.chdir(tmp_path)
    values = dict(TINY, **TUNE, DATA_PATH=data, RUN_ID="run", ITERATIONS=6, MODE="train", TUNE_SCALE_LR=0.01)
    values |= dict(MATRIX_STEPS=0.85, ROW_STEPS=0.75, STD_STEPS=0.5, GUIDED_HESSIANS=1, MAX_WALLCLOCK_SECONDS=600)
    assert tg.main([], strings(values)) == 0
    summary = json.loads((tmp_path / "logs" / "run" / "summary.json").read_text())
    assert summary["seconds"]["tune"] > 0 and summary["seconds_over_limit"] == 0
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("tune:12 steps of 256 tokens"))
    artifact = (tmp_path / "logs" / "run" / tg.CONTAINER_FILE).read_bytes()
    before, after = line.partition(" nats, ")[2].split(" bytes")[0].split(" -> ")
    assert len(artifact) == int(after if line.endswith(", kept") else before) == summary["model_bytes"]
