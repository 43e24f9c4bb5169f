"""One step and the loop: warmup leaves no trace, losses fall, averages, switches, logs."""

import dataclasses
import json
import re
from unittest import mock

import pytest
import torch

import train_gpt as tg
from helpers import POLY_LIKE, RECORD_LIKE, TINY, Clock, build_model, config, random_batch, single_run


def make_trainer(base, data, random_weights=False, **knobs):
    c = config(base, DATA_PATH=data, **knobs)
    if random_weights:
        return tg.Trainer(build_model(c), tg.TrainLoader(c, single_run()), c, single_run())
    model = tg.new_model(c)
    return tg.Trainer(model, tg.TrainLoader(c, single_run()), c, single_run())


def state(trainer):
    """Copies of all that a step changes: weights, average, both optimizers."""
    return dict(
        weights=[p.detach().clone() for p in trainer.model.parameters()],
        average=[a.clone() for a in trainer.ema or []],
        late=[trainer.swa_count],
        momentum=[m.clone() for m in trainer.optimizers.muon.momentum],
        adam=json.dumps(
            {
                str(k): {n: v.tolist() for n, v in s.items()}
                for k, s in trainer.optimizers.adam.state_dict()["state"].items()
            }
        ),
        grads=[p.grad is None for p in trainer.model.parameters()],
    )


def same(x, y):
    tensors = ("weights", "average", "momentum")
    return (
        x.keys() == y.keys()
        and all(len(x[k]) == len(y[k]) for k in x)
        and all(all(map(torch.equal, x[k], y[k])) if k in tensors else x[k] == y[k] for k in x)
    )


def no_validation():
    raise AssertionError("no validation was asked for")


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, POLY_LIKE], ids=["tiny", "record", "poly"])
def test_warmup_puts_everything_back_bit_for_bit(base, data):
    trainer = make_trainer(base, data, WARMUP_STEPS=2, EMA_DECAY=0.9)
    before, rows, stream = state(trainer), trainer.loader.batch(0, 0), torch.random.get_rng_state()
    changed = []
    step = trainer.step
    trainer.step = lambda *arguments: (step(*arguments), changed.append(not same(state(trainer), before)))
    trainer.warm_up()
    assert changed and all(changed)  # it really trained
    assert same(state(trainer), before)
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert all(torch.equal(x, y) for x, y in zip(trainer.loader.batch(0, 0)[:2], rows[:2], strict=True))


@pytest.mark.parametrize(
    "base, variants",
    [
        (TINY, {(False, 3, False)}),
        (RECORD_LIKE, {(False, 6, False), (True, 6, False)}),
        (POLY_LIKE, {(False, 2, False), (False, 4, False), (False, 6, False), (False, 6, True)}),
        (dict(TINY, MTP_WEIGHTS="0.5,0.25"), {(False, 3, False, True), (False, 3, False)}),
    ],
    ids=["tiny", "record", "poly", "ahead"],
)
def test_warmup_runs_every_variant_that_the_training_will_need(base, variants, data):
    trainer, seen, evaluated = make_trainer(base, data, WARMUP_STEPS=1), [], []
    grids, forward = (trainer.config.attn_grid, trainer.config.mlp_grid), trainer.forward

    def watched(*batch, looped, trainable_layers, fake_quant, **rest):
        assert fake_quant in (None, grids)
        switches = dict(predicts_ahead="extra_targets" in rest)
        seen.append(tg.StepVariant(looped, trainable_layers, fake_quant is not None, **switches))
        return forward(*batch, looped=looped, trainable_layers=trainable_layers, fake_quant=fake_quant, **rest)

    trainer.forward = watched
    trainer.warm_up(evaluated.append)
    assert set(seen) == {tg.StepVariant(*v) for v in variants} == set(tg.all_step_variants(trainer.config))
    assert evaluated == [watched]  # scores have a graph of their own
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_a_compiled_warmup_says_what_it_has_compiled(data, capsys):
    """On GPUs it takes minutes, which would look like a run that hangs."""
    trainer = make_trainer(POLY_LIKE, data, WARMUP_STEPS=2)
    trainer.config = dataclasses.replace(trainer.config, compile="1")
    trainer.warm_up()
    titles = ["plain, 2 layers", "plain, 4 layers", "plain", "plain, rounded"]
    found = re.findall("^warmup: (.*) compiled, [0-9]+ s$", capsys.readouterr().out, re.M)
    assert found == titles


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, POLY_LIKE], ids=["tiny", "record", "poly"])
def test_a_run_with_warmup_ends_with_the_weights_of_one_without(base, data):
    ends = []
    for warmup in (0, 3):
        trainer = make_trainer(base, data, WARMUP_STEPS=warmup, ITERATIONS=6, EMA_DECAY=0.9, TRAIN_LOG_EVERY=0)
        trainer.warm_up()
        assert tg.train(trainer, no_validation).step == 6
        ends.append(state(trainer))
    assert same(*ends)


def test_the_reserve_is_half_more_than_calibration_takes_in_the_warmup(data, monkeypatch):
    """A run that is over its limit counts for nothing, and ten minutes later a machine may be slower."""
    timed = []
    monkeypatch.setattr(tg.Run, "time_second_call", lambda self, compute: timed.append(compute()) or 0.25)
    trainer = make_trainer(TINY, data, GPTQ_RESERVE_SECONDS=-1, MAX_WALLCLOCK_SECONDS=50, GPTQ_CALIBRATION_BATCHES=8)
    tg.reserve_calibration(trainer)
    assert trainer.config.gptq_reserve_seconds == 4 * 0.25 * 1.5  # two batches of eight were measured, as a whole
    assert trainer.config.gptq_calibration_batches == 8 and all(isinstance(x, tg.Calibration) for x in timed)


def test_calibration_is_measured_in_the_warmup_and_its_seconds_reserved(data, capsys):
    trainer = make_trainer(TINY, data, GPTQ_RESERVE_SECONDS=-1, MAX_WALLCLOCK_SECONDS=50)
    before, limit = state(trainer), trainer.config.train_seconds
    tg.reserve_calibration(trainer)
    reserved = trainer.config.gptq_reserve_seconds
    assert 0 < reserved < 45 and trainer.config.train_seconds == 50 - reserved < limit == 50
    assert (
        same(state(trainer), before) and f"{reserved:.2f} s of the time limit are reserved" in capsys.readouterr().out
    )
    for values in (dict(GPTQ_RESERVE_SECONDS=3), dict(GPTQ_RESERVE_SECONDS=-1, MAX_WALLCLOCK_SECONDS=0)):
        given = make_trainer(TINY, data, **{"MAX_WALLCLOCK_SECONDS": 50, **values})
        config = given.config
        tg.reserve_calibration(given)
        assert given.config is config  # nothing to measure
    assert capsys.readouterr().out == ""


def test_a_training_over_its_time_is_named(capsys):
    run = single_run()
    run.seconds["calibrate"] = 3.0
    limited = config(**{**TINY, "MAX_WALLCLOCK_SECONDS": 10})
    assert tg.log_overrun(limited, run, tg.Progress(100, 9.0)) == pytest.approx(2.0)
    assert "12.0 s, 2.0 s over MAX_WALLCLOCK_SECONDS=10" in capsys.readouterr().out
    assert tg.log_overrun(limited, run, tg.Progress(4, 7.5)) == pytest.approx(0.5)  # less than a step
    assert tg.log_overrun(limited, run, tg.Progress(100, 6.0)) == 0
    assert tg.log_overrun(config(**TINY), run, tg.Progress(1, 1e9)) == 0  # no limit
    assert capsys.readouterr().out == ""


def test_the_loss_falls(data):
    """From log V to far below it, in the log's own numbers."""
    trainer = make_trainer(TINY, data, ITERATIONS=60, TRAIN_LOG_EVERY=0)
    losses = []
    step = trainer.step
    trainer.step = lambda *arguments: losses.append(step(*arguments).item() / 768) or torch.tensor(0.0)
    tg.train(trainer, no_validation)
    assert losses[0] == pytest.approx(torch.tensor(384.0).log().item(), abs=0.02)
    assert sum(losses[-5:]) / 5 < 3.2 < losses[0] - 2


def test_a_step_uses_all_rows_once_whatever_the_micro_batch(data):
    ends = []
    for micro in (32, 256, 768):
        trainer = make_trainer(
            RECORD_LIKE, data, random_weights=True, COMPUTE_DTYPE="float64", GRAD_CLIP_NORM=0, MICRO_BATCH_TOKENS=micro
        )
        nats = trainer.step(tg.Progress(3, 0.0), True)
        ends.append((nats.item(), torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    for nats, weights in ends[1:]:
        assert nats == pytest.approx(ends[0][0], rel=1e-5)
        assert torch.allclose(weights, ends[0][1], rtol=1e-8, atol=1e-10)


def gradients_of_a_step(trainer, looped=False):
    """What the optimizers are given in the first step."""
    found = {}

    def keep(*_):
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        return 0.0

    trainer.optimizers.step = keep
    trainer.step(tg.Progress(0, 0.0), looped)
    return found


@pytest.mark.parametrize("z_loss", [0.0, 0.5])
def test_the_gradient_is_that_of_the_mean_loss(z_loss, data):
    """Mean cross entropy + weight * mean(lse^2) over the targets of the batch, by autograd over it as a whole."""
    knobs = dict(COMPUTE_DTYPE="float64", Z_LOSS_WEIGHT=z_loss, NEFTUNE_ALPHA=0)
    trainer = make_trainer(RECORD_LIKE, data, random_weights=True, **knobs)
    found = gradients_of_a_step(trainer, True)
    whole = make_trainer(RECORD_LIKE, data, random_weights=True, MICRO_BATCH_TOKENS=768, **knobs)
    assert whole.layout.micro_steps == 1 and trainer.layout.micro_steps > 1
    nll, lse = whole.model(*whole.loader.batch(0, 0), looped=True)
    (nll.mean() + z_loss * (lse**2).mean()).backward()
    for name, p in whole.model.named_parameters():
        assert (name in found) == (p.grad is not None)
        if name in found:
            assert torch.allclose(found[name], p.grad, rtol=1e-8, atol=1e-14), name


def test_the_z_loss_and_the_noise_change_the_gradient(data):
    plain = gradients_of_a_step(make_trainer(TINY, data, random_weights=True, COMPUTE_DTYPE="float64"))
    for knobs in (dict(Z_LOSS_WEIGHT=1e-4), dict(NEFTUNE_ALPHA=5)):
        other = gradients_of_a_step(make_trainer(TINY, data, random_weights=True, COMPUTE_DTYPE="float64", **knobs))
        for name in ("embedding", "qo_bank", "up_bank"):
            assert (plain[name] - other[name]).norm() > 1e-6 * plain[name].norm(), (knobs, name)


def test_the_focal_loss_weighs_hard_tokens_and_keeps_the_mean(data):
    """(1 - p)^gamma over each row's mean, without a gradient of its own, whatever the micro-batches; z-loss as ever."""
    knobs = dict(COMPUTE_DTYPE="float64", Z_LOSS_WEIGHT=0.1, FOCAL_ENABLED=1)
    for gamma in (0.0, 1.0, 2.5):
        trainer = make_trainer(TINY, data, random_weights=True, FOCAL_GAMMA=gamma, **knobs)
        found = gradients_of_a_step(trainer)
        whole = make_trainer(TINY, data, random_weights=True, MICRO_BATCH_TOKENS=768, **knobs)
        assert whole.layout.micro_steps == 1 and trainer.layout.micro_steps > 1
        nll, lse = whole.model(*whole.loader.batch(0, 0), looped=False)
        hard = (1 - torch.exp(-nll.detach())) ** gamma
        weights = torch.stack([row / (sum(row) / len(row)) for row in hard])
        assert torch.allclose(tg.focal_weights(nll, gamma), weights, rtol=1e-9)
        ((nll * weights).mean() + 0.1 * (lse**2).mean()).backward()
        for name, p in whole.model.named_parameters():
            assert torch.allclose(found[name], p.grad, rtol=1e-8, atol=1e-14), name
    plain = gradients_of_a_step(make_trainer(TINY, data, random_weights=True, **{**knobs, "FOCAL_ENABLED": 0}))
    assert (plain["up_bank"] - found["up_bank"]).norm() > 0.01 * plain["up_bank"].norm()


def test_focal_weights_of_a_batch_average_1_over_all_of_it():
    nll = torch.tensor([[0.1, 0.2, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    found, own = tg.focal_weights(nll, 1.5, "batch"), tg.focal_weights(nll, 1.5)
    hard = (1 - torch.exp(-nll)) ** 1.5
    assert torch.allclose(found, hard / (hard.sum() / 6)) and found.mean().item() == pytest.approx(1)
    assert found[0].mean() < 1 < found[1].mean() and not torch.allclose(found, own)


@pytest.mark.parametrize("order", ["rows", "documents", "stream"])
def test_noise_and_focal_weights_are_each_sequences_own(order, data):
    """In a stream, whose batch is one row of all its sequences, too."""
    knobs = dict(COMPUTE_DTYPE="float64", DATA_ORDER=order, NEFTUNE_ALPHA=5, FOCAL_ENABLED=1, MICRO_BATCH_TOKENS=768)
    trainer = make_trainer(TINY, data, random_weights=True, **knobs)
    c, layout = trainer.config, trainer.layout
    assert layout.micro_steps == 1 and layout.sequences > 1
    found = gradients_of_a_step(trainer)
    batch, noise = trainer.loader.batch(0, 0), trainer.loader.noise(0, 0)
    assert len(batch.ids) == (1 if order == "stream" else layout.sequences) and len(noise.keys) == layout.sequences
    whole = make_trainer(TINY, data, random_weights=True, **knobs)
    added = torch.cat([tg.uniform_noise(key[None], c.train_seq_len, c.model_dim)[0] for key in noise.keys])
    forward = whole.model.embed

    def embed(ids, documents, _noise):
        with mock.patch.object(tg, "uniform_noise", lambda *_: added):
            return forward(ids, documents, tg.EmbeddingNoise(noise.keys, noise.reach))

    with mock.patch.object(whole.model, "embed", embed):
        nll, lse = whole.model(*batch, looped=False)
    sequences = nll.view(layout.sequences, -1)
    hard = (1 - torch.exp(-sequences.detach())) ** c.focal_gamma
    weights = torch.stack([row / row.mean() for row in hard])
    ((sequences * weights).mean() + c.z_loss_weight * (lse**2).mean()).backward()
    for name, p in whole.model.named_parameters():
        if name in found:
            assert torch.allclose(found[name], p.grad, rtol=1e-8, atol=1e-14), name


def test_matrices_of_layers_that_wait_shrink_where_the_knob_says_so(data):
    """By the rate times the weight decay, and by nothing else; their momentum waits."""
    trainer = make_trainer(TINY, data, random_weights=True, MUON_WD=0.5, PROGRESSIVE_DEPTH_DECAY=1)
    before = {name: getattr(trainer.model, name).detach().clone() for name in tg.BANKS}
    trainer.step(tg.Progress(0, 0.0), False, 1)
    for name, momentum in zip(tg.BANKS, trainer.optimizers.muon.momentum, strict=True):
        after, layers = getattr(trainer.model, name).detach(), trainer.config.num_layers
        for i in range(len(after)):
            shrunk = torch.allclose(after[i], before[name][i] * (1 - 0.5 * trainer.config.matrix_lr), rtol=1e-5)
            assert shrunk == (i % layers > 0) == (not momentum[i].any())


def test_without_its_ramp_the_average_has_the_same_decay_at_every_step():
    plain, ramp = config(EMA_DECAY=0.99, EMA_RAMP=0), config(EMA_DECAY=0.99)
    assert [tg.ema_weight(step, plain) for step in (0, 1, 5000)] == pytest.approx([0.01] * 3)
    assert tg.ema_weight(0, ramp) == pytest.approx(0.9) and tg.ema_weight(5000, ramp) == pytest.approx(0.01)


def test_a_certain_token_is_no_division_by_zero():
    assert torch.equal(tg.focal_weights(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))
    assert torch.equal(tg.focal_weights(torch.zeros(2, 3), 0.0), torch.ones(2, 3))


def adam_states(trainer):
    """AdamW's state of every parameter, by name; copies."""
    return {
        name: {key: value.clone() for key, value in trainer.optimizers.adam.state[p].items()}
        for name, p in trainer.model.named_parameters()
        if p in trainer.optimizers.adam.state
    }


@pytest.mark.parametrize(
    "base", [POLY_LIKE, dict(RECORD_LIKE, VE_DIM=6, VE_LAYERS="0,4", BIGRAM_VOCAB_SIZE=9)], ids=["poly", "record"]
)
def test_frozen_layers_keep_every_bit_of_weights_and_optimizer_states(base, data):
    """Against their values after a step of all layers, so that momentum and averages of gradients are there."""
    trainer = make_trainer(base, data, random_weights=True, MUON_WD=0.5, ADAM_WD=0.5, GRAD_CLIP_NORM=0.1)
    layers, momentum, trainable = trainer.config.num_layers, trainer.optimizers.muon.momentum, 2
    trainer.step(tg.Progress(0, 0.0), trainer.config.loops)
    before, states = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, adam_states(trainer)
    momenta = [m.clone() for m in momentum]
    for step in (1, 2):
        trainer.step(tg.Progress(step, 0.0), trainer.config.loops, trainable)
    after, states_after = dict(trainer.model.named_parameters()), adam_states(trainer)
    for name, m, m_before in zip(tg.BANKS, momentum, momenta, strict=True):
        for i in range(len(m)):
            frozen = i % layers >= trainable
            assert torch.equal(m[i], m_before[i]) == torch.equal(after[name][i], before[name][i]) == frozen, (name, i)
    for name in set(before) - set(tg.BANKS):
        frozen = name.startswith("blocks.") and int(name.split(".")[1]) >= trainable
        same_state = all(torch.equal(states[name][key], states_after[name][key]) for key in states[name])
        assert torch.equal(before[name], after[name]) == same_state == frozen, name
    trainer.step(tg.Progress(3, 0.0), trainer.config.loops)
    assert not any(torch.equal(after[name][-1], before[name][-1]) for name in tg.BANKS)


def test_the_average_is_the_moving_average_of_the_weights(data):
    c = config(TINY, DATA_PATH=data, EMA_DECAY=0.8)
    trainer = tg.Trainer(build_model(c), tg.TrainLoader(c, single_run()), c, single_run())
    expected = [p.detach().double() for p in trainer.model.parameters()]
    for step in range(5):
        trainer.step(tg.Progress(step, 0.0), False)
        share = tg.ema_weight(step, c)
        expected = [
            (1 - share) * e + share * p.detach().double()
            for e, p in zip(expected, trainer.model.parameters(), strict=True)
        ]
    last = [p.detach().clone() for p in trainer.model.parameters()]
    assert all(torch.allclose(a.double(), e, rtol=1e-5, atol=1e-6) for a, e in zip(trainer.ema, expected, strict=True))
    assert not all(map(torch.equal, last, trainer.ema))
    trainer.use_average()
    assert all(map(torch.equal, [p.detach() for p in trainer.model.parameters()], trainer.ema))


def test_without_an_average_the_last_weights_are_kept(data):
    trainer = make_trainer(TINY, data, EMA_DECAY=0)
    trainer.step(tg.Progress(0, 0.0), False)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.use_average()
    assert trainer.ema is None and all(map(torch.equal, before, [p.detach() for p in trainer.model.parameters()]))


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("kept", ["ema", "swa", "both"])
def test_the_swa_is_the_mean_of_late_weights(kept, data, capsys):
    """Every second step of those whose rate is below 0.5; `both` is the mean of the two averages."""
    trainer = make_trainer(
        TINY,
        data,
        random_weights=True,
        ITERATIONS=10,
        WARMDOWN_FRAC=1,
        EMA_DECAY=0.8,
        SWA_ENABLED=1,
        SWA_EVERY=2,
        SWA_START=0.5,
        WEIGHT_AVERAGE=kept,
    )
    assert ((trainer.ema is not None), (trainer.swa is not None)) == (kept != "swa", kept != "ema")
    snapshots, ema = [], weights_of(trainer)
    for step in range(10):
        trainer.step(tg.Progress(step, 0.0), False)
        ema = [
            torch.lerp(a, w, tg.ema_weight(step, trainer.config)) for a, w in zip(ema, weights_of(trainer), strict=True)
        ]
        if (step + 1) % 2 == 0 and 1 - step / 10 < 0.5:
            snapshots.append(weights_of(trainer))
    assert len(snapshots) == 2 and trainer.swa_count == (0 if kept == "ema" else 2)
    late = [sum(w) / 2 for w in zip(*snapshots, strict=True)]
    expected = {"ema": ema, "swa": late, "both": [(a + b) / 2 for a, b in zip(ema, late, strict=True)]}[kept]
    capsys.readouterr()
    trainer.use_average()
    assert capsys.readouterr().out == ("" if kept == "ema" else "swa: 2 weights averaged\n")
    assert all(torch.allclose(a, e, rtol=1e-5, atol=1e-6) for a, e in zip(weights_of(trainer), expected, strict=True))
    assert not any(torch.equal(a, s) for a, s in zip(weights_of(trainer), snapshots[-1], strict=True))


def test_a_run_too_short_for_the_swa_keeps_what_there_is(data):
    for decay in (0, 0.8):
        trainer = make_trainer(TINY, data, SWA_ENABLED=1, SWA_EVERY=50, EMA_DECAY=decay)
        trainer.step(tg.Progress(0, 0.0), False)
        expected = [a.clone() for a in trainer.ema or weights_of(trainer)]
        trainer.use_average()
        assert all(map(torch.equal, weights_of(trainer), expected))


def test_late_qat_changes_the_update_and_the_weights_stay_off_the_grid(data):
    ends = {}
    for fake_quant in (False, True):
        trainer = make_trainer(POLY_LIKE, data, random_weights=True, MATRIX_BITS=3)
        trainer.step(tg.Progress(0, 0.0), looped=False, fake_quant=fake_quant)
        ends[fake_quant] = trainer.model
    for name in tg.BANKS:
        plain, late = (getattr(ends[fake_quant], name).detach() for fake_quant in (False, True))
        assert (plain - late).norm() > 1e-3 * plain.norm()
        assert len(late[0].unique()) > 100  # the masters are not on a grid of 7 levels a row


def test_a_step_computes_the_variant_that_it_is_given_and_no_other(data):
    """A step's arguments alone decide: what an earlier step computed leaves no trace in the model."""
    ends = []
    for earlier in (dict(), dict(trainable_layers=2, fake_quant=True)):
        trainer = make_trainer(POLY_LIKE, data, random_weights=True)
        if earlier:
            weights = weights_of(trainer)
            trainer.step(tg.Progress(0, 0.0), looped=False, **earlier)
            tg.copy_all(trainer.parameters(), weights)
            trainer.optimizers.reset()
        trainer.step(tg.Progress(1, 0.0), looped=False)
        ends.append(weights_of(trainer))
    assert all(map(torch.equal, *ends))


def test_every_change_of_what_steps_compute_is_logged(data, tmp_path):
    end, log, _, _ = logged_run(tmp_path, data, POLY_LIKE, ITERATIONS=10, TRAIN_LOG_EVERY=0, SWA_EVERY=2)
    assert end.step == 10 and log == [
        "step:0 training layers 0-1 of 6",
        "step:2 training layers 0-3 of 6",
        "step:5 training layers 0-5 of 6",
        "step:8 late QAT enabled: attention rounded to 6 bits, MLP to 6 bits",
    ]


def logged_run(folder, data, base=TINY, **knobs):
    """Trains with a log in a folder; returns where it ended, the log's lines, the metrics."""
    trainer, scores = make_trainer(base, data, **knobs), []
    trainer.run.folder = folder

    def validate():
        scores.append(1)
        return tg.Score(3.0 * 100, 100, 150)

    end = tg.train(trainer, validate)
    log = (folder / "log.txt").read_text().splitlines() if (folder / "log.txt").exists() else []
    metrics = folder / "metrics.jsonl"
    return end, log, [json.loads(x) for x in metrics.read_text().splitlines()] if metrics.exists() else [], len(scores)


def test_validation_and_log_lines_come_when_asked_for(data, tmp_path):
    end, log, metrics, count = logged_run(tmp_path, data, ITERATIONS=10, VAL_LOSS_EVERY=4, TRAIN_LOG_EVERY=5)
    assert end.step == 10 and end.seconds > 0
    trained = [int(re.match(r"step:(\d+)/10 train_loss:", line)[1]) for line in log if "train_loss" in line]
    validations = [line for line in log if "val_loss" in line]
    validated = [int(re.match(r"step:(\d+)/10 val_loss:3\.\d+ val_bpb:", line)[1]) for line in validations]
    assert set(trained) >= {5, 10} and not set(trained) & {6, 7, 8, 9}
    assert validated == [0, 4, 8, 10] and count == 4
    assert [m["step"] for m in metrics if "train_loss" in m] == trained
    assert [m["step"] for m in metrics if "val_bpb" in m] == validated
    assert all(m["val_bpb"] == pytest.approx(3.0 * 100 / 0.6931471805599453 / 150) for m in metrics if "val_bpb" in m)


def test_silence(data, tmp_path):
    end, log, metrics, count = logged_run(tmp_path, data, ITERATIONS=4, VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=0)
    assert (end.step, log, metrics, count) == (4, [], [], 0)


def test_loops_are_enabled_at_their_fraction(data, tmp_path):
    seen = []
    trainer = make_trainer(RECORD_LIKE, data, ITERATIONS=10, ENABLE_LOOPING_AT=0.5)
    trainer.run.folder = tmp_path
    step = trainer.step
    trainer.step = lambda p, looped, *rest: (seen.append((p.step, looped)), step(p, looped, *rest))[1]
    tg.train(trainer, no_validation)
    assert seen == [(n, n >= 5) for n in range(10)]
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "loop" in line]
    assert lines == [f"step:5 loops enabled: layer order {tg.execution_order(trainer.config, True)}"]


def clock_of_steps(trainer, monkeypatch):
    """A clock on which each training step takes an eighth of a second, and all else no time."""
    clock, step = Clock(monkeypatch), trainer.step

    def timed_step(*arguments, **more):
        clock.now += 0.125
        return step(*arguments, **more)

    trainer.step = timed_step
    return clock


def test_time_ends_the_training(data, monkeypatch):
    trainer = make_trainer(TINY, data, ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=0.5, TRAIN_LOG_EVERY=0)
    clock_of_steps(trainer, monkeypatch)
    end = tg.train(trainer, no_validation)
    assert (end.step, end.seconds) == (4, 0.5)


def test_time_for_validation_is_not_training_time(data, monkeypatch):
    trainer = make_trainer(TINY, data, ITERATIONS=3, VAL_LOSS_EVERY=1, TRAIN_LOG_EVERY=0)
    clock, seen = clock_of_steps(trainer, monkeypatch), []

    def validate():
        clock.now += 0.5
        seen.append(clock.now)
        return tg.Score(1.0, 1, 1)

    end = tg.train(trainer, validate)
    assert (end.step, end.seconds, len(seen)) == (3, 0.375, 4)


def test_a_loss_that_is_not_finite_is_a_clear_error(data, tmp_path):
    trainer = make_trainer(TINY, data, TRAIN_LOG_EVERY=1)
    with torch.no_grad():
        trainer.model.embedding.fill_(float("nan"))
    with pytest.raises(tg.ConfigError, match="the training loss is nan at step 1"):
        tg.train(trainer, no_validation)


@pytest.mark.parametrize("seed, other", [(1, 2)])
def test_training_is_deterministic_and_depends_on_the_seed(seed, other, data):
    def weights(s):
        trainer = make_trainer(RECORD_LIKE, data, SEED=s, ITERATIONS=4, TRAIN_LOG_EVERY=0)
        tg.train(trainer, no_validation)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    first = weights(seed)
    assert torch.equal(first, weights(seed)) and not torch.equal(first, weights(other))


def test_master_weights_keep_steps_that_bfloat16_would_lose(data):
    """A rate of 1e-5: in bfloat16 most entries near 0.5 would not move at all."""
    c = config(TINY, DATA_PATH=data, TIED_EMBED_LR=1e-5, MATRIX_LR=1e-5, SCALAR_LR=1e-5)
    assert c.compute_dtype == "bfloat16"
    model = build_model(c)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tg.Trainer(model, tg.TrainLoader(c, single_run()), c, single_run()).step(tg.Progress(0, 0.0), False)
    moved = (model.embedding != before["embedding"]).float().mean()
    assert all(p.dtype == torch.float32 for p in model.parameters()) and moved > 0.9
    assert (model.qo_bank != before["qo_bank"]).float().mean() > 0.9


# ------------------------------------------------------------------------------------ tokens predicted beside targets


def losses_of_tokens(trainer, p, loss):
    """The gradients that one step gives the optimizers, and those of a loss of the plain model, both by name."""
    model, found = trainer.model, {}

    def keep(*_):
        found.update({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)

    trainer.optimizers.step = keep
    trainer.step(p, *tg.step_variant_at(p, trainer.config))
    for micro in range(trainer.layout.micro_steps):
        (loss(trainer.loader.batch(p.step, micro)) / trainer.config.train_batch_tokens).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    return found, expected


def assert_equal_gradients(found, expected):
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-11 * (1 + gradient.abs().max())), name


def known_ahead(batch, b, t, distance):
    """Token by token: what stands so many places after position t, unless a document or the sequence ends before."""
    row = [batch.ids[b, 0].item(), *batch.targets[b].tolist()]
    if t + distance >= len(row) or tg.BOS_ID in row[t + 1 : t + distance]:
        return None
    return row[t + distance]


def test_tokens_ahead_end_with_their_document():
    batch = random_batch(config(VOCAB_SIZE=48), 5, 40, document_length=6)
    for distance in (1, 2, 3, 5, 40):
        tokens, counted = tg.tokens_ahead(batch, distance)
        assert tokens.shape == counted.shape == batch.ids.shape
        for b in range(5):
            found = [int(x) if ok else None for x, ok in zip(tokens[b], counted[b], strict=True)]
            assert found == [known_ahead(batch, b, t, distance) for t in range(40)]
    tokens, counted = tg.tokens_ahead(batch, 1)
    assert torch.equal(tokens, batch.targets) and counted.all()
    ends = tg.tokens_ahead(batch, 2)
    assert (ends[0][ends[1]] == tg.BOS_ID).any()  # the end of a document is predicted, what follows it is not


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, POLY_LIKE], ids=["tiny", "record", "poly"])
def test_multi_token_prediction_adds_the_losses_of_tokens_ahead(base, data):
    """Against one forward pass of the plain model for each distance, in float64."""
    knobs = dict(COMPUTE_DTYPE="float64", NEFTUNE_ALPHA=0, FOCAL_ENABLED=0, Z_LOSS_WEIGHT=0, ITERATIONS=10)
    trainer = make_trainer(base, data, random_weights=True, **knobs, MTP_WEIGHTS="0.5,0.25", MTP_END=0.8)
    p = tg.Progress(1, 0.0)
    looped, layers, *_ = tg.step_variant_at(p, trainer.config)

    def loss(batch):
        call = dict(looped=looped, trainable_layers=layers)
        total = trainer.model(*batch, **call)[0].sum()
        for distance, weight in ((2, 0.5), (3, 0.25)):
            rows = [[known_ahead(batch, b, t, distance) for t in range(32)] for b in range(len(batch.ids))]
            targets = torch.tensor([[token or 0 for token in row] for row in rows])
            counted = torch.tensor([[token is not None for token in row] for row in rows])
            nll, _ = trainer.model(batch.ids, targets, batch.documents, **call)
            total = total + weight * (1 - 0.1 / 0.8) * nll[counted].sum()
        return total

    assert_equal_gradients(*losses_of_tokens(trainer, p, loss))


def test_after_its_end_multi_token_prediction_costs_nothing(data, capsys):
    """Steps from MTP_END on are those of a training without it, bit by bit, and the log says where it ends."""
    trainers = [make_trainer(TINY, data, random_weights=True, MTP_WEIGHTS=w) for w in ("", "0.5")]
    p = tg.Progress(9, 0.0)
    losses = [t.step(p, *tg.step_variant_at(p, t.config)) for t in trainers]
    assert torch.equal(*losses) and same(*map(state, trainers))
    tg.train(make_trainer(TINY, data, MTP_WEIGHTS="0.5"), no_validation)
    assert re.findall(r"step:(\d+) multi-token prediction ends", capsys.readouterr().out) == ["9"]


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, POLY_LIKE], ids=["tiny", "record", "poly"])
def test_the_prefix_loss_is_that_of_the_longest_piece_that_begins_the_target(base, data):
    """Against a search in the pieces' texts for each target, and one more forward pass, in float64."""
    knobs = dict(COMPUTE_DTYPE="float64", NEFTUNE_ALPHA=0, FOCAL_ENABLED=0, Z_LOSS_WEIGHT=0, ITERATIONS=10)
    trainer = make_trainer(base, data, random_weights=True, **knobs, PREFIX_LOSS_WEIGHT=0.5)
    model = tg.Vocabulary(trainer.config).model
    pieces = [model.IdToPiece(i) for i in range(model.vocab_size())]
    has_text = [not (model.IsControl(i) or model.IsUnknown(i) or model.IsByte(i)) for i in range(len(pieces))]
    counts = []

    def prefix_of(token):
        """The longest piece with text that this one's text begins with."""
        candidates = [
            i
            for i, piece in enumerate(pieces)
            if has_text[i] and piece != pieces[token] and pieces[token].startswith(piece)
        ]
        return max(candidates, key=lambda i: len(pieces[i]), default=None) if has_text[token] else None

    p = tg.Progress(5, 0.0)
    looped, layers, *_ = tg.step_variant_at(p, trainer.config)

    def loss(batch):
        prefixes = [prefix_of(token) for token in batch.targets.flatten().tolist()]
        counted = torch.tensor([token is not None for token in prefixes]).view_as(batch.targets)
        counts.append(counted.double().mean())
        targets = torch.tensor([token or 0 for token in prefixes]).view_as(batch.targets)
        call = dict(looped=looped, trainable_layers=layers)
        nll, _ = trainer.model(batch.ids, targets, batch.documents, **call)
        return trainer.model(*batch, **call)[0].sum() + 0.5 * (1 - 5 / 10) * nll[counted].sum()

    assert_equal_gradients(*losses_of_tokens(trainer, p, loss))
    assert all(0.2 < share < 1 for share in counts)


def test_both_kinds_of_further_tokens_add_up(data):
    """The gradient of a step with both is the sum of their parts."""
    parts = {}
    for knobs in ((), ("MTP_WEIGHTS",), ("PREFIX_LOSS_WEIGHT",), ("MTP_WEIGHTS", "PREFIX_LOSS_WEIGHT")):
        values = dict.fromkeys(knobs, 0.5)
        trainer = make_trainer(RECORD_LIKE, data, random_weights=True, COMPUTE_DTYPE="float64", **values)
        p = tg.Progress(0, 0.0)
        parts[len(parts)], _ = losses_of_tokens(trainer, p, lambda batch, t=trainer: t.model.embedding.sum())
    for name, both in parts[3].items():
        if both is not None:
            expected = parts[1][name] + parts[2][name] - parts[0][name]
            assert torch.allclose(both, expected, rtol=1e-9, atol=1e-12) and not torch.equal(both, parts[0][name]), name


@pytest.mark.parametrize("preset, base", [("record", RECORD_LIKE), ("poly5", POLY_LIKE)])
def test_the_originals_train_calibrate_and_pack(preset, base, data):
    """What ORIGINAL=1 sets, in a tiny model: a part of it, or two together, may go untested elsewhere."""
    numbers = {bool: int}
    original = {n.upper(): numbers.get(type(v), type(v))(v) for n, v in tg.ORIGINALS[preset].items()}
    trainer = make_trainer(base, data, **dict(original, GPTQ_CALIBRATION_BATCHES=1, NEFTUNE_ALPHA=5))
    assert trainer.config.data_order == "stream"
    before = trainer.model.embedding.detach().clone()
    for step in range(2):
        assert trainer.step(tg.Progress(step, 0.0), trainer.config.loops).isfinite()
    assert not torch.equal(before, trainer.model.embedding)
    weights = {name: p.detach().float() for name, p in trainer.model.named_parameters()}
    artifact = tg.make_artifact(weights, tg.calibrate(trainer, 2), 10**7, trainer.config, lambda line: None)
    assert set(tg.unpack(artifact)[1]) == set(weights)
