"""One step and the loop: warmup leaves no trace, losses fall, averages, switches, logs."""

import json
import re

import pytest
import torch
import train_gpt as tg
from helpers import RECORD_LIKE, TINY, build_model, config, single_run


def make_trainer(base, data, random_weights=False, **knobs):
    c = config(base, DATA_PATH=data, **knobs)
    if random_weights:
        return tg.Trainer(build_model(c), tg.TrainLoader(c, single_run()))
    model = tg.GPT(c)
    model.reset()
    return tg.Trainer(model, tg.TrainLoader(c, single_run()))


def state(trainer):
    """Copies of all that a step changes: weights, average, both optimizers."""
    return dict(weights=[p.detach().clone() for p in trainer.model.parameters()],
                average=[a.clone() for a in trainer.average or []],
                momentum=[m.clone() for m in trainer.optimizers.muon.momentum],
                adam=json.dumps({str(k): {n: v.tolist() for n, v in s.items()}
                                 for k, s in trainer.optimizers.adam.state_dict()["state"].items()}),
                grads=[p.grad is None for p in trainer.model.parameters()])


def same(x, y):
    tensors = ("weights", "average", "momentum")
    return x.keys() == y.keys() and all(len(x[k]) == len(y[k]) for k in x) and all(
        all(map(torch.equal, x[k], y[k])) if k in tensors else x[k] == y[k] for k in x)


def no_validation():
    raise AssertionError("no validation was asked for")


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE], ids=["tiny", "record"])
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
    assert all(torch.equal(x, y) for x, y in zip(trainer.loader.batch(0, 0)[:2], rows[:2]))


def test_warmup_runs_every_order_that_the_run_will_need(data):
    for base, orders in ((TINY, {False}), (RECORD_LIKE, {False, True})):
        trainer, seen = make_trainer(base, data, WARMUP_STEPS=1), []
        forward = trainer.forward
        trainer.forward = lambda *a, **k: (seen.append(k["looped"]), forward(*a, **k))[1]
        trainer.warm_up()
        assert set(seen) == orders


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE], ids=["tiny", "record"])
def test_a_run_with_warmup_ends_with_the_weights_of_one_without(base, data):
    ends = []
    for warmup in (0, 3):
        trainer = make_trainer(base, data, WARMUP_STEPS=warmup, ITERATIONS=6, EMA_DECAY=0.9, TRAIN_LOG_EVERY=0)
        trainer.warm_up()
        assert tg.train(trainer, no_validation).step == 6
        ends.append(state(trainer))
    assert same(*ends)


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
        trainer = make_trainer(RECORD_LIKE, data, random_weights=True, COMPUTE_DTYPE="float64", GRAD_CLIP_NORM=0,
                               MICRO_BATCH_TOKENS=micro)
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


def test_the_average_is_the_moving_average_of_the_weights(data):
    c = config(TINY, DATA_PATH=data, EMA_DECAY=0.8)
    trainer = tg.Trainer(build_model(c), tg.TrainLoader(c, single_run()))
    expected = [p.detach().double() for p in trainer.model.parameters()]
    for step in range(5):
        trainer.step(tg.Progress(step, 0.0), False)
        share = tg.ema_share(step, c)
        expected = [(1 - share) * e + share * p.detach().double() for e, p in zip(expected, trainer.model.parameters())]
    last = [p.detach().clone() for p in trainer.model.parameters()]
    assert all(torch.allclose(a.double(), e, rtol=1e-5, atol=1e-6) for a, e in zip(trainer.average, expected))
    assert not all(map(torch.equal, last, trainer.average))
    trainer.use_average()
    assert all(map(torch.equal, [p.detach() for p in trainer.model.parameters()], trainer.average))


def test_without_an_average_the_last_weights_are_kept(data):
    trainer = make_trainer(TINY, data, EMA_DECAY=0)
    trainer.step(tg.Progress(0, 0.0), False)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.use_average()
    assert trainer.average is None and all(map(torch.equal, before, [p.detach() for p in trainer.model.parameters()]))


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


def test_the_loop_is_switched_on_at_its_fraction(data, tmp_path):
    c, seen = RECORD_LIKE, []
    trainer = make_trainer(c, data, ITERATIONS=10, ENABLE_LOOPING_AT=0.5)
    trainer.run.folder = tmp_path
    step = trainer.step
    trainer.step = lambda p, looped, *use: (seen.append((p.step, looped)), step(p, looped, *use))[1]
    tg.train(trainer, no_validation)
    assert seen == [(n, n >= 5) for n in range(10)]
    assert sum("looping" in line for line in (tmp_path / "log.txt").read_text().splitlines()) == 1


def test_time_ends_the_training(data):
    trainer = make_trainer(TINY, data, ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=0.5, TRAIN_LOG_EVERY=0)
    end = tg.train(trainer, no_validation)
    assert 0.5 <= end.seconds < 5 and 1 <= end.step < 10**4


def test_time_for_validation_is_not_training_time(data):
    import time

    trainer = make_trainer(TINY, data, ITERATIONS=3, VAL_LOSS_EVERY=1, TRAIN_LOG_EVERY=0)
    end = tg.train(trainer, lambda: time.sleep(0.5) or tg.Score(1.0, 1, 1))
    assert end.step == 3 and end.seconds < 1.9  # four validations of half a second


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
    tg.Trainer(model, tg.TrainLoader(c, single_run())).step(tg.Progress(0, 0.0), False)
    moved = (model.embedding != before["embedding"]).float().mean()
    assert all(p.dtype == torch.float32 for p in model.parameters()) and moved > 0.9
    assert (model.qo_bank != before["qo_bank"]).float().mean() > 0.9
