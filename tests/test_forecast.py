"""bench/forecast.py: planted measurements against values computed by hand, and what a page must have."""

import json
import math
import re
import sys

import numpy as np
import pytest

from helpers import ROOT

sys.path.append(str(ROOT / "bench"))
import forecast  # noqa: E402
import forecast_page  # noqa: E402
import lab_ideas as ideas  # noqa: E402

SEEDS = (42, 0, 314)
NAMES = ideas.USUAL
FLOPS = dict(zip(NAMES, (2.0**30, 2.0**32, 2.0**34), strict=True))
FULL = 2.0**40  # 6 doublings above the largest size
CONFIG = dict(
    hint_enabled=True,
    train_seq_schedule="1024@1",
    model_dim=512,
    num_heads=8,
    num_layers=11,
    train_seq_len=2048,
    ttt_chunk_size=48,
)
SLOPE, SMALL = 0.02, 0.4  # bpb for each e-fold of steps, at full size and in small


def planted_lab(effects, recipe=None, control=2.0):
    """Lines of a laboratory without noise. `effects`: of each row, bpb at each size, smallest first."""
    lines = []
    for number, size in enumerate(NAMES):
        for seed in SEEDS:
            key = f"control {size} {seed} {recipe}"
            same = dict(what="run", size=size, seed=seed, kinds=["flops", "seconds"], steps=256, factor=1.0)
            same |= dict(recipe=recipe or {}, control=key)
            lines.append(same | dict(row="control", key=key, bpb=control))
            for row, effect in effects.items():
                lines.append(same | dict(row=row, key=f"{row} {key}", bpb=control + effect[number]))
        for row in effects:
            flops = FLOPS[size] / 256
            lines.append(dict(what="cost", row=row, size=size, control_steps=256, flops=[flops, flops], key=row + size))
    return lines


def as_long(lines):
    """The runs at the smallest size once more, at that of the longest training."""
    return [
        dict(line, size=forecast.LONG, key=f"{line['key']} longer", control=f"{line['control']} longer")
        for line in lines
        if line["what"] == "run" and line["size"] == forecast.SHORT
    ]


def write_lab(folder, *lines):
    (folder / "lab.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_tuning(folder, scores, file="ttt_tuning.jsonl", **others):
    """Scores of test-time training's variants, the same for two seeds, of model a and of others."""
    rows = [
        dict(model=model, seed=seed, variant=name, bpb=bpb)
        for model, own in dict(a=scores, **others).items()
        for name, bpb in own.items()
        for seed in (1, 2)
    ]
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path, content):
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    """Planted measurements, of which each part is a round number."""
    rows = [
        dict(model=model, seed=seed, method=method, divergence=divergence)
        for model in ("a", "b")
        for seed in (0, 1)
        for method, divergence in (("peer", 0.008), ("fine", 0.002), ("coarse", 0.006))
    ]
    write_json(tmp_path / "quantize.json", dict(rows=rows))
    ttt = dict(off=dict(bpb=2.0), length=dict(bpb=1.9), stream=dict(bpb=1.88))  # 1.2 times the gain
    write_json(tmp_path / "strict.json", dict(rows=[dict(ttt, model="a", seed=seed) for seed in SEEDS]))
    write_tuning(tmp_path, {"without learning": 2.0, "base": 1.95, "rate of the adapters x 4": 1.9, "rank x 2": 1.5})
    steps = dict(estimated=dict(low=5000 * math.e, mid=5000 * math.e, high=5000 * math.e), peer_measured=5000)
    step = dict(estimated=dict(low=0.1, mid=0.1, high=0.1), peer_measured=0.14)
    names = ("train, before the loops", "train, after")
    (tmp_path / "frontier").mkdir()
    write_json(
        tmp_path / forecast.BUDGET,
        {
            "peer": {"training steps": steps, "step before the loops": step, "step after": step},
            "stages": [dict(stage=name, estimated=dict(mid=0.1 * 32)) for name in names],  # 32 steps each
        },
    )
    uses = ("training", "training (looped)")
    rows = [dict(use=use, matrix_flops=FULL / 1024, attention_flops=FULL / 1024) for use in uses]
    write_json(tmp_path / forecast.TABLE, dict(rows=rows, config=CONFIG))
    scores = " | ".join(f"{3 - SMALL * e:.6f}" for e in range(3))
    steps = " | ".join(f"{10 * math.exp(e):.9f}" for e in range(3))
    (tmp_path / "hint.md").write_text(
        f"| | a | b | c |\n|---|---|---|---|\n| steps | {steps} |\n| without hints | {scores} |\n"
    )
    return tmp_path


@pytest.fixture
def exact(monkeypatch):
    """Figures of others and judgements without any width."""
    published = {
        "score": (1.06, 1.06, 1.06),
        "loss of quantization": 0.01,
        "before and after test-time training": (1.07, 1.06),
        "a gain of test-time training, and what windows alone gain": (1.0, 0.0),
        "gain of hints": (0.001, 0.001),
        "gain of progressive context": 0.0,
        "gain of an n-gram mixture on a weak and on a strong model": (0.5, 0.5),
        "steps and scores, 1": ((1000, 1.1), (1000 * math.e, 1.1 - SLOPE)),
        "steps and scores, 2": ((1000, 1.1), (1000 * math.e, 1.1 - SLOPE)),
    }
    for name, value in published.items():
        assert name in forecast.PUBLISHED
        monkeypatch.setitem(forecast.PUBLISHED, name, (value, "planted"))
    for name, middle in dict(reproduction=0.002).items() | {("after test-time training", 0.8), ("together", 0.5)}:
        monkeypatch.setitem(forecast.ASSUMED, name, ((middle, middle, middle), "planted"))
    monkeypatch.setattr(forecast, "DRAWS", 20_000)


def part_of(made, name):
    return next(part for part in made.parts if part.name == name)


def middles(made):
    return {part.name: part.range[1] for part in made.parts}


# ------------------------------------------------------------------------------------------------------------- by hand


def test_every_part_and_the_sum_by_hand(folder, exact):
    write_lab(folder, *planted_lab({"NorMuon": [-0.02] * 3, "dense skips": [-0.04] * 3}))
    made = forecast.forecast(folder)
    found = middles(made)
    assert found["seeds"] == 0 and found["data order"] == 0 and found["context"] == 0
    assert found["reproduction"] == 0.002
    # Worth 0.02 / 0.4 and 0.04 / 0.4 e-folds of steps, half of which is left together, at 0.02 bpb for each.
    assert found["recipe"] == pytest.approx(-(0.05 + 0.1) * 0.5 * 0.02, abs=1e-7)
    assert found["quantization"] == pytest.approx(-(1 - 0.25) * 0.01 * 0.8)  # the better method leaves a quarter
    # 0.2 times the gain of 0.01, times a share from 0 to 1.
    assert part_of(made, "test-time training").range == pytest.approx((-0.00195, -0.001, -0.00005), abs=2e-5)
    assert found["hints"] == -0.001
    assert found["speed"] == pytest.approx(-0.02)  # one e-fold more steps
    constant = 0.002 - 0.0015 - 0.006 - 0.001 - 0.02
    assert made.range == pytest.approx([1.06 + constant + x for x in (-0.00195, -0.001, -0.00005)], abs=2e-5)
    assert made.probability == 1 and made.doublings == pytest.approx(dict(zip(NAMES, (10, 8, 6), strict=True)))


def test_what_is_taken_for_speed_has_its_price(folder, exact):
    """0.02 bpb more after equal steps, at 0.4 bpb for each e-fold, is worth 0.05 e-folds of 0.02 bpb at full size."""
    table = json.loads((folder / forecast.TABLE).read_text())
    table["config"].update(window_attn_size=512, num_heads=4)
    write_json(folder / forecast.TABLE, table)
    lines = planted_lab({"windows of 1/4": [0.02] * 3, "half the heads": [-0.01] * 3})
    write_lab(folder, *lines, *as_long(lines))
    made = forecast.forecast(folder)
    assert middles(made)["price of speed"] == pytest.approx(0.001, abs=1e-7)
    assert middles(made)["recipe"] == 0 and {one.counted for one in made.ideas} == {"0: for speed alone, at a price"}
    write_lab(folder, *lines)
    with pytest.raises(forecast.ForecastError, match="'windows of 1/4' needs two seeds at 0.7M x 8"):
        forecast.forecast(folder)
    # Both at once, with windows in most layers, have a row of their own: one price, not a sum.
    layers = (str(n) for n in range(table["config"]["num_layers"]) if n % 4 != 3)
    table["config"].update(window_attn_layers=",".join(layers))
    write_json(folder / forecast.TABLE, table)
    lines = planted_lab({"half the heads, windows of 1/4": [0.04] * 3, "half the heads": [0.02] * 3})
    write_lab(folder, *lines, *as_long(lines))
    assert middles(forecast.forecast(folder))["price of speed"] == pytest.approx(0.002, abs=1e-7)
    table["config"].update(window_attn_size=100, num_heads=8)
    write_json(folder / forecast.TABLE, table)
    with pytest.raises(forecast.ForecastError, match="no row .* its window of 100"):
        forecast.forecast(folder)


def test_shorter_chunks_multiply_the_gain_of_test_time_training(folder, exact):
    """Each length counts at its best rate: 0.12 over 0.1, though 0.06 and 0.05 lie nearer. Ranks are another matter."""
    write_lab(folder)
    assert part_of(forecast.forecast(folder), "chunks of test-time training").range == (0, 0, 0)
    table = json.loads((folder / forecast.TABLE).read_text())
    table["config"].update(ttt_chunk_size=32)
    write_json(folder / forecast.TABLE, table)
    with pytest.raises(forecast.ForecastError, match="needs two seeds with chunks of 32 and chunks of 48"):
        forecast.forecast(folder)
    scores = {"without learning": 2.0, "base": 1.95, "rate of the adapters x 4": 1.9, "rank x 2": 1.5}
    write_tuning(folder, scores | {"chunk x 2/3": 1.94, "rate x 2, chunk x 2/3": 1.88, "chunk / 2": 1.0})
    part = part_of(forecast.forecast(folder), "chunks of test-time training")
    assert part.range == pytest.approx((-0.00195, -0.001, -0.00005), abs=2e-5)  # 0.2 * 0.01, times from 0 to 1


def test_chunks_with_a_cache_have_measurements_of_their_own(folder, exact):
    write_lab(folder)
    table = json.loads((folder / forecast.TABLE).read_text())
    table["config"].update(ttt_chunk_size=16, ttt_recompute_tokens=48)
    write_json(folder / forecast.TABLE, table)
    scores = {"without learning": 2.0, "base": 1.9, "rate x 2, chunk / 3": 1.0}
    scores["rate x 2, chunk / 3, 16 recomputed"] = 1.1
    write_tuning(folder, scores, "ttt_cache.jsonl")
    with pytest.raises(forecast.ForecastError, match="chunks of 16 and 48 recomputed tokens and chunks of 48"):
        forecast.forecast(folder)
    worse = {"without learning": 2.5, "base": 2.4, "rate x 2, chunk / 3, 48 recomputed": 2.0}  # does not count
    write_tuning(folder, scores | {"rate x 2, chunk / 3, 48 recomputed": 1.88}, "ttt_cache.jsonl", b=worse)
    part = part_of(forecast.forecast(folder), "chunks of test-time training")
    assert part.range == pytest.approx((-0.00195, -0.001, -0.00005), abs=2e-5)  # 0.12 over 0.1: as above


def test_a_mixture_counts_where_the_preset_takes_it(folder, exact):
    write_lab(folder)
    table = json.loads((folder / forecast.TABLE).read_text())
    table["config"].update(ttt_chunk_size=16, ttt_recompute_tokens=48, ttt_plain_weight=0.25)
    write_json(folder / forecast.TABLE, table)
    name = "rate x 2, chunk / 3, 48 recomputed"
    scores = {"without learning": 2.0, "base": 1.9, name: 1.88}
    write_tuning(folder, scores, "ttt_cache.jsonl")
    with pytest.raises(forecast.ForecastError, match="needs two seeds with chunks of 16 and 48 .*, mixed and chunks"):
        forecast.forecast(folder)
    write_tuning(folder, scores | {f"{name}, mixed": 1.87, "mixed": 1.0}, "ttt_cache.jsonl")
    part = part_of(forecast.forecast(folder), "chunks of test-time training")
    assert part.range == pytest.approx((-0.0029, -0.0015, -0.00008), abs=5e-5)  # 0.13 over 0.1


@pytest.mark.parametrize("knob, part", [("train_seq_schedule", "context"), ("hint_enabled", "hints")])
def test_what_the_preset_does_not_set_counts_0(knob, part, folder):
    write_lab(folder)
    before = forecast.forecast(folder)
    table = json.loads((folder / forecast.TABLE).read_text())
    table["config"][knob] = type(table["config"][knob])()
    write_json(folder / forecast.TABLE, table)
    after = forecast.forecast(folder)
    assert part_of(before, part).range[1] < -0.0001 and part_of(after, part).range == (0, 0, 0)
    assert f"does not set `{knob.upper()}`" in part_of(after, part).rule
    assert after.range[1] > before.range[1]


def test_a_gain_that_shrinks_goes_on_as_a_power_of_compute(folder, exact):
    """0.03, 0.02 and 0.01 over 4 doublings: 0.005 with each, a quarter of the middle; 6 more doublings to full size."""
    write_lab(folder, *planted_lab({"backout": [-0.03, -0.02, -0.01]}))
    made = forecast.forecast(folder)
    assert middles(made)["recipe"] == pytest.approx(-0.01 * math.exp(-0.25 * 6) / SMALL * SLOPE, rel=1e-4)
    write_lab(folder, *planted_lab({"backout": [-0.01, -0.02, -0.03]}))  # one that grows is not taken to grow on
    assert middles(forecast.forecast(folder))["recipe"] == pytest.approx(-0.03 / SMALL * SLOPE, rel=1e-4)


def test_what_a_longer_training_loses_of_a_gain_is_lost_again(folder, exact, monkeypatch):
    """0.04 at the smallest size, a quarter of it after eight times the steps: a quarter again with each eightfold."""
    monkeypatch.setattr(forecast, "eightfolds_left", lambda folder: 1.5)
    lines = planted_lab({"dense skips": [-0.04] * 3})
    longer = as_long(lines)
    for line in longer:
        line["bpb"] = 1.5 - 0.01 * (line["row"] != "control")
    write_lab(folder, *lines, *longer)
    made = forecast.forecast(folder)
    assert middles(made)["recipe"] == pytest.approx(-0.04 * 0.25**2.5 / SMALL * SLOPE, rel=1e-3)
    assert "-0.0400 ± 0.0000 bpb at 0.7M, -0.0100 ± 0.0000 bpb at 0.7M x 8" in part_of(made, "recipe").measured[-2]
    for line in longer:
        line["bpb"] = 1.5 + 0.01 * (line["row"] != "control")  # it even costs
    write_lab(folder, *lines, *longer)
    assert abs(middles(forecast.forecast(folder))["recipe"]) < 1e-9


def test_no_more_than_newer_ideas_saved_elsewhere(folder, exact):
    write_lab(folder, *planted_lab({"NorMuon": [-1.0] * 3}))
    assert middles(forecast.forecast(folder))["recipe"] == pytest.approx(math.log(0.8) * SLOPE)  # a fifth of the time


def test_data_order_by_hand(folder, exact):
    lines = planted_lab({"data: documents": [-0.01] * 3, "data: stream": [0.07] * 3})
    write_lab(folder, *lines)
    table = folder / "frontier" / "h100.json"
    content = json.loads(table.read_text())
    assert "data_order" not in content["config"]  # so it is rows
    rows = part_of(forecast.forecast(folder), "data order")
    assert "rows minus stream, 6M: -0.0700 ± 0.0000 bpb" in "\n".join(rows.measured)
    content["config"]["data_order"] = "documents"
    write_json(table, content)
    part = part_of(forecast.forecast(folder), "data order")
    whole, ratio = 0.08 / SMALL * SLOPE, ideas.SIZES[-1].batch_tokens / 786_432
    middle = ratio**0.75  # halfway, in logarithms, between the ratio and its root
    assert part.range[1] == pytest.approx(-whole * middle, rel=0.05)
    assert rows.range[1] == pytest.approx(part.range[1] * 7 / 8, rel=0.05)
    assert -whole * ratio**0.5 <= part.range[0] and part.range[2] <= -whole * ratio
    assert "documents minus stream, 6M: -0.0800 ± 0.0000 bpb" in "\n".join(part.measured)
    assert "documents minus rows, 6M: -0.0100 ± 0.0000 bpb" in "\n".join(part.measured)
    adopted = planted_lab({"data: stream": [0.08] * 3}, recipe=dict(DATA_ORDER="documents"))
    write_lab(folder, *adopted)
    again = part_of(forecast.forecast(folder), "data order")
    assert again.range == pytest.approx(part.range)


def test_steps_in_small_from_the_laboratorys_own_runs():
    lines = []
    for seed in range(3):
        for steps in (200, 300):
            same = dict(what="run", row="loops off", size="2M", seed=seed, kinds=["flops"], factor=1.0, recipe={})
            lines.append(same | dict(steps=steps, bpb=3 + seed - 0.3 * math.log(steps)))
    found = forecast.lab_slope(lines)
    assert found.mean == pytest.approx(0.3) and found.error == pytest.approx(0, abs=1e-9) and "3 pairs" in found.source
    assert forecast.lab_slope(lines[:4]) is None  # two pairs are too few
    for line in lines:
        line["bpb"] += 0.1 * (line["steps"] == 300) * (line["seed"] - 1)
    assert forecast.lab_slope(lines) is None  # too noisy


def test_what_is_left_together_is_measured_where_it_can_be(folder, exact):
    first = planted_lab({"NorMuon": [-0.02] * 3, "dense skips": [-0.04] * 3})
    recipe = {**ideas.ROWS["NorMuon"].changes, **ideas.ROWS["dense skips"].changes}
    second = planted_lab({"backout": [0.0] * 3}, recipe=recipe, control=2.0 - 0.045)
    measured = forecast.measured_together(first + second)
    assert measured is not None
    together, where = measured
    assert together.mean == pytest.approx(0.045 / 0.06) and where == NAMES[-1]
    assert forecast.measured_together(first) is None
    write_lab(folder, *first, *second)
    assert middles(forecast.forecast(folder))["recipe"] == pytest.approx(-0.15 * 0.75 * SLOPE, rel=1e-4)


# --------------------------------------------------------------------------------------------- rows that count


def noisy(effect, spread):
    """Lines of one row, whose effect differs by seed."""
    lines = planted_lab({"softcap asymmetric": [0.0] * 3})
    for line in lines:
        if line["what"] == "run" and line["row"] != "control":
            line["bpb"] = 2.0 + effect + spread * (SEEDS.index(line["seed"]) - 1)
    return lines


def test_an_unclear_row_counts_0_and_widens(folder, exact):
    write_lab(folder)
    without = forecast.forecast(folder)
    write_lab(folder, *noisy(-0.002, 0.01))
    made = forecast.forecast(folder)
    (idea,) = made.ideas
    assert (idea.verdict, idea.counted) == ("unclear", "width")
    low, middle, high = part_of(made, "recipe").range
    spread = math.hypot(0.002, 0.01 / math.sqrt(3)) / SMALL * SLOPE  # size of the effect, and its standard error
    assert middle == pytest.approx(0, abs=spread / 20)
    assert (low, high) == pytest.approx((-1.96 * spread, 1.96 * spread), rel=0.05)
    assert part_of(without, "recipe").range == (0, 0, 0)


def test_rows_that_do_not_count_say_why(folder, exact):
    effects = {
        "NorMuon": [-0.02] * 3,
        "NorMuon, cautious decay": [-0.01] * 3,  # sets the same knob
        "multi-token prediction": [0.02] * 3,
        "EMA 0.9": [-0.05] * 3,
    }
    write_lab(folder, *planted_lab(effects))
    made = forecast.forecast(folder)
    assert {idea.name: idea.counted for idea in made.ideas} == {
        "NorMuon": "gain",
        "NorMuon, cautious decay": "0: instead of it, NorMuon",
        "multi-token prediction": "0",
        "EMA 0.9": "0: peers chose this value at full size",
    }
    assert middles(made)["recipe"] == pytest.approx(-0.05 * SLOPE)  # of NorMuon alone
    assert "dense skips" in made.missing and "NorMuon" not in made.missing and "EMA 0.95" not in made.missing


def test_the_worse_of_equal_flops_and_equal_seconds_counts(folder, exact):
    lines = planted_lab({"dense skips": [-0.04] * 3})
    for line in [line for line in lines if line["what"] == "run" and line["row"] != "control"]:
        line["kinds"] = ["flops"]
        lines.append(line | dict(kinds=["seconds"], key=line["key"] + " s", bpb=2.0 - 0.01))
    write_lab(folder, *lines)
    made = forecast.forecast(folder)
    assert made.ideas[0].kind == "seconds"
    assert middles(made)["recipe"] == pytest.approx(-0.01 / SMALL * SLOPE)


def test_a_diverged_or_half_run_row_counts_0(folder, exact):
    lines = planted_lab({"backout": [-0.01] * 3, "key offset": [-0.01] * 3})
    for line in lines:
        if line["row"] == "backout" and line["what"] == "run":
            line["bpb"] = None
    write_lab(folder, *[line for line in lines if line["row"] != "key offset" or line.get("seed") in (None, 42)])
    made = forecast.forecast(folder)
    counted = {idea.name: (idea.verdict, idea.counted) for idea in made.ideas}
    assert counted["backout"][0] == "does not" and counted["key offset"] == ("unclear", "0: fewer than two seeds")
    assert part_of(made, "recipe").range == (0, 0, 0)


# ------------------------------------------------------------------------------------ measurements and the page


@pytest.mark.parametrize(
    "name, part, change",
    [
        ("quantize.json", "quantization", lambda c: c["rows"][1].update(divergence=0.004)),
        ("strict.json", "test-time training", lambda c: c["rows"][0]["stream"].update(bpb=1.9)),
        (forecast.BUDGET, "speed", lambda c: c["peer"]["training steps"]["estimated"].update(mid=5100)),
    ],
)
def test_a_changed_measurement_changes_its_part_alone(name, part, change, folder):
    write_lab(folder)
    before = forecast.forecast(folder)
    content = json.loads((folder / name).read_text())
    change(content)
    if part == "speed":
        content["peer"]["training steps"]["estimated"].update(low=5000, high=5200)
    write_json(folder / name, content)
    after = forecast.forecast(folder)
    differing = [a.name for a, b in zip(before.parts, after.parts, strict=True) if a.range != b.range]
    assert differing == [part] and before.range != after.range


def test_the_goal_against_the_draws(folder):
    write_lab(folder)
    made = forecast.forecast(folder)
    content = forecast.as_json(made)
    assert made.probability == np.mean(made.total <= forecast.GOAL)
    assert made.total == pytest.approx(made.start + sum(part.change for part in made.parts))
    for start, words in ((-1, "above the interval"), (1, "below the interval")):
        ends = zip(("low", "mid", "high"), made.range, strict=True)
        shifted = dict(content, forecast=dict(estimated={name: value + start for name, value in ends}))
        assert words in "\n".join(forecast_page.verdict(shifted))


def test_the_page_and_the_figures_are_current(tmp_path):
    """What is committed is what `make forecast` writes now."""
    done = forecast.main(["--page", str(tmp_path / "page.md"), "--out", str(tmp_path / "figures.json")])
    assert done == 0
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs/forecast.md").read_text(), "run `make forecast`"
    assert (tmp_path / "figures.json").read_text() == (ROOT / "bench/results/forecast.json").read_text()


def test_the_page_labels_its_figures_and_types_none():
    text = (ROOT / "docs/forecast.md").read_text()
    content = json.loads((ROOT / "bench/results/forecast.json").read_text())
    parts = [part["part"] for part in content["parts"]]
    assert len(parts) == 11 and content["probability_of_goal"]["estimated"] <= 1
    for part in content["parts"]:
        assert re.search(rf"^### {part['part'].capitalize()}: .*, estimated$", text, flags=re.M)
        assert f"Falsified by: {part['falsified_by']}." in text and part["measured"]
    for name, of in content["published"].items():
        assert f"| {name} | " in text and of["source"] in text
    assert set(re.findall(r"\d+", forecast_page.METHOD)) <= {"95", "0"}  # and no other figure


def test_what_is_missing_is_named_in_one_line(folder, capsys):
    (folder / "strict.json").unlink()
    assert forecast.main(["--results", str(folder), "--page", "/nowhere/a", "--out", "/nowhere/b"]) == 2
    assert re.fullmatch(r"error: .*strict\.json: cannot be read: .*\n", capsys.readouterr().err)
    (folder / "hint.md").unlink()
    with pytest.raises(forecast.ForecastError, match="neither lab.jsonl nor hint.md"):
        forecast.forecast(folder)


def test_parts_can_be_left_out_and_nothing_is_written(folder, capsys):
    arguments = ["--results", str(folder), "--page", str(folder / "page"), "--out", str(folder / "out")]
    assert forecast.main([*arguments, "--without", "hints", "context"]) == 0
    out = capsys.readouterr().out
    assert "| speed | " in out and "hints" not in out and "written" not in out
    assert not (folder / "page").exists() and not (folder / "out").exists()
    assert forecast.main([*arguments, "--without", "luck"]) == 2
    assert "--without luck: must be of seeds, reproduction, " in capsys.readouterr().err
