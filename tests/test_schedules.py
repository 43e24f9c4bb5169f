"""Schedules are pure functions of the progress: their corners."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import config, examples


def at(step, seconds=0.0):
    return tg.Progress(step, seconds)


def by_steps(**knobs):
    return config(ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=0, **knobs)


def by_time(**knobs):
    return config(ITERATIONS=10**9, MAX_WALLCLOCK_SECONDS=600, **knobs)


def test_the_fraction_is_the_larger_of_time_and_steps():
    c = config(ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=100)
    assert tg.fraction_done(at(0), c) == 0
    assert tg.fraction_done(at(250, 10), c) == 0.25
    assert tg.fraction_done(at(250, 70), c) == 0.7
    assert tg.fraction_done(at(1000, 70), c) == 1
    assert tg.fraction_done(at(10, 100), c) == 1
    assert tg.fraction_done(at(5000, 500), c) == 1
    assert tg.fraction_done(at(250, 1e9), by_steps()) == 0.25  # no limit of time


def test_reserved_seconds_are_not_trained():
    c = config(ITERATIONS=10**9, MAX_WALLCLOCK_SECONDS=600, GPTQ_RESERVE_SECONDS=12)
    assert tg.fraction_done(at(1, 294), c) == pytest.approx(0.5)
    assert tg.fraction_done(at(1, 588), c) == 1


@pytest.mark.parametrize("make", [by_steps, by_time])
def test_warmdown_by_fraction(make):
    c = make(WARMDOWN_FRAC=0.4)
    for share, expected in ((0, 1), (0.3, 1), (0.6, 1), (0.8, 0.5), (0.9, 0.25), (1, 0)):
        progress = at(round(1000 * share)) if make is by_steps else at(5, 600 * share)
        assert tg.lr_multiplier(progress, c) == pytest.approx(expected, abs=1e-6)


def test_warmdown_has_a_floor():
    c = by_steps(WARMDOWN_FRAC=0.85, MIN_LR=0.1)
    assert tg.lr_multiplier(at(150), c) == 1 and tg.lr_multiplier(at(575), c) == pytest.approx(0.5)
    assert tg.lr_multiplier(at(990), c) == tg.lr_multiplier(at(1000), c) == 0.1


def test_warmdown_by_steps():
    c = by_steps(WARMDOWN_FRAC=0, WARMDOWN_ITERS=200)
    for step, expected in ((0, 1), (799, 1), (800, 1), (900, 0.5), (1000, 0)):
        assert tg.lr_multiplier(at(step), c) == pytest.approx(expected, abs=1e-9)


def test_warmdown_by_steps_under_a_limit_of_time_follows_the_pace():
    """At 0.1 s a step, 1200 steps take 120 of the 600 s."""
    c = by_time(WARMDOWN_FRAC=0, WARMDOWN_ITERS=1200)
    for seconds, expected in ((100, 1), (480, 1), (540, 0.5), (570, 0.25), (600, 0)):
        assert tg.lr_multiplier(at(seconds * 10, seconds), c) == pytest.approx(expected, abs=1e-4)


def test_warmdown_by_steps_ends_where_the_training_time_ends():
    """The reserve shortens the training, and the warmdown's 1200 steps still are its last 1200."""
    c = by_time(WARMDOWN_FRAC=0, WARMDOWN_ITERS=1200, GPTQ_RESERVE_SECONDS=120)
    for seconds, expected in ((359, 1), (420, 0.5), (480, 0)):
        assert tg.lr_multiplier(at(seconds * 10, seconds), c) == pytest.approx(expected, abs=1e-4)


def test_a_warmdown_longer_than_the_run_starts_at_once():
    assert tg.lr_multiplier(at(0), by_steps(WARMDOWN_FRAC=0, WARMDOWN_ITERS=5000)) == 1
    assert tg.lr_multiplier(at(500), by_steps(WARMDOWN_FRAC=0, WARMDOWN_ITERS=5000)) == pytest.approx(0.5)
    assert tg.lr_multiplier(at(1), by_steps(WARMDOWN_FRAC=1)) == pytest.approx(0.999)


def test_no_warmdown():
    c = by_steps(WARMDOWN_FRAC=0, WARMDOWN_ITERS=0)
    assert [tg.lr_multiplier(at(step), c) for step in (0, 999, 1000)] == [1, 1, 1]


@examples(max_examples=200)
@given(
    st.integers(0, 2000),
    st.floats(0, 700),
    st.sampled_from([0, 0.3, 1.0]),
    st.sampled_from([0, 10, 5000]),
    st.sampled_from([0, 0.1]),
    st.sampled_from([0, 600]),
)
def test_the_rate_stays_between_its_floor_and_one_and_never_rises(step, seconds, fraction, steps, floor, limit):
    c = config(ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=limit, WARMDOWN_FRAC=fraction, WARMDOWN_ITERS=steps, MIN_LR=floor)
    progress, further = at(step, seconds), at(step + 7, seconds * (step + 7) / max(step, 1))  # at the same pace
    now, later = tg.lr_multiplier(progress, c), tg.lr_multiplier(further, c)
    assert floor <= later <= now + 1e-12 and now <= 1
    assert 0 <= tg.fraction_done(at(step, seconds), c) <= 1


def test_the_warmdown_may_follow_a_cosine():
    c = by_steps(WARMDOWN_FRAC=0.8, WARMDOWN_SHAPE="cosine")
    for step, expected in ((0, 1), (200, 1), (400, 0.853553), (600, 0.5), (800, 0.146447), (1000, 0)):
        assert tg.lr_multiplier(at(step), c) == pytest.approx(expected, abs=1e-6)


def test_the_rate_warms_up_beside_its_multiplier():
    """What begins where the multiplier has fallen, as late QAT does, must not begin in the warmup of the rate."""
    c = by_steps(LR_WARMUP_STEPS=10, WARMDOWN_FRAC=0.5, LATE_QAT_THRESHOLD=0.5)
    assert [tg.lr_warmup(at(step), c) for step in (0, 4, 9, 500)] == [0.1, 0.5, 1, 1]
    assert tg.lr_multiplier(at(0), c) == 1 and not tg.step_variant_at(at(0), c).fake_quant
    assert tg.lr_warmup(at(0), by_steps()) == 1


def test_momentum_cycles_between_its_bounds():
    """After its warmup, which ends where it ends without a cycle."""
    cycle = dict(MUON_MOMENTUM_MIN=0.85, MUON_MOMENTUM_MAX=0.95, MUON_MOMENTUM_CYCLE=50)
    c = by_steps(MUON_MOMENTUM=0.99, MUON_MOMENTUM_WARMUP_START=0.92, MUON_MOMENTUM_WARMUP_STEPS=100, **cycle)
    wave = (0, 0.92), (50, 0.955), (99, 0.9893), (100, 0.85), (110, 0.87), (150, 0.95), (175, 0.9), (200, 0.85)
    for step, expected in wave:
        assert tg.muon_beta(at(step), c) == pytest.approx(expected)


@pytest.mark.parametrize("start, steps", [(0.7, (699, 700)), (300, (299, 300))])
def test_fake_quantization_starts_at_a_share_or_a_step(start, steps):
    """Whatever the learning rate is; the warmup compiles both variants, in order."""
    c = by_steps(QAT_START=start, LATE_QAT_THRESHOLD=0.9, WARMDOWN_FRAC=1)
    assert [tg.step_variant_at(at(step), c).fake_quant for step in steps] == [False, True]
    assert [variant.fake_quant for variant in tg.all_step_variants(c)] == [False, True]
    assert not tg.step_variant_at(at(999), by_steps(WARMDOWN_FRAC=1)).fake_quant


@pytest.mark.parametrize("original", [0, 1])
@pytest.mark.parametrize("preset", ["record", "poly5"])
def test_no_steps_at_all_have_variants_too(preset, original):
    """The warmup runs them: ITERATIONS=0 scores initial weights."""
    c = config({"PRESET": preset}, ITERATIONS=0, QAT_START=300, RECUR_START_STEP=5, ORIGINAL=original)
    assert tg.all_step_variants(c)


def test_a_step_that_the_time_may_overtake_leaves_both_variants():
    c = config(ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=600, QAT_START=300, WARMDOWN_FRAC=1)
    assert [variant.fake_quant for variant in tg.all_step_variants(c)] == [False, True]
    assert not tg.step_variant_at(at(299, 599), c).fake_quant


def test_momentum_warms_up_linearly():
    c = config(MUON_MOMENTUM=0.97, MUON_MOMENTUM_WARMUP_START=0.92, MUON_MOMENTUM_WARMUP_STEPS=1500)
    for step, expected in ((0, 0.92), (750, 0.945), (1500, 0.97), (9000, 0.97)):
        assert tg.muon_beta(at(step), c) == pytest.approx(expected, rel=1e-12)
    assert tg.muon_beta(at(0), config(MUON_MOMENTUM=0.9, MUON_MOMENTUM_WARMUP_STEPS=0)) == pytest.approx(0.9)


def test_the_loop_switches_on_once():
    looped = dict(NUM_LOOPS=2, LOOP_START=1, LOOP_END=1, ENABLE_LOOPING_AT=0.35)
    c = by_steps(**looped)
    assert [tg.loops_enabled_at(at(step), c) for step in (0, 349, 350, 1000)] == [False, False, True, True]
    assert tg.loops_enabled_at(at(0), by_steps(**{**looped, "ENABLE_LOOPING_AT": 0}))
    assert not tg.loops_enabled_at(at(1000), by_steps())  # a model without a loop
    assert tg.loops_enabled_at(at(1, 210.1), by_time(**looped)) and not tg.loops_enabled_at(
        at(1, 209), by_time(**looped)
    )


def test_the_loop_switches_on_at_a_step():
    """Whatever the time limit says."""
    looped = dict(NUM_LOOPS=1, LOOP_START=1, LOOP_END=1, ENABLE_LOOPING_AT=0, RECUR_START_STEP=300)
    c = config(ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=600, **looped)
    assert [tg.loops_enabled_at(at(step, 599), c) for step in (0, 299, 300)] == [False, False, True]
    assert not tg.loops_enabled_at(at(300), by_steps(RECUR_START_STEP=300))  # a model without a loop


def test_depth_grows_in_stages():
    c = by_steps(NUM_LAYERS=11, PROGRESSIVE_DEPTH_SCHEDULE="0.08,0.25")
    assert [tg.trainable_layers_at(at(step), c) for step in (0, 79, 80, 249, 250, 999)] == [3, 3, 7, 7, 11, 11]
    assert tg.trainable_layers_at(at(1, 149), by_time(NUM_LAYERS=11, PROGRESSIVE_DEPTH_SCHEDULE="0.25")) == 5
    assert tg.trainable_layers_at(at(1, 151), by_time(NUM_LAYERS=11, PROGRESSIVE_DEPTH_SCHEDULE="0.25")) == 11
    depth = dict(NUM_LAYERS=11, PROGRESSIVE_DEPTH_SCHEDULE="0.25", PROGRESSIVE_DEPTH_BY="steps")
    counted = config(ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=600, **depth)
    assert [tg.trainable_layers_at(at(step, 599), counted) for step in (249, 250)] == [5, 11]
    for off in ("", "0"):
        assert tg.trainable_layers_at(at(0), by_steps(NUM_LAYERS=11, PROGRESSIVE_DEPTH_SCHEDULE=off)) == 11


def test_late_qat_begins_below_its_rate():
    c = by_steps(WARMDOWN_FRAC=0.4, LATE_QAT_THRESHOLD=0.15)
    found = [tg.step_variant_at(at(step), c).fake_quant for step in (0, 600, 939, 941, 999)]
    assert found == [False, False, False, True, True]
    assert not tg.step_variant_at(at(999), by_steps(WARMDOWN_FRAC=0.4)).fake_quant
    floor = by_steps(WARMDOWN_FRAC=0.4, MIN_LR=0.2, LATE_QAT_THRESHOLD=0.15)
    assert not tg.step_variant_at(at(999), floor).fake_quant


def test_the_step_variants_of_poly5_and_of_the_record():
    found = tg.all_step_variants(config({"PRESET": "poly5"}))
    expected = [(False, 3, False), (False, 7, False), (False, 11, False), (False, 11, True)]
    assert found == [tg.StepVariant(*fields) for fields in expected]
    assert all(type(variant) is tg.StepVariant for variant in found)
    record = [tg.StepVariant(looped, 11, False) for looped in (False, True)]
    original = tg.all_step_variants(config({"PRESET": "poly5", "ORIGINAL": "1"}))
    assert original == [tg.StepVariant(False, layers, False) for layers in (3, 7, 11)]
    assert tg.all_step_variants(config({"PRESET": "record"})) == record
    assert tg.all_step_variants(config()) == [tg.StepVariant(False, 3, False)]


@examples(max_examples=150)
@given(
    st.sampled_from(["0", "0.3", "0.08,0.25", "0.5,0.9"]),
    st.sampled_from([0, 0.35, 0.95, 1]),
    st.sampled_from([0, 0.1, 0.6, 1]),
    st.sampled_from([0, 0.3, 1.0]),
    st.sampled_from([0, 300, 5000]),
    st.sampled_from([0, 0.15]),
    st.sampled_from([0, 600]),
    st.floats(0.1, 3),
    st.sampled_from(
        [
            {},
            dict(MTP_WEIGHTS="0.5"),
            dict(MTP_WEIGHTS="0.5", MTP_END=0.25),
            dict(MTP_WEIGHTS="1", MTP_END=1),
            dict(PROGRESSIVE_DEPTH_BY="steps"),
            dict(RECUR_START_STEP=400),
            dict(RECUR_START_STEP=2000, PROGRESSIVE_DEPTH_BY="steps"),
        ]
    ),
)
def test_no_step_computes_what_the_warmup_did_not(
    depth, loop, threshold, fraction, steps, floor, limit, pace, switches
):
    c = config(
        ITERATIONS=1000,
        MAX_WALLCLOCK_SECONDS=limit,
        PROGRESSIVE_DEPTH_SCHEDULE=depth,
        NUM_LOOPS=1,
        LOOP_START=0,
        LOOP_END=0,
        ENABLE_LOOPING_AT=loop,
        LATE_QAT_THRESHOLD=threshold,
        WARMDOWN_FRAC=fraction,
        WARMDOWN_ITERS=steps,
        MIN_LR=floor,
        NUM_LAYERS=5,
        **switches,
    )
    progress = [at(step, step * pace) for step in range(1000)]
    needed = {tg.step_variant_at(p, c) for p in progress if tg.fraction_done(p, c) < 1}
    assert needed <= set(tg.all_step_variants(c)) and len(set(tg.all_step_variants(c))) == len(tg.all_step_variants(c))


def test_the_weights_of_tokens_further_ahead_fall_to_zero():
    c = by_steps(MTP_WEIGHTS="0.5,0.25", MTP_END=0.5)
    assert c.ahead_weights == (0.5, 0.25) and by_steps().ahead_weights == ()
    assert [tg.ahead_factor(at(step), c) for step in (0, 125, 250, 500, 999)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert [tg.step_variant_at(at(step), c).predicts_ahead for step in (0, 499, 500, 999)] == [True, True, False, False]
    assert not tg.step_variant_at(at(0), by_steps()).predicts_ahead
    assert [v.predicts_ahead for v in tg.all_step_variants(c)] == [True, False]
    assert [v.predicts_ahead for v in tg.all_step_variants(by_steps(MTP_WEIGHTS="1", MTP_END=1))] == [True]


def test_the_average_forgets_its_start():
    c = config(EMA_DECAY=0.9965)
    shares = [tg.ema_weight(step, c) for step in range(10_000)]
    assert shares[0] == pytest.approx(0.9) and all(a >= b for a, b in zip(shares, shares[1:], strict=False))
    assert shares[9999] == pytest.approx(1 - 0.9965) and min(shares) == pytest.approx(0.0035)
    start = 1.0
    for share in shares[:1000]:
        start *= 1 - share
    assert start < 1e-6  # what is left of the initial weights


def test_schedules_do_not_depend_on_anything_else():
    c = by_steps(WARMDOWN_FRAC=0.5)
    assert [tg.lr_multiplier(at(700), c) for _ in range(3)] == [tg.lr_multiplier(at(700), c)] * 3
