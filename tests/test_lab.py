"""bench/lab.py: what it plans, that it repeats nothing, when it stops a row, its verdicts, and a real tiny run."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from helpers import ROOT, built_once, forking, write_data

sys.path.append(str(ROOT / "bench"))
import lab  # noqa: E402
import lab_ideas as ideas  # noqa: E402
import lab_report  # noqa: E402

SIZES = [size for size in ideas.SIZES if size.name in ideas.USUAL]
NAMES = [size.name for size in SIZES]
COMPUTE = {name: 1e12 * 4.0**i for i, name in enumerate(NAMES)}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Arguments for files in a temporary folder; no data is made."""
    monkeypatch.setattr(lab.Lab, "data", lambda self, vocabulary: (tmp_path / f"data_{vocabulary}", "digest"))
    return ["--results", str(tmp_path / "lab.jsonl"), "--report", str(tmp_path / "lab.md"), "--jobs", "1"]


def laboratory(results, *arguments):
    return lab.Lab(lab.parse([*results, *arguments]))


# ---------------------------------------------------------------------------------------------------------------- rows


def test_every_row_changes_the_control_or_is_listed(results):
    one = laboratory(results)
    for size in SIZES:
        used = one.usable(size)
        fitting = [name for name, row in ideas.ROWS.items() if not row.by_size or row.by_size(size) is not None]
        assert set(used) | set(one.notes) == set(fitting) and not set(used) & set(one.notes)
    assert "vocabulary x 4" not in one.usable(SIZES[0])  # its embedding would be most of the model
    assert one.notes["loops on"] == "is what the recipe does"


def test_sizes_triple_and_larger_vocabularies_cost_no_parameters(results):
    one = laboratory(results)

    def parameters(name, size):
        return lab.t.parameter_count(lab.configured(one.environment(name, size, 0, 1)))

    small, medium, large = (parameters(lab.CONTROL, size) for size in SIZES)
    assert 2.5 < medium / small < 3.5 and 2.5 < large / medium < 3.5
    assert abs(parameters("vocabulary x 4", SIZES[2]) / large - 1) < 0.005
    for size in SIZES:
        assert size.batch_tokens % (3 * ideas.BASE["TRAIN_SEQ_LEN"]) == 0


def test_a_knob_or_value_of_the_future_is_listed_and_not_run(results, monkeypatch):
    rows = {
        "knob": ideas.Row(dict(NO_SUCH_KNOB=1, LN_SCALE=0)),
        "value": ideas.Row(dict(SOFTCAP_TYPE="no such softcap")),
        "known": ideas.Row(dict(LN_SCALE=0)),
    }
    monkeypatch.setattr(ideas, "ROWS", rows)
    one = laboratory(results)
    assert one.usable(SIZES[0]) == ["known"]
    assert one.notes["knob"] == "not in this version: NO_SUCH_KNOB"
    assert one.notes["value"].startswith("not in this version: SOFTCAP_TYPE=no such softcap: must be one of")
    assert "- knob: not in this version: NO_SUCH_KNOB." in lab_report.report([], one.notes, NAMES)


# ------------------------------------------------------------------------------------------------------------ planning


@pytest.mark.parametrize(
    "ratio, steps", [(1.0, 256), (1.009, 256), (0.992, 256), (1.1, 233), (0.8, 320), (2.0, 128), (1000.0, 1)]
)
def test_steps_of_equal_cost(ratio, steps):
    assert lab.equal_steps(256, ratio) == steps
    assert steps in (1, 256) or abs(steps * ratio / 256 - 1) < 0.005


def test_times_that_cannot_be_told_apart_are_equal():
    assert lab.time_ratio([0.99, 1.02, 1.021]) == 1.0  # some rounds faster, some slower
    assert lab.time_ratio([1.011, 1.02, 1.021]) == 1.02
    assert lab.time_ratio([0.99, 1.05, 1.2]) == 1.05


def plant_cost(one, name, size, flops, ratios):
    """A measurement, as a worker would give it."""
    job = one.cost_job(name, size)
    one.append(job.record | dict(key=job.key, flops=[1e9, flops * 1e9], tokens=[1536, 1536], ratios=ratios))


def test_one_run_serves_both_kinds_where_the_costs_are_the_controls(results):
    one, size = laboratory(results, "--seeds", "1", "2"), SIZES[0]
    assert one.row_jobs("LN scale off", size) == []  # not before its cost is known
    plant_cost(one, "LN scale off", size, 1.001, [0.98, 1.0, 1.01])
    plant_cost(one, "loops off", size, 0.8, [0.75, 0.7, 0.9])
    plant_cost(one, "QK gain 3", size, 1.0, [1.1, 1.1, 1.1])
    kinds = {
        name: [(j.record["seed"], *j.record["kinds"], j.record["steps"]) for j in one.row_jobs(name, size)]
        for name in (lab.CONTROL, "LN scale off", "loops off", "QK gain 3")
    }
    both = [(1, "flops", "seconds", 256), (2, "flops", "seconds", 256)]
    assert kinds[lab.CONTROL] == kinds["LN scale off"] == both
    assert kinds["loops off"][:2] == [(1, "flops", 320), (1, "seconds", 341)]
    assert kinds["QK gain 3"][:2] == [(1, "flops", 256), (1, "seconds", 233)]
    job = one.row_jobs("loops off", size)[0]
    assert job.order["environment"]["ITERATIONS"] == "320" and job.order["environment"]["NUM_LOOPS"] == "0"
    assert job.record["control"] == one.row_jobs(lab.CONTROL, size)[0].key


def test_a_run_is_known_by_what_differs_from_the_defaults(results, monkeypatch):
    one, size = laboratory(results), SIZES[0]
    key = one.row_jobs(lab.CONTROL, size)[0].key
    default = {f.name: f.default for f in lab.dataclasses.fields(lab.t.Config)}["eval_scores"]
    monkeypatch.setitem(ideas.BASE, "EVAL_SCORES", int(default))  # as a knob of the future, at its default
    monkeypatch.setitem(ideas.BASE, "READ_AHEAD", 3)  # which changes no result
    assert one.row_jobs(lab.CONTROL, size)[0].key == key
    with monkeypatch.context() as patch:
        patch.setattr(ideas, "VERSION", ideas.VERSION + 1)
        assert one.row_jobs(lab.CONTROL, size)[0].key != key
    monkeypatch.setitem(ideas.BASE, "LN_SCALE", 0)
    assert one.row_jobs(lab.CONTROL, size)[0].key != key


def test_the_control_is_that_of_the_committed_results(results):
    """Else all of them would be run again, as for a knob whose `auto` is resolved and which is not in OUTSIDE."""
    one = laboratory(results)
    kept = [json.loads(line) for line in (ROOT / "bench/results/lab.jsonl").read_text().splitlines()]
    for size in ideas.SIZES:
        environment = one.environment(lab.CONTROL, size, 42, size.steps)
        settings = json.loads(json.dumps(lab.trained_settings(lab.configured(environment))))
        assert any(r["row"] == lab.CONTROL and r.get("settings") == settings for r in kept), size.name


def test_what_the_preset_frontier_adds_is_a_row_of_the_laboratory():
    """But for what only an evaluation sees. The rates are those that peers have tuned at full size."""
    presets = lab.t.PRESETS
    added = {name.upper(): value for name, value in presets["frontier"].items() if presets["record"].get(name) != value}
    evaluation = ("HINT_ENABLED", "TTT_CHUNK_SIZE", "TTT_RECOMPUTE_TOKENS", "TTT_PLAIN_WEIGHT")
    assert [added.pop(name) for name in evaluation] == [True, 16, 48, 0.25]
    assert [added.pop(name) for name in ("TTT_LORA_LR", "TTT_LORAPLUS_LR_RATIO")] == [2.5e-5, 10]
    assert added == ideas.ROWS["NorMuon"].changes


# ------------------------------------------------------------------------------------------- a whole laboratory, faked

EFFECTS = {"good": -0.02, "bad": 0.02, "noisy": 0.0, "diverges": math.inf}
NOISE_OF_SEEDS = {42: 0.01, 0: -0.012}


@pytest.fixture
def faked(results, monkeypatch):
    """Workers that answer at once. The list of the jobs that they were given."""
    rows = {name: ideas.Row(dict(QK_GAIN_INIT=1 + i / 10)) for i, name in enumerate(EFFECTS)}
    rows["tuned"] = ideas.Row(dict(QK_GAIN_INIT=2), ("MATRIX_LR",))
    monkeypatch.setattr(ideas, "ROWS", rows)
    gains = {row.changes["QK_GAIN_INIT"]: EFFECTS.get(name, 0.0) for name, row in rows.items()}
    given = []

    def run(command, **options):
        order = json.loads(command[-1])
        given.append(order)
        environment, number = order["environment"], len(given)
        flops = 1e9 * int(environment["MODEL_DIM"]) ** 2
        outcome = dict(flops=[flops, flops], tokens=[1536, 1536], ratios=[1, 1, 1])
        if order["what"] == "run":
            seed, layers = int(environment["SEED"]), int(environment["NUM_LAYERS"])
            changed = float(environment.get("QK_GAIN_INIT", 0))
            gain = gains.get(changed, 0.0) + (NOISE_OF_SEEDS.get(seed, 0.0) if changed == 1.2 else 0.0)
            tried = 0.1 * abs(float(environment["MATRIX_LR"]) - 0.028)
            bpb = (
                None
                if math.isinf(gain)
                else 3 - 0.1 * layers + gain + 1e-4 * math.sin(number) + 0.01 * seed % 7 + tried
            )
            outcome = dict(bpb=bpb, bytes=None, parameters=7, train_seconds=2.0, total_seconds=3.0)
            outcome |= dict(error="the training loss is nan") if bpb is None else {}
        done = json.dumps(outcome | dict(source="s"))
        return SimpleNamespace(returncode=0, stdout=f"a line of the log\n{done}\n", stderr="")

    monkeypatch.setattr(lab.processes, "run", run)
    return given


def runs_of(given, size):
    return [o for o in given if o["what"] == "run" and o["environment"]["MODEL_DIM"] == str(size.dim)]


def test_a_hopeless_row_stops_at_the_smallest_size_and_the_others_go_on(results, faked, tmp_path):
    assert lab.main(results) == 0
    gains = {o["environment"].get("QK_GAIN_INIT") for o in runs_of(faked, SIZES[0])}
    assert gains == {None, "1.0", "1.1", "1.2", "1.3", "2"}
    for size in SIZES[1:]:
        assert {o["environment"].get("QK_GAIN_INIT") for o in runs_of(faked, size)} == {None, "1.0", "1.2", "2"}
    # The smallest size has every row's first seed before any second one; rates are tried first, with another seed.
    seeds = [o["environment"]["SEED"] for o in runs_of(faked, SIZES[0])]
    assert seeds == ["7"] * 3 + ["42"] * 6 + ["0"] * 6 + ["314"] * 6
    # At the next size the best row comes first, behind the control.
    assert runs_of(faked, SIZES[1])[3]["environment"]["QK_GAIN_INIT"] == "1.0"
    text = (tmp_path / "lab.md").read_text()
    assert "| good | *pays* |" in text and "| noisy | *unclear* |" in text
    assert f"| bad | *does not* | worse at {NAMES[0]}, so larger sizes are skipped |" in text
    assert f"| diverges | *does not* | diverged at {NAMES[0]} |" in text
    assert "the training loss is nan" in text and "rates x 0.7" in text


def test_what_is_done_is_not_done_again(results, faked, tmp_path):
    few = [*results, "--sizes", NAMES[0], "--only", "good", "noisy"]
    assert lab.main([*few, "--seeds", "1"]) == 0
    before, lines = list(faked), (tmp_path / "lab.jsonl").read_text().splitlines()
    assert len(before) == len(lines) == 2 + 3  # two costs, three runs
    assert lab.main([*few, "--seeds", "1"]) == 0
    assert faked == before and (tmp_path / "lab.jsonl").read_text().splitlines() == lines
    with open(tmp_path / "lab.jsonl", "a") as file:
        file.write('{"what": "run", "ro')  # a kill in the middle of a line
    assert lab.main([*few, "--seeds", "1", "2"]) == 0
    assert [o["environment"]["SEED"] for o in faked[len(before) :]] == ["2"] * 3
    again = lab_report.read_results(tmp_path / "lab.jsonl")
    assert len(again) == len(lines) + 3 and [json.loads(line) for line in lines] == again[: len(lines)]


def test_a_run_that_another_row_has_done_is_copied(results, faked, monkeypatch, tmp_path):
    few = [*results, "--sizes", NAMES[0], "--seeds", "1"]
    assert lab.main([*few, "--only", "good"]) == 0
    count = len(faked)
    monkeypatch.setitem(ideas.ROWS, "again", ideas.ROWS["good"])
    assert lab.main([*few, "--only", "again"]) == 0
    assert len(faked) == count
    found = lab_report.differences(lab_report.read_results(tmp_path / "lab.jsonl"))
    assert found["again"] == found["good"] and found["good"]


def test_no_run_starts_after_the_hours_are_over(results, faked, tmp_path, capsys):
    assert lab.main([*results, "--hours", "-1"]) == 0
    assert faked == [] and "# The laboratory of training ideas" in (tmp_path / "lab.md").read_text()
    (tmp_path / "lab.jsonl").unlink()
    assert lab.main([*results, "--dry"]) == 0
    out = capsys.readouterr().out
    assert faked == [] and f"{NAMES[2]:5s} run   good: 6" in out and "at most " in out
    assert not (tmp_path / "lab.jsonl").exists()


def test_a_worker_that_fails_is_reported_and_the_rest_goes_on(results, faked, monkeypatch, capsys):
    real = lab.processes.run

    def broken(command, **options):
        if json.loads(command[-1])["environment"].get("QK_GAIN_INIT") == "1.0":
            return SimpleNamespace(returncode=-9, stdout="", stderr="Killed")
        return real(command, **options)

    monkeypatch.setattr(lab.processes, "run", broken)
    assert lab.main([*results, "--sizes", NAMES[0], "--seeds", "1", "--only", "good", "noisy"]) == 1
    captured = capsys.readouterr()
    assert f"error: good {NAMES[0]}: exit code -9: Killed" in captured.err and f"noisy {NAMES[0]} 1" in captured.out


# ------------------------------------------------------------------------------------------------------------ verdicts


def standing(*sizes):
    """Cells of the sizes: for each either differences of both kinds, or a pair of those of FLOPs and of seconds."""
    pairs = [of_size if isinstance(of_size[0], tuple) else (of_size, of_size) for of_size in sizes]
    kinds = [[dict(enumerate(values)) for values in pair] for pair in pairs]
    return {name: dict(zip(lab_report.KINDS, pair, strict=True)) for name, pair in zip(NAMES, kinds, strict=False)}


BETTER, WORSE = (-0.010, -0.011, -0.009), (0.010, 0.011, 0.009)
NOISE, NOTHING = (-0.010, 0.008, 0.004), (-0.0001, 0.0001, 0.0)


@pytest.mark.parametrize(
    "found, word, why",
    [
        (standing(BETTER, BETTER, BETTER), "pays", "better at every size"),
        (standing(BETTER), "unclear", f"not run at {NAMES[2]} and a smaller size"),
        (standing(BETTER, BETTER, BETTER[:2]), "unclear", f"fewer than 3 seeds at {NAMES[2]}, equal FLOPs"),
        (standing(BETTER, NOISE, BETTER), "unclear", f"no gain at {NAMES[1]}, equal FLOPs"),
        (standing(WORSE), "does not", f"worse at {NAMES[0]}, so larger sizes are skipped"),
        (standing(BETTER, BETTER, WORSE), "does not", f"worse at {NAMES[2]}"),
        (standing((BETTER, WORSE)), "unclear", f"not run at {NAMES[2]} and a smaller size"),  # a GPU may tell
        (standing(*[(BETTER, WORSE)] * 3), "unclear", f"no gain at {', '.join(NAMES)}, equal seconds"),
        (standing(NOISE, NOISE, NOTHING), "does not", f"equal FLOPs exclude a gain of 0.001 at {NAMES[2]}"),
        (standing(NOTHING, NOISE, NOISE), "unclear", f"no gain at {', '.join(NAMES)}, equal FLOPs"),
        (standing((-0.03, -0.031, -0.029), BETTER, NOTHING), "does not", "the gain vanishes, equal FLOPs"),
        (standing((math.inf, -0.1, -0.1)), "does not", f"diverged at {NAMES[0]}"),
    ],
)
def test_verdicts(found, word, why):
    assert lab_report.verdict(found, NAMES, COMPUTE) == (word, why)


def test_a_trend_is_a_slope_per_doubling_with_its_interval():
    line = standing((-0.05, -0.06, -0.07), (-0.03, -0.04, -0.05), (-0.01, -0.02, -0.03))  # 2 doublings apart
    found = lab_report.trend(line, "flops", NAMES, COMPUTE)
    assert found.slope.mean == pytest.approx(0.01) and found.slope.half < 1e-9
    assert found.word == "shrinks" and found.vanishes  # the interval at the largest size is ±0.025
    grows = standing(BETTER, tuple(2 * x for x in BETTER))
    assert lab_report.trend(grows, "flops", NAMES, COMPUTE).word == "grows"
    from_nothing = standing((0.001, 0.0, 0.002), (-0.009, -0.01, -0.008), (-0.019, -0.02, -0.018))
    found = lab_report.trend(from_nothing, "flops", NAMES, COMPUTE)
    assert found.word == "grows" and found.slope.mean < 0 and not found.vanishes
    assert lab_report.trend(standing(NOISE, NOISE[::-1]), "flops", NAMES, COMPUTE).word == "not resolved"
    assert lab_report.trend(standing(BETTER), "flops", NAMES, COMPUTE) is None


def test_intervals_are_students():
    found = lab_report.interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isinf(lab_report.interval([1.0]).half) and str(lab_report.interval([1.0])) == "+1.0000"


# ----------------------------------------------------------------------------------------------------------- the report


def planted(row, seed, bpb, **more):
    key = f"{row}{seed}{more}"
    record = dict(
        what="run", row=row, size=NAMES[0], seed=seed, kinds=["flops", "seconds"], steps=9, factor=1.0, key=key
    )
    record |= dict(control=f"{lab.CONTROL}{seed}{{}}", recipe={}, parameters=5, tokens=10, bytes=None, source="a")
    return record | dict(machine="m", torch="2", bpb=bpb) | more


def test_the_report_pairs_by_seed_and_says_when_versions_differ():
    results = [planted(lab.CONTROL, 1, 3.0), planted(lab.CONTROL, 2, 2.0)]
    results += [planted("idea", 1, 2.9), planted("idea", 2, 1.94, source="b")]
    assert lab_report.differences(results)["idea"][NAMES[0]]["flops"] == pytest.approx({1: -0.1, 2: -0.06})
    text = lab_report.report(results, {}, NAMES)
    assert f"| idea | {NAMES[0]} | 2 | -0.0800 ± 0.2541 | -0.0800 ± 0.2541 |" in text
    assert "row and control are of different versions of train_gpt.py" in text
    assert "| 0.7M | 5 | 9 | 10 |  | 2.5000 |" in text
    # Results against another recipe replace those before; what they are compared with is named.
    results.append(planted("idea", 1, 2.5, recipe=dict(LN_SCALE=0)))
    assert lab_report.differences(results)["idea"][NAMES[0]]["flops"] == {1: -0.5}
    assert "against an earlier recipe" in lab_report.report(results, {}, NAMES)


# --------------------------------------------------------------------------------------------------------- a real run


def test_a_row_end_to_end(tmp_path_factory, tmp_path, monkeypatch):
    data = built_once(tmp_path_factory, "data", write_data)
    (tmp_path / "tiny_384").symlink_to(data)
    size = ideas.Size("tiny", 4, 32, 2, (1, 1), 3, 96, 2, 1.0)
    small = dict(VOCAB_SIZE=384, TRAIN_SEQ_LEN=32, EVAL_SEQ_LEN=32, ROPE_DIMS=4)
    monkeypatch.setattr(ideas, "BASE", {**ideas.BASE, **small})
    monkeypatch.setattr(ideas, "VOCABULARY", 384)
    monkeypatch.setattr(ideas, "SIZES", (size,))
    monkeypatch.setattr(ideas, "USUAL", (size.name,))
    monkeypatch.setattr(ideas, "ROWS", {"loops off": ideas.Row(dict(NUM_LOOPS=0))})
    files = ["--results", str(tmp_path / "lab.jsonl"), "--report", str(tmp_path / "lab.md")]
    arguments = [*files, "--data", str(tmp_path / "tiny"), "--seeds", "1", "--points", "2", "--rounds", "1"]
    with forking():
        assert lab.main([*arguments, "--jobs", "1", "--bytes"]) == 0
    cost, *runs = lab_report.read_results(tmp_path / "lab.jsonl")
    assert cost["what"] == "cost" and cost["tokens"] == [96, 96]
    assert cost["flops"][0] > cost["flops"][1] > 0  # both points of the control: one before the loops, one with them
    control, *others = runs
    assert control["row"] == lab.CONTROL and control["steps"] == 2 and 0 < control["bpb"] < 20
    assert control["source"] == lab.t.sha256_of(ROOT / "train_gpt.py") and control["bytes"] > 1000
    assert {kind for r in others for kind in r["kinds"]} == {"flops", "seconds"}
    assert all(r["bpb"] != control["bpb"] and r["control"] == control["key"] for r in others)
    assert "| loops off | tiny | 1 |" in (tmp_path / "lab.md").read_text()
