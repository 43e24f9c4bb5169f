"""bench/budget.py: its calibration, what its figures follow, its labels and its errors."""

import copy
import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch

from helpers import ROOT

sys.path.append(str(ROOT / "bench"))
import budget as bench  # noqa: E402
import cost_model  # noqa: E402
import step_costs  # noqa: E402
from cost_model import Ceilings, Table, TableError, WindowCosts  # noqa: E402

WINDOWS = [(64, 2048, 48), (32, 2048, 48), (32, 1024, 48), (64, 512, 48), (64, 1024, 24), (16, 512, 48), (2, 1024, 48)]
GB, TFLOP = 10**9, 10**12


def term(use, part, name, kind, launches, flops, size, window=()):
    return dict(
        use=use,
        part=part,
        window=list(window),
        term=name,
        kind=kind,
        launches=launches,
        flops=int(flops),
        bytes_read=int(size // 2),
        bytes_written=int(size - size // 2),
    )


def step_terms(use, scale, parts=("forward", "backward")):
    for part in parts:
        yield term(use, part, "norms", "fused", 100, 0, 30 * GB * scale)
        yield term(use, part, "MLP", "matrix product", 100, 8 * TFLOP * scale, 5 * GB * scale)
        yield term(use, part, "attention", "attention", 11, 2 * TFLOP * scale, GB * scale)


def window_terms():
    for window in WINDOWS:
        r, tokens, scored = window
        for part in ("forward", "backward"):
            flops, size = 130e6 * r * tokens, 350e3 * r * tokens + 20e6 * r + 2e8
            yield term("TTT", part, "LoRA", "matrix product", 300, flops, size, window)
            yield term("TTT", part, "attention", "attention", 17, 4e4 * r * tokens**2, 5e3 * r * tokens, window)
            yield term("TTT", part, "head and loss", "fused", 5, 0, 3e4 * r * scored, window)


def eager(use, part, launches, size):
    return dict(
        use=use,
        part=part,
        launches=launches,
        matrix_flops=0,
        attention_flops=0,
        bytes_read=size,
        bytes_written=0,
    )


def use(name, shapes=(), collectives=()):
    return dict(use=name, shapes=[list(s) for s in shapes], collectives=dict(collectives), micro_steps=1)


def made_table(**changes):
    """A table of made-up costs of about the record's size."""
    reduced = {"reduce_scatter_tensor": 4, "reduce_scatter_tensor bytes": 80_000_000}
    content = dict(
        torch="none",
        form="made up",
        attention="fa3",
        terms=[
            *step_terms("training", 1.0),
            *step_terms("training (looped)", 1.5),
            *step_terms("evaluation", 0.6, ("inference",)),
            *step_terms("full-model SGD", 0.1),
            *window_terms(),
        ],
        rows=[
            eager("training", "optimizers", 200, 2 * GB),
            eager("training (looped)", "optimizers", 200, 2 * GB),
            eager("calibration", "eager", 2000, 60 * GB),
            eager("TTT", "adapting", 30, 60 * GB),
            eager("TTT", "a batch's start and end", 60, 30 * GB),
        ],
        compiled=[dict(use=u, part="forward", nodes=3000, kernels=60, launches=300) for u in ("training", "TTT")],
        uses=[
            use("training", collectives=reduced),
            use("training (looped)", collectives=reduced),
            use("evaluation"),
            use("full-model SGD"),
            use("calibration"),
            use("TTT", shapes=[(64, 2048, 48, 64)]),
        ],
    )
    return {**content, **changes}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of a made-up table."""
    path = tmp_path_factory.mktemp("budget") / "h100.json"
    path.write_text(json.dumps(made_table()))
    return path


@pytest.fixture(autouse=True)
def a_tenth_of_the_documents(monkeypatch):
    """Schedules of 50,000 documents take seconds each."""
    lengths = bench.document_lengths()[::10]
    offsets = np.append(0, np.cumsum(np.random.default_rng(0).permutation(lengths)))
    monkeypatch.setattr(bench, "stream_offsets", lambda: offsets)


@pytest.fixture(scope="module")
def found(made):
    """The budget of a made-up table, by name."""
    return lambda **settings: budget_of(made, settings)


def budget_of(path, settings=None, ceilings=None):
    table, limits = Table.read(path), ceilings or Ceilings()
    settings = {name: str(value) for name, value in (settings or {}).items()}
    return bench.Budget(bench.configuration(settings, table), table, limits, cost_model.calibrate(table, limits))


def run(made, capsys, *arguments):
    """Exit code, output and errors of the command."""
    code = bench.main(["--table", str(made), "--reference", str(made), *arguments])
    return code, *capsys.readouterr()


def seconds_by_stage(budget):
    stages = [*budget.training()[0], *budget.artifact(), *budget.evaluation()]
    return {stage.name: stage.seconds.mid for stage in stages}


# --- The model ---


def test_a_row_takes_its_arithmetic_or_its_bytes_and_its_launches():
    c = Ceilings(matmul=100.0, memory=10.0, launch=1.0, attention_forward=50.0, attention_backward=20.0)
    row = cost_model.Row("forward", "MLP", "matrix product", 2, 300.0, 20.0)
    assert cost_model.row_seconds(row, c) == 3 + 2
    assert cost_model.row_seconds(row._replace(bytes=40.0), c) == 4 + 2
    attention = row._replace(kind="attention")
    assert cost_model.row_seconds(attention, c) == 300 / 50 + 2
    assert cost_model.row_seconds(attention._replace(part="backward"), c) == 300 / 20 + 2


def test_a_step_is_no_faster_than_the_hosts_launches():
    row = cost_model.Row("forward", "norms", "fused", 1000, 0.0, 3e9)
    c = Ceilings(host=5e-6, launch=1e-6)
    assert cost_model.step_seconds([row], c) == pytest.approx(5e-3)
    assert cost_model.step_seconds([row], c, 10) == pytest.approx(20e-3)


def test_more_bytes_flops_or_launches_are_never_faster():
    table = made_table()
    before = cost_model.step_seconds(Table(table).rows("training"), Ceilings())
    for name in ("bytes_read", "flops", "launches"):
        changed = copy.deepcopy(table)
        for row in changed["terms"]:
            row[name] *= 2
        assert cost_model.step_seconds(Table(changed).rows("training"), Ceilings()) > before


def test_attention_with_wide_heads_takes_less_time_for_the_same_flops():
    table = made_table()
    heads = dict(table, config=dict(table.get("config", {}), model_dim=512, num_heads=8))
    wide = dict(heads, config=dict(heads["config"], num_heads=4))

    def flops(content, kind):
        rows = Table(content).rows("training")
        return {row.part: row.flops for row in rows if (row.kind == "attention") == (kind == "attention")}

    assert flops(wide, "others") == flops(heads, "others")
    expected = dict(forward=cost_model.WIDE_FORWARD, backward=cost_model.WIDE_BACKWARD)
    before, after = (flops(content, "attention") for content in (heads, wide))
    assert after == {part: pytest.approx(before[part] / expected[part]) for part in before} and len(before) == 2


def test_steps_with_other_settings_stand_side_by_side(tmp_path, capsys):
    config = dict(preset="frontier", model_dim=512, num_heads=8, key_offset=True)
    base = made_table(config=config)
    fewer = [dict(row, flops=row["flops"] // 2) if row["kind"] == "attention" else row for row in base["terms"]]
    paths = [tmp_path / "base.json", tmp_path / "other.json", tmp_path / "page.md"]
    paths[0].write_text(json.dumps(base))
    paths[1].write_text(json.dumps(dict(base, terms=fewer, config=dict(config, window_attn_size=512))))
    assert step_costs.main([str(paths[0]), str(paths[1]), "--reference", str(paths[0]), "--out", str(paths[2])]) == 0
    page = paths[2].read_text()
    assert page == capsys.readouterr().out and page.startswith("# A step of `frontier`")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["as it is", "`WINDOW_ATTN_SIZE=512`"]
    (plain, attention), (shorter, half) = ([float(x) for x in row[1:3]] for row in rows)
    assert half < attention and shorter - plain == pytest.approx(half - attention, abs=0.21)  # all else is the same
    assert step_costs.main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none.json'} is not a table")


def test_windows_of_any_size_follow_from_those_of_the_table():
    costs = WindowCosts(Table(made_table()))
    assert costs.residual < 1e-6
    c = dataclasses.replace(Ceilings(), launch=0.0, host=0.0, host_token=0.0)
    rows, seconds = costs.table_of(np.array([(48, 1536, 48, 40)]), c)
    by_row = dict(zip(((r.part, r.term) for r in rows), seconds[0], strict=True))
    assert by_row["forward", "LoRA"] == pytest.approx(130e6 * 48 * 1536 / c.matmul, rel=1e-4)
    assert by_row["backward", "attention"] == pytest.approx(4e4 * 48 * 1536**2 / c.attention_backward, rel=1e-4)
    assert by_row["adapting", "adapting"] == pytest.approx(60e9 * 40 / 64 / c.memory)


def test_a_window_that_nothing_learns_from_runs_no_backward_pass():
    costs, c = WindowCosts(Table(made_table())), Ceilings()
    learning, scoring = costs.seconds(np.array([(64, 2048, 48, 64), (64, 2048, 48, 0)]), c)
    rows, seconds = costs.table_of(np.array([(64, 2048, 48, 0)]), c)
    assert scoring < learning / 2
    assert not any(value for row, value in zip(rows, seconds[0], strict=True) if row.part == "backward")


# --- The calibration ---


def test_the_calibration_meets_published_times_within_its_range(found):
    fits = found().calibration
    factors = dict(zip(fits.fits, (fits.training, fits.training, fits.ttt), strict=True))
    for name, fit in fits.fits.items():
        assert fit["residual"] == pytest.approx(fit["modelled"] / fit["published"] - 1)
        low, mid, high = factors[name]
        assert low * 0.999 <= mid * fit["published"] / fit["modelled"] <= high * 1.001


def test_a_table_that_meets_the_published_times_at_a_factor_gives_that_factor(monkeypatch):
    reference, c = Table(made_table()), dataclasses.replace(Ceilings(), host=0.0, host_token=0.0)
    monkeypatch.setattr(cost_model, "PEER_STEP", 1.3 * cost_model.step_seconds(reference.rows("training"), c))
    looped = cost_model.step_seconds(reference.rows("training (looped)"), c)
    monkeypatch.setattr(cost_model, "PEER_LOOPED_STEP", 1.3 * looped)
    window = WindowCosts(reference).seconds(np.array([cost_model.PEER_WINDOW]), c)[0]
    monkeypatch.setattr(cost_model, "PEER_WINDOW_SECONDS", 1.3 * 1.21 * window)
    fits = cost_model.calibrate(reference, c)
    assert fits.training == pytest.approx((1.3 * 0.9, 1.3, 1.3 * 1.1))
    assert fits.ttt == pytest.approx((1.3, 1.3 * 1.1, 1.3 * 1.21))
    assert [fit["residual"] for fit in fits.fits.values()] == pytest.approx([0, 0, 1 / 1.1 - 1])


def test_a_faster_script_is_faster_than_the_reference(made):
    faster = made_table()
    for row in faster["terms"]:
        row["bytes_read"], row["bytes_written"], row["flops"] = (
            row[n] // 2 for n in ("bytes_read", "bytes_written", "flops")
        )
    reference, c = Table.read(made), Ceilings()
    fits = cost_model.calibrate(reference, c)
    budgets = [bench.Budget(bench.configuration({}, t), t, c, fits) for t in (reference, Table(faster))]
    before, after = (b.step("training").mid for b in budgets)
    assert after < 0.6 * before


# --- Schedules ---


def test_lengths_are_those_of_the_challenge():
    lengths = bench.document_lengths()
    assert len(lengths) == 50_000 and lengths[0] == 110_000
    assert lengths.sum() == pytest.approx(47_851_520, rel=0.002)
    assert (np.diff(lengths) <= 0).all()


@pytest.mark.parametrize("order", ["stream", "length"])
def test_windows_score_every_target_once(order):
    config = bench.configuration(dict(TTT_ORDER=order, PHASED_TTT_PREFIX_DOCS="40"), Table(made_table()))
    lengths = np.random.default_rng(1).integers(2, 700, 100)
    offsets = np.append(0, np.cumsum(lengths))
    phases = bench.phases(config, offsets)
    chunks = sum(window[0] for phase in phases for rank in phase.windows for window in rank if window[0] > 2)
    single = sum(1 for phase in phases for rank in phase.windows for window in rank if window[0] <= 2)
    needed = int((-(-lengths // 48)).sum())
    assert chunks + single <= needed <= chunks + 2 * single  # a lone document takes two rows
    assert sum(phase.full_model_steps for phase in phases) == sum(
        -(-int(lengths_of(config, offsets, phase).sum()) // 32768) - 1 for phase in ends_of(config, offsets)
    )


def ends_of(config, offsets):
    return bench.schedule(config, offsets, 0).phase_ends


def lengths_of(config, offsets, end):
    ttt = bench.schedule(config, offsets, 0)
    return ttt.lengths[ttt.order[:end]]


@pytest.mark.parametrize("order", ["stream", "length"])
def test_windows_have_the_shapes_that_the_script_makes(order):
    config = bench.configuration(dict(TTT_ORDER=order, TTT_SHORT_DOC_CHUNKS="1"), Table(made_table()))
    lengths = np.array([3000, 2100, 700, 90, 30, 5])
    ttt = bench.schedule(config, np.append(0, np.cumsum(lengths)), 0)
    ttt.tokens = np.zeros(lengths.sum() + 1, np.uint16)
    documents = next(ttt.batches(0, len(lengths))) if order == "length" else np.argsort(-lengths)
    documents = documents[np.argsort(-ttt.chunk_counts[documents], kind="stable")]
    windows = list(bench.windows_of(ttt, documents))
    for chunk in range(0, len(windows), 7):
        batch, scored = ttt.window(documents[ttt.chunk_counts[documents] > chunk], chunk)
        rows, length, targets, _ = windows[chunk]
        assert (rows, length) == (max(2, batch.ids.shape[0]), batch.ids.shape[1])
        assert targets == scored.shape[1]


@pytest.mark.parametrize("short", [False, True])
def test_windows_with_a_cache_have_the_keys_that_the_script_makes(short):
    knobs = dict(TTT_RECOMPUTE_TOKENS="40", TTT_SHORT_DOC_CHUNKS=str(int(short)))
    table = Table(made_table(config=dict(ttt_recompute_tokens=40, ttt_short_doc_chunks=short)))
    config = bench.configuration(knobs, table)
    lengths = np.array([3000, 2100, 700, 90, 30, 5])
    ttt = bench.schedule(config, np.append(0, np.cumsum(lengths)), 0)
    ttt.tokens = np.zeros(lengths.sum() + 1, np.uint16)
    ttt.model = types.SimpleNamespace(runtime=types.SimpleNamespace(compile=False))
    shape = (len(lengths), 1, ttt.slots, 1, 1)
    ttt.cache, ttt.held = (torch.zeros(shape), torch.zeros(shape)), np.zeros(ttt.slots, np.int64)
    documents = np.argsort(-lengths)
    windows = list(bench.windows_of(ttt, documents))
    assert len(windows) == ttt.chunk_counts.max()
    for chunk in range(0, len(windows), 7):
        batch, scored = ttt.window(documents[ttt.chunk_counts[documents] > chunk], chunk)
        past = ttt.context_of(batch)[0]
        rows, keys, targets, _ = windows[chunk]
        assert rows == max(2, batch.ids.shape[0]) and batch.ids.shape[1] == ttt.length
        assert past.mask.shape == (ttt.length, keys) and past.keys.shape[2] + ttt.length == keys
        assert targets == scored.shape[1]


def test_replayed_windows_are_those_that_the_script_replays(monkeypatch):
    """By its own WindowGraphs, whose graphs here do nothing, over the same windows."""
    table = Table(made_table(config=dict(ttt_recompute_tokens=48, ttt_chunk_size=16)))
    config = bench.configuration(dict(TTT_RECOMPUTE_TOKENS="48", TTT_CHUNK_SIZE="16"), table)
    lengths = np.array([6000, 4000, 3900, 2500, 90, *[3000] * 40])
    ttt = bench.schedule(config, np.append(0, np.cumsum(lengths)), 0)
    batches = [np.array([0, 4]), np.array([1, 2, 3]), np.arange(5, 45)]
    replays, found = bench.t.Replays(), []
    graphs = bench.t.WindowGraphs(ttt, True)
    monkeypatch.setattr(graphs, "record", lambda window: window)
    monkeypatch.setattr(graphs, "check", lambda graph, window: None)
    for rows, keys, scored, adapting in (w for batch in batches for w in bench.windows_of(ttt, batch)):
        ids, targets, counted = (torch.empty(n, m) for n, m in ((rows, ttt.length), (rows, scored), (adapting, scored)))
        documents = bench.t.Documents(ids, torch.empty(2))
        past = bench.t.Past(ids, ids, torch.empty(ttt.length, keys), torch.empty(ttt.length, keys))
        window = bench.t.TTTWindow(
            bench.t.Batch(ids, targets, documents), counted, np.empty(0), None, past, torch.empty(9)
        )
        found.append((replays(rows, (rows, keys, scored, adapting)), graphs.graph_of(window) is not None))
    assert all(a == b for a, b in found) and 300 < sum(a for a, _ in found) < len(found) - 300
    assert len(replays.recorded) == len(graphs.graphs) == 3
    off = dataclasses.replace(config, ttt_cuda_graphs="0")
    assert not any(w[:, 4].any() for phase in bench.phases(off, ttt.offsets) for w in phase.windows)
    assert any(w[:, 4].any() for phase in bench.phases(config, ttt.offsets) for w in phase.windows)


def test_replayed_windows_cost_few_launches():
    costs, windows = WindowCosts(Table(made_table())), np.array([[2, 2048, 48, 2, 0], [2, 2048, 48, 2, 1]])
    slow = dataclasses.replace(Ceilings(), host=1e-3)
    launched, replayed = costs.seconds(windows, slow)
    assert replayed < launched and costs.seconds(windows[:, :4], slow)[1] == launched


def test_a_cache_needs_a_table_of_its_windows():
    made = Table(made_table(config=dict(ttt_recompute_tokens=48, ttt_chunk_size=16)))
    for knobs, text in (
        (dict(TTT_RECOMPUTE_TOKENS="0"), "TTT_RECOMPUTE_TOKENS=0: .* was made with 48"),
        (dict(TTT_RECOMPUTE_TOKENS="48", TTT_CHUNK_SIZE="32"), "TTT_CHUNK_SIZE=32: .* was made with 16"),
    ):
        with pytest.raises(bench.BudgetError, match=text):
            bench.configuration(knobs, made)


def test_steps_are_those_of_the_scripts_schedule():
    config = dataclasses.replace(bench.configuration({}, Table(made_table())), gptq_reserve_seconds=0.0)
    before, after = bench.training_steps(config, 0.1, 0.2)
    assert before == pytest.approx(0.35 * 6000, abs=2)
    assert after == pytest.approx(0.65 * 3000, abs=2)
    short = dataclasses.replace(config, iterations=100)
    assert sum(bench.training_steps(short, 0.1, 0.2)) == 100


# --- Stages and knobs ---


@pytest.mark.parametrize(
    "knob, value, stage",
    [
        ("ENABLE_LOOPING_AT", "0.5", "train, before the loops"),
        ("GPTQ_CALIBRATION_BATCHES", "32", "calibrate"),
        ("EVAL_STRIDE", "128", "evaluate"),
        ("TTT_GRAD_STEPS", "2", "ttt, score and adapt"),
        ("GLOBAL_TTT_EPOCHS", "2", "ttt, full-model steps"),
    ],
)
def test_a_knob_changes_its_stage(found, knob, value, stage):
    before, after = seconds_by_stage(found()), seconds_by_stage(found(**{knob: value}))
    assert after[stage] > 1.3 * before[stage]
    others = {"unpack", "ttt, compiling", "ttt, ledger", "quantize"} - {stage}
    assert all(after[name] == before[name] for name in others)


def test_training_takes_its_limit_and_no_more(found):
    stages, steps = found().training()
    spent = sum(stage.seconds.mid for stage in stages if stage.counts == "training")
    assert 595 < spent <= 600.5
    assert steps[0] > steps[1] > steps[2]  # a lower factor makes more steps


def test_without_test_time_training_it_has_no_stages(found):
    assert not [name for name in seconds_by_stage(found(TTT_MODE="none")) if name.startswith("ttt")]


# --- Output ---


def figures(value, label="", path=""):
    """Every number of a JSON value with the label that it stands under, and its place."""
    if isinstance(value, dict):
        for name, part in value.items():
            labelled = name if name.startswith(("estimated", "peer_measured")) else label
            yield from figures(part, labelled, f"{path}.{name}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from figures(part, label, f"{path}.{i}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, label


def test_every_figure_says_what_it_is(made, capsys, tmp_path):
    code, out, _ = run(made, capsys, "--out", str(tmp_path))
    assert code == 0 and out.strip() == (tmp_path / "budget.md").read_text().strip()
    found = json.loads((tmp_path / "budget.json").read_text())
    counts = (".limit", ".target", ".phase", ".batches", ".windows", ".full_model_steps")
    unlabelled = [path for path, label in figures(found) if not label and not path.endswith(counts)]
    assert not unlabelled
    for line in out.splitlines():
        if line.startswith("| ") and "estimated" not in line and "---" not in line:
            continue  # rows of a table, whose head says it
        if any(letter.isdigit() for letter in line) and not line.startswith("#"):
            assert "estimated" in line or "published" in line, line
    heads = [
        line for line, after in zip(out.splitlines(), out.splitlines()[1:], strict=False) if after.startswith("| ---")
    ]
    assert heads and all("estimated" in head for head in heads)


def test_targets_are_judged(made, capsys):
    _, out, _ = run(made, capsys)
    assert "- step before the loops: " in out and out.count(": not met") + out.count(": met") == 3


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--set", "NO_SUCH=1"], "error: --set NO_SUCH: train_gpt.py has no such knob"),
        (["--set", "TTT_ORDER"], "error: --set TTT_ORDER: must be NAME=VALUE"),
        (["--set", "TTT_ORDER=sideways"], "error: TTT_ORDER"),
        (["--set", "NUM_LAYERS=12"], "error: NUM_LAYERS=12: "),
        (["--set", "TTT_MODE=chunk"], "error: TTT_MODE=chunk: "),
        (["--set", "TTT_RECOMPUTE_TOKENS=48"], "error: TTT_RECOMPUTE_TOKENS=48: "),
        (["--ceilings", "speed=1"], "error: --ceilings speed: must be one of matmul, memory"),
        (["--ceilings", "memory=0"], "error: --ceilings memory=0: must be a number above 0"),
        (["--ceilings", "memory=fast"], "error: --ceilings memory=fast: must be a number above 0"),
        (["--table", "/no/such/file"], "error: /no/such/file is not a table of make check-h100"),
    ],
)
def test_an_error_of_the_user_is_one_line(made, capsys, arguments, line):
    code, out, err = run(made, capsys, *arguments)
    assert code == 2 and not out
    assert err.startswith(line) and err.count("\n") == 1


def test_a_table_without_what_is_needed_is_refused():
    with pytest.raises(TableError, match="no costs by term"):
        Table(dict(made_table(), terms=[]))
    with pytest.raises(TableError, match="--no-inductor"):
        Table(dict(made_table(), terms=[{**row, "launches": 0} for row in made_table()["terms"]])).rows("training")
    with pytest.raises(TableError, match="no use 'calibration'"):
        Table(dict(made_table(), uses=made_table()["uses"][:2])).use("calibration")
    few = [row for row in made_table()["terms"] if row["window"] in ([], list(WINDOWS[0]))]
    with pytest.raises(TableError, match="at least 6"):
        WindowCosts(Table(dict(made_table(), terms=few)))


@pytest.mark.parametrize("name", ["h100_reference.json", "h100.json"])
def test_committed_tables_make_a_budget(name):
    path = ROOT / "bench/results" / name
    if not path.exists():
        pytest.skip(f"bench/results/{name} is not there")
    table = Table.read(path)
    fits = cost_model.calibrate(Table.read(ROOT / "bench/results/h100_reference.json"), Ceilings())
    plain, looped, ttt = (abs(fit["residual"]) for fit in fits.fits.values())
    assert max(plain, looped) < 0.01 and ttt < 0.2
    budget = bench.Budget(bench.configuration({}, table), table, Ceilings(), fits)
    assert 0.02 < budget.step("training").mid < budget.step("training (looped)").mid < 0.3
    assert budget.windows.residual < 0.05
