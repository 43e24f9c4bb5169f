"""Reading logs of public records as people print them: every last stage, stamps, sizes, several runs in one file.

The lines have the forms of public logs; their figures are invented.
"""

import math
import sys

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import report  # noqa: E402
import runs  # noqa: E402


def read(folder, text, name="train.log"):
    (folder / name).write_text(text)
    return runs.read_logs(folder / name)


FORMS = {
    "sliding windows under `eval`, with a stride": (
        """final_int6_roundtrip_exact val_loss:2.11000000 val_bpb:1.24000000
        final_sliding_window_eval_exact stride:64 val_loss:2.05000000 val_bpb:1.21000000""",
        dict(quantized=1.24, sliding=1.21),
        "sliding",
    ),
    "the word before each figure": (
        """final_int8_zlib_roundtrip_exact val_loss:2.11 val_bpb:1.24
        final_int8_zlib_roundtrip_exact sliding val_loss:2.05 sliding val_bpb:1.21""",
        dict(quantized=1.24, sliding=1.21),
        "sliding",
    ),
    "a legacy line that repeats the last score": (
        """final_int6_roundtrip val_loss:2.0 val_bpb:1.13
        final_int6_roundtrip_exact val_loss:2.0 val_bpb:1.13000001
        final_int6_sliding_window_exact val_loss:1.9 val_bpb:1.11000001
        final_int8_zlib_roundtrip val_loss:1.9 val_bpb:1.11
        final_int8_zlib_roundtrip_exact val_loss:1.9 val_bpb:1.11000001""",
        dict(quantized=1.13000001, sliding=1.11000001),
        "sliding",
    ),
    "a legacy line with a score of its own": (
        """final_int6_roundtrip_exact val_loss:2.0 val_bpb:1.13
        final_int6_sliding_window_exact val_loss:1.9 val_bpb:1.11
        final_int8_zlib_roundtrip_exact val_loss:1.9 val_bpb:1.09""",
        dict(quantized=1.13, sliding=1.11, int8_zlib_roundtrip=1.09),
        "int8_zlib_roundtrip",
    ),
    "a legacy line before the score that it repeats": (
        """final_int8_zlib_roundtrip_exact val_loss:1.9 val_bpb:1.11
        final_int6_sliding_window_exact val_loss:1.9 val_bpb:1.11
        final_int6_roundtrip_exact val_loss:2.0 val_bpb:1.13""",
        dict(quantized=1.13, sliding=1.11),
        "sliding",
    ),
    "slot": (
        """final_int6_sliding_window_exact val_loss:1.9 val_bpb:1.11
        final_slot val_loss:1.07 val_bpb:0.63 eval_time:90000ms
        final_slot_exact val_loss:1.0712 val_bpb:0.63123456""",
        dict(sliding=1.11, slot=0.63123456),
        "slot",
    ),
    "ngram, in bits alone": (
        "legal_ttt_exact val_loss:1.9 val_bpb:1.11\nngram_exact val_bpb:0.97",
        dict(ttt=1.11, ngram=0.97),
        "ngram",
    ),
    "hedge": (
        "legal_ttt_exact val_loss:1.9 val_bpb:1.11\nhedge_mixer val_loss:1.7 val_bpb:0.98",
        dict(ttt=1.11, hedge_mixer=0.98),
        "hedge_mixer",
    ),
    "a stage on top of a known one": (
        "quantized_ttt val_loss:1.9 val_bpb:1.11\nquantized_sliding_etlb val_loss:1.8 val_bpb:1.10 eval_time:9000ms",
        dict(ttt=1.11, quantized_sliding_etlb=1.10),
        "quantized_sliding_etlb",
    ),
    "training on the validation text before the quantization": (
        """post-prequant-ttt val_loss:2.0 val_bpb:1.03
        quantized val_loss:2.1 val_bpb:1.06
        quantized_sliding_window val_loss:2.0 val_bpb:1.04""",
        dict(post_prequant_ttt=1.03, quantized=1.06, sliding=1.04),
        "sliding",
    ),
    "sliding windows after test-time training": (
        "legal_ttt_exact val_loss:1.9 val_bpb:1.12\nfinal_int6_sliding_window_exact val_loss:1.8 val_bpb:1.11",
        dict(ttt=1.12, sliding=1.11),
        "sliding",
    ),
    "equals signs": (
        "final_int6_roundtrip val_bpb = 1.13\nttt_sliding:done val_loss=1.94 val_bpb=1.1537 elapsed=21509.2s",
        dict(quantized=1.13, ttt=1.1537),
        "ttt",
    ),
    "a mixer on top of sliding windows, which are said after it": (
        """quantized val_loss:2.88 val_bpb:1.1173
        byte_mixer val_bpb:0.9428 eval_time:480934ms order=5
        quantized_sliding_window val_loss:2.84 val_bpb:1.1004 eval_time:625887ms""",
        dict(quantized=1.1173, byte_mixer=0.9428, sliding=1.1004),
        "byte_mixer",
    ),
    "a better score of before the quantization is not the last one": (
        """best_checkpoint val_loss:1.8 val_bpb:1.05
        quantized val_loss:2.88 val_bpb:1.11
        quantized_sliding_window val_loss:2.84 val_bpb:1.10""",
        dict(best_checkpoint=1.05, quantized=1.11, sliding=1.10),
        "sliding",
    ),
    "test-time training before the quantization, under no such name": (
        """DIAGNOSTIC post_ttt val_loss:1.87 val_bpb:1.1081 eval_time:6056ms
        final_int6_roundtrip_exact val_loss:1.878 val_bpb:1.1125
        final_int6_sliding_window_exact val_loss:1.843 val_bpb:1.0917""",
        dict(diagnostic_post_ttt=1.1081, quantized=1.1125, sliding=1.0917),
        "sliding",
    ),
    "a roundtrip of a format of its own": (
        "final_w6e8_zlib_roundtrip_exact val_loss:2.7143 val_bpb:1.1649",
        dict(quantized=1.1649),
        "quantized",
    ),
    "a roundtrip in sliding windows": (
        """final_eval_mode:sliding_window stride:64 batch_seqs:16
        final_int6_zstd_roundtrip_exact val_loss:1.9689 val_bpb:1.1661""",
        dict(sliding=1.1661),
        "sliding",
    ),
    "scores in words": (
        """EMA BPB (no XSA): 1.022
        Quantized BPB (no XSA): 1.0415
        Baseline BPB: 1.2244""",
        dict(pre_quant=1.022, quantized=1.0415),
        "quantized",
    ),
    "the stage in brackets": (
        "val_bpb (pre-quant): 1.50\nval_bpb (int4 roundtrip): 1.60",
        dict(pre_quant=1.50, quantized=1.60),
        "quantized",
    ),
    "progress, differences and aims are no stages": (
        """DIAGNOSTIC post_average val_loss:1.9 val_bpb:1.14 eval_time:2000ms
        final_ternary_roundtrip_exact val_loss:2.0 val_bpb:1.13
        ttt_chunk 5/90 val_loss:1.8 val_bpb:1.05
        quantization_gap val_bpb:0.0041
        temp_search: temp=0.85 val_bpb=1.1300
        target val_bpb:1.05""",
        dict(pre_quant=1.14, quantized=1.13),
        "quantized",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "stamp", ["", "[05:06:19] ", "2026-04-01 05:06:19,123 - root - INFO - ", "[rank0]: ", "\x1b[1m"]
)
def test_the_last_score_counts_under_its_own_name(form, stamp, tmp_path):
    text, stages, final = FORMS[form]
    lines = [stamp + line.strip() for line in text.splitlines()]
    (run,) = read(tmp_path, "\n".join(lines))
    assert {name: stage.bpb for name, stage in run.stages.items()} == stages
    assert run.final_stage == final and run.final.bpb == stages[final] and not run.problems
    cell = report.rows_of([run])[1][report.rows_of([run])[0].index("of stage")]
    assert cell == (final if final in report.STAGES else f"{final} (unknown stage)")


def test_a_log_in_columns_and_words(tmp_path):
    (run,) = read(
        tmp_path,
        """Seed: 42, Steps: 7000, Warmdown: 2100
Validation tokens: 40,540,160
Total params: 33,909,825
step     1/7000 | loss 8.9998 | lr_mul 0.0500 | 0.01 steps/s | 125s
step   100/7000 | loss 5.1039 | lr_mul 1.0000 | 0.65 steps/s | 154s
Stopping early at step 1652 (wallclock limit)
Training complete in 600s
Artifact: 15,870,797 bytes (15.14 MB)
final_int6_roundtrip_exact val_loss:3.16671180 val_bpb:1.04153708
""",
    )
    assert run.losses == [(1, 8.9998, 125.0), (100, 5.1039, 154.0)]
    assert (run.seed, run.steps, run.train_seconds, run.artifact_bytes) == (42, 1652, 600.0, 15870797)
    assert (run.val_tokens, run.parameters, run.final.bpb) == (40540160, 33909825, 1.04153708)


def test_sizes_of_other_machines_and_of_a_total(tmp_path):
    (run,) = read(tmp_path, "step:3/3 val_loss:3.7 val_bpb:2.2\nserialized_model_int8_zlib:7990030 bytes (payload:1)\n")
    assert run.model_bytes == 7990030
    (run,) = read(
        tmp_path, "Total submission size int6+zstd: 15000000 bytes\nstep:1/1 val_bpb:1.2\nArtifact: 7 bytes\n"
    )
    assert run.artifact_bytes == 15000000


def test_facts_beside_a_score(tmp_path):
    (run,) = read(
        tmp_path,
        "\n".join(line.strip() for line in FORMS["sliding windows under `eval`, with a stride"][0].splitlines()),
    )
    assert run.final.stride == 64 and run.final.label == "final_sliding_window_eval stride:64"
    (run,) = read(tmp_path, FORMS["equals signs"][0])
    assert run.final.seconds == run.eval_seconds == 21509.2 and run.stages["quantized"].loss is None
    assert report.rows_of([run])[1][1] == "1.15370"


def test_stamped_lines_keep_their_figures(tmp_path):
    (run,) = read(
        tmp_path,
        """[05:00:01]   train_batch_tokens: 524288
[05:00:01]   seed: 1337
[05:06:19] step:200/20000 train_loss:3.1 train_time:9000ms step_avg:45.00ms
[05:07:19] step:400/20000 val_bpb:1.2173 train_time:18000ms
[05:08:30] stopping_early: wallclock_cap train_time:600044ms step:12395/20000
[05:08:31] Serialized model quantized+brotli: 15887082 bytes
[05:08:31] Code size: 19846 bytes
[05:08:31] Total submission size quantized+brotli: 15906928 bytes
[05:08:50] quantized_sliding_window val_loss:2.79 val_bpb:1.0811 eval_time:90736ms
""",
        "train_seed0.log",
    )
    assert run.losses == [(200, 3.1, 9.0)] and (run.steps, run.train_seconds) == (12395, 600.044)
    ((step, loss, bpb, seconds),) = run.scores
    assert (step, bpb, seconds) == (400, 1.2173, 18.0) and math.isnan(loss)
    assert (run.artifact_bytes, run.code_bytes, run.model_bytes) == (15906928, 19846, 15887082)
    assert run.final.bpb == 1.0811 and run.final.seconds == 90.736 and run.tokens_per_step == 524288
    assert run.seed == 1337 and run.remarks == ["log: is of seed 1337, and its name says seed 0"]


FIRST = """seed: 1
train_batch_tokens:1000 train_seq_len:100
step:0/20000 val_loss:6.93 val_bpb:4.1 train_time:0ms step_avg:0.02ms
step:12395/20000 train_loss:2.0 train_time:600044ms step_avg:48.4ms
step:12395/20000 val_loss:2.01 val_bpb:1.19 train_time:600044ms step_avg:48.4ms
stopping_early: wallclock_cap train_time:600044ms step:12395/20000
final_int8_zlib_roundtrip_exact val_loss:2.02 val_bpb:1.2
"""
SECOND = FIRST.replace("seed: 1", "seed: 2").replace("12395", "12400").replace("1.2\n", "1.3\n")


def test_several_runs_in_one_log_are_several(tmp_path):
    first, second = read(tmp_path, FIRST + "\n" + SECOND)
    assert (first.seed, first.steps, first.final.bpb) == (1, 12395, 1.2)
    assert (second.seed, second.steps, second.final.bpb) == (2, 12400, 1.3)
    assert [first.name, second.name] == ["train run 1", "train run 2"]
    found, _ = report.read([str(tmp_path / "train.log")], problems := [])
    assert [run.final.bpb for run in found] == [1.2, 1.3] and "holds 2 runs" in problems[0]
    assert runs.read_log(tmp_path / "train.log").seed == 2  # who wants one gets the last
    late = SECOND.replace("step:0/20000 val_loss:6.93 val_bpb:4.1", "step:500/20000 train_loss:3.3")
    assert [run.seed for run in read(tmp_path, FIRST + late)] == [1, 2]  # the first line of training is of step 500
    assert [run.seed for run in read(tmp_path, FIRST + FIRST)] == [1]  # a log that says everything twice


def test_a_run_that_went_on_is_one_run(tmp_path):
    (run,) = read(tmp_path, "step:900/2000 train_loss:3\nstep:1000/2000 train_loss:2.9\nstep:900/2000 train_loss:3\n")
    assert len(run.losses) == 3
    text = "step:1/9 train_loss:5\nstep:4/9 train_loss:4\nresumed from a checkpoint: step 0, 1.5 s of training count\n"
    (run,) = read(tmp_path, text + "step:1/9 train_loss:5.5\n")
    assert run.losses == [(1, 5.5, None)]


def test_another_training_set_is_said(tmp_path):
    for seed, shards in ((0, 80), (1, 80), (2, 39)):
        line = f"train_loader:dataset:fineweb train_shards:{shards}\n" if seed else f"train_shards: {shards}\n"
        read(tmp_path, f"seed: {seed}\n{line}{FIRST.partition(chr(10))[2]}", f"train_seed{seed}.log")
    found, _ = report.read([str(tmp_path)], problems := [])
    assert [run.train_shards for run in found] == [80, 80, 39]
    assert [text.partition(": ")[2] for text in problems] == ["trained on 39 shards, and most runs beside it on 80"]


def test_a_hostile_log_stays_bounded(tmp_path):
    text = "".join(
        f"stage_{chr(97 + n % 26)}{chr(97 + n // 26)} val_loss:1 val_bpb:{1 + n / 1000}\n" for n in range(300)
    )
    (run,) = read(tmp_path, text)
    assert len(run.stages) == runs.MOST_STAGES and run.final.bpb == 1.299
    many = "".join(f"step:1/2 train_loss:{n}\nstep:2/2 train_loss:1\n" for n in range(runs.MOST_RUNS + 20))
    assert len(read(tmp_path, many)) == runs.MOST_RUNS
    assert runs.bare("[" * 5000).startswith("[[[") and runs.split_score("val_loss:" * 900 + "val_bpb:x") is None


# ------------------------------------------------------------------------------------------------------------ pictures


def run_of(number, steps=100, final=1.1, tokens=1000, ratio=0.6):
    losses = [(step, (final + 2 / step) / ratio, None) for step in range(1, steps + 1)]
    run = runs.Run(f"run {number}", f"run{number}", losses=losses, scores=[(steps, final / ratio, final, None)])
    run.stages = dict(quantized=runs.Stage(final / ratio, final), sliding=runs.Stage(None, final - 0.02))
    run.steps, run.settings = steps, dict(train_batch_tokens=str(tokens))
    return run


def drawn(monkeypatch, draw, what):
    """The figure that a picture is made of."""
    figures = []
    monkeypatch.setattr(report, "png", lambda fig: (fig.draw_without_rendering(), figures.append(fig))[0] or b"png")
    draw(what)
    return figures[0]


def test_curves_are_bits_per_byte_over_the_share_and_over_tokens(monkeypatch):
    small, large = run_of(0, ratio=0.6), run_of(1, ratio=0.3)  # vocabularies of different sizes, and the same model
    left, right = drawn(monkeypatch, report.loss_picture, [small, large]).axes
    assert left.get_ylabel() == "bits per byte" and left.get_xlabel() == "share of the training"
    assert right.get_xlabel() == "training tokens"
    first, points, second, _ = left.lines
    assert first.get_ydata() == pytest.approx(second.get_ydata()) and first.get_xdata()[-1] == 1
    assert right.lines[0].get_xdata()[-1] == 100_000 and points.get_ydata()[-1] == pytest.approx(1.1)
    low, high = left.get_ylim()
    assert low == pytest.approx(1.1, abs=0.05) and high < 1.4  # not the first steps


def test_one_long_and_one_poor_run_flatten_nothing(monkeypatch):
    found = [run_of(n) for n in range(6)] + [run_of(6, steps=5000)] + [run_of(7, final=3.0)]
    left, right = drawn(monkeypatch, report.loss_picture, found).axes
    assert right.get_xscale() == "log" and left.get_ylim()[1] < 2 and "beyond the axis: run 7" in left.get_title()
    assert max(line.get_xdata()[-1] for line in left.lines) == 1
    (ax,) = drawn(monkeypatch, report.stage_picture, found).axes
    assert ax.get_ylim()[1] < 1.2 and "beyond the axis: run 7" in ax.get_title()


def test_runs_without_a_score_or_without_tokens_are_counted(monkeypatch):
    plain = runs.Run("plain", "plain", losses=[(1, 3.0, None), (9, 2.0, None)])
    left, _ = drawn(monkeypatch, report.loss_picture, [run_of(0), plain]).axes
    assert "1 of 2 runs have no score to draw" in left.get_title()
    left, right = drawn(monkeypatch, report.loss_picture, [plain]).axes
    assert left.get_ylabel() == "nats per token" and right.get_xlabel() == "steps"
    silent = run_of(1)
    silent.settings.clear()
    _, right = drawn(monkeypatch, report.loss_picture, [run_of(0), silent]).axes
    assert "1 of 2 runs do not say their tokens" in right.get_title() and len(right.lines) == 2


@pytest.mark.parametrize("count", [1, 4, 41])
def test_a_legend_and_labels_fit_any_number_of_runs(count, monkeypatch):
    found = [run_of(n, final=1.1 + 0.001 * (n % 17)) for n in range(count)]
    for run in found:
        run.name = f"2026-04-01_A_Record_With_A_Long_Name/train_{run.name}"
    for draw in (report.loss_picture, report.stage_picture):
        fig = drawn(monkeypatch, draw, found)
        (legend,) = fig.legends
        box, page = legend.get_window_extent(), fig.bbox
        assert len(legend.get_texts()) == count
        assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0
        assert all(ax.get_window_extent().y0 > box.y1 for ax in fig.axes)
        assert all(ax.get_window_extent().height > 250 for ax in fig.axes)
    texts = fig.axes[0].texts
    boxes = [text.get_window_extent() for text in texts]
    assert texts and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for text in texts:  # each stands at its point
        assert f"{text.xy[1]:.4f}" == text.get_text() and text.xyann == (7, 0)
    best = min(run.final.bpb for run in found)
    assert f"{best:.4f}" in [text.get_text() for text in texts]


def test_no_two_of_500_runs_look_alike():
    looks = {(str(report.style(place)), report.marker_of(place)) for place in range(500)}
    assert len(looks) == 500 and len({str(report.style(place)) for place in range(56)}) == 56


def test_pictures_of_a_sweep(monkeypatch):
    values = [1.5, 1.2, None, 9.0, 1.1]
    trials = [
        dict(trial=n, state="complete" if v else "fail", value=v, values=dict(LR=str(n)), seconds=1.0, error=None)
        for n, v in enumerate(values)
    ]
    study = dict(name="s", objective="val_bpb", variables=["LR"], trials=trials, direction="minimize")
    study |= dict(importance=dict(LR=0.75, SEED=0.25), importance_by="main effects")
    (ax,) = drawn(monkeypatch, report.best_picture, study).axes
    assert list(ax.lines[0].get_ydata()) == [1.5, 1.2, 1.2, 1.1] and "best so far 1.1" in ax.get_title()
    assert "beyond the axis: trial 3" in ax.get_title() and list(ax.lines[2].get_xdata()) == [2]
    (ax,) = drawn(monkeypatch, report.best_picture, study | dict(direction="maximize")).axes
    assert list(ax.lines[0].get_ydata()) == [1.5, 1.5, 9.0, 9.0]
    (ax,) = drawn(monkeypatch, report.importance_picture, study).axes
    assert [bar.get_width() for bar in ax.patches] == [0.25, 0.75]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["SEED", "LR"]
    (ax,) = drawn(monkeypatch, report.sweep_picture, study).axes
    assert "beyond the axis: trial 3" in ax.get_title() and "dark: low val_bpb" in ax.get_title()
