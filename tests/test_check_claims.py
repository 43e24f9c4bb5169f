"""tools/check_submission.py on other people's folders: no false alarm in many schemas, no miss of what is planted."""

import base64
import json
import lzma
import random
import re
import shutil
import statistics
import sys
from typing import Any

import pytest

import submissions
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import check_submission  # noqa: E402
import claims  # noqa: E402

DRAWS = 3


def check(folder, capsys, *arguments):
    """(exit code, errors and warnings as lines, all lines)."""
    code = check_submission.main([str(folder), *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    return code, [line for line in lines if line.startswith(("error: ", "warning: "))], lines


def made(folder, schema, draw=0, change=None):
    return submissions.write(folder, schema, random.Random(f"{schema} {draw}"), change)


def edit(path, pattern, new, count=1):
    text, found = re.subn(pattern, new, path.read_text(), count=count, flags=re.M)
    assert found, pattern
    path.write_text(text)


def rewrite(folder, change):
    """Changes submission.json as decimals of Python."""
    content = json.loads((folder / "submission.json").read_text(), parse_float=submissions.Decimal)
    change(content)
    (folder / "submission.json").write_text(submissions.dumps(content))


# ----------------------------------------------------------------------------------------------------- no false alarm


@pytest.mark.parametrize("draw", range(DRAWS))
@pytest.mark.parametrize("schema", submissions.SCHEMAS)
def test_a_good_folder_of_any_schema_has_no_alarm(schema, draw, tmp_path, capsys):
    made(tmp_path / "a", schema, draw)
    code, found, _ = check(tmp_path / "a", capsys)
    assert (code, found) == (0, [])


def late(ts):
    for t in ts:
        t.steps, t.step_ms = 5000, 120.009  # the last step ends at 600,045 ms


def further_log(folder):
    """A second evaluation of seed 42, and an ablation's log in a folder of its own."""
    text = (folder / "train_seed42.log").read_text()
    (folder / "train_seed42_again.log").write_text(re.sub(r"^quantized_ttt.*\n", "", text, flags=re.M))
    (folder / "ablations").mkdir()
    (folder / "ablations" / "train_seed42.log").write_text(text.replace("matrix_lr: 0.022", "matrix_lr: 0.03"))


def result_lines(folder):
    """Lines of results that look like settings, before and after training, with other values in each log."""
    for i, path in enumerate(sorted(folder.glob("*.log"))):
        text = path.read_text().replace("warmup_step: 1/20", f"warmup_step: 1/20\ncompile_time:3{i}.2s\ntok_s:67{i}")
        path.write_text(text + f"  best_bpb: 1.0{i}\nswa_count: {i}\nresult: {i}.5\ngptq_layers: {60 + i}\n")


def small_deviation(folder):
    """0.00009 in both files, where the deviation is 9.19e-05."""
    values = [1.08, 1.08 - 0.0000919, 1.08 + 0.0000919]
    rows = {
        s: dict(val_bpb=submissions.Decimal(f"{v:.8f}")) for s, v in zip(("42", "314", "1337"), values, strict=True)
    }
    assert f"{statistics.stdev(values):.2e}" == "9.19e-05"
    mean = f"{statistics.fmean(values):.5f}"
    for seed, value in zip((42, 314, 1337), values, strict=True):
        edit(folder / f"train_seed{seed}.log", r"^quantized_ttt .*$", f"quantized_ttt val_loss:1.8 val_bpb:{value:.8f}")
    decimal = submissions.Decimal
    content = dict(submissions.WHO, val_bpb=decimal(mean), val_bpb_std=decimal("0.00009"), seed_results=rows)
    (folder / "submission.json").write_text(submissions.dumps(content))
    (folder / "README.md").write_text(f"# A\n\nval_bpb: {mean} (std 0.00009)\n\nMean {mean}, std 9.2e-05.\n")


def in_json(**fields):
    def change(folder):
        rewrite(folder, lambda s: s.update(fields))

    return change


def page(text):
    def change(folder):
        with open(folder / "README.md", "a") as file:
            file.write(text)

    return change


def target_tokens(folder):
    rewrite(
        folder,
        lambda s: [row.update(target_tokens=40540159, val_tokens=40540160) for row in s["seed_results"].values()],
    )


def crlf(folder):
    path = folder / "README.md"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def cells_differ(folder):
    """A table whose last column is the difference of two others, and whose lines are methods, not seeds."""
    text = (folder / "train_seed42.log").read_text()
    pre, ttt = (float(re.search(rf"^{name} .*val_bpb:(\S+)", text, re.M)[1]) for name in ("quantized", "quantized_ttt"))
    page(f"\n| Seed | Quantized | TTT | Change |\n|--|--|--|--|\n| 42 | {pre:.4f} | {ttt:.4f} | {ttt - pre:.4f} |\n")(
        folder
    )


def scores_in_a_list(s):
    s["val_bpb_seeds"] = [s["val_bpb"], *(submissions.Decimal(f"{s['val_bpb'] + x:.8f}") for x in (0.0004, -0.0004))]


def logged(folder, name, seed=42):
    """A score of a seed's log."""
    text = (folder / f"train_seed{seed}.log").read_text()
    return float(re.search(rf"^{name} val_loss:\S+ val_bpb:(\S+)", text, re.M)[1])


def items(folder, off=0.0):
    """A list of a run's figures, in pairs and after their names, with another run's that has no log."""
    text = (folder / "train_seed42.log").read_text()
    spent, steps = re.search(r"train_time: (\d+)ms step: (\d+)", text).groups()
    score = logged(folder, "quantized_sliding_window") + off
    return (
        f"\n- Sliding eval: `val_bpb:{score:.8f}`\n- Train time: `{spent}ms` at `step:{steps}`\n"
        "- `seed=99`: `val_bpb:1.07777777`, `step:4444`\n- PR #1019 has `val_bpb:1.1147`\n"
    )


def largest(folder):
    """The bytes of the largest artifact."""
    found = [re.search(r"^Total submission size .*: (\d+)", path.read_text(), re.M) for path in folder.glob("*.log")]
    return max(int(match[1]) for match in found)


def table(title, *names, off=0.0, also=""):
    """A change: a table on the page with a score of each seed's log, the first one with an error."""

    def change(folder):
        rows = [f"| {s} | {logged(folder, names[0], s) + (off if s == 42 else 0):.5f} |" for s in (42, 314, 1337)]
        page("\n".join([f"\n\n| Seed | {title} |", "|--|--|", *rows, also.format(logged(folder, names[0])), ""]))(
            folder
        )

    return change


ALARMS = {
    "numbers of a text": (
        "full",
        None,
        page("\nAbout 4,951 steps fit; round 5,100 steps. It has 15,912,345 parameters, PR #1394 15,987,537 bytes.\n"),
    ),
    "a list of figures": ("full", None, lambda f: page(items(f))(f)),
    "a column without a kind": ("full", None, table("Mixer (order 5)", "quantized_ttt")),
    "a table of metrics": (
        "full",
        None,
        lambda f: page(
            f"\n| Metric | Value |\n|--|--|\n| Sliding val_bpb | {logged(f, 'quantized_sliding_window'):.4f} |\n"
        )(f),
    ),
    "further logs of a seed": ("full", None, further_log),
    "the last step over 600 s": ("full", late, None),
    "lines of results": ("full", None, result_lines),
    "0.00009 and 9.19e-05": ("full", None, small_deviation),
    "one target fewer than tokens": ("full", None, target_tokens),
    "differences of cells": ("full", None, cells_differ),
    "carriage returns": ("full", None, crlf),
    "seeds in prose": (
        "full",
        None,
        page("\nSeed 42 is the first, seed 7 diverged; seed 2025 was not run. p = 0.0003.\n"),
    ),
    "other people's results": (
        "full",
        None,
        page("\n| Method | val_bpb |\n|--|--|\n| PR #1019 | 1.1147 |\n| SOTA | 1.1228 |\n\nPR #549 val_bpb: 1.1194.\n"),
    ),
    "texts where others have objects": (
        "full",
        None,
        in_json(compliance="all", baseline="PR #1019", significance="p < 0.01", technique_summary=["a", "b"]),
    ),
    "a stop 0.2 s late": (
        "full",
        lambda ts: [setattr(t, "steps", 5000) or setattr(t, "step_ms", 120.04) for t in ts],
        None,
    ),
    "about so many steps": ("full", None, page("\n| Seed | Steps | ms/step |\n|--|--|--|\n| 42 | ~5100 | ~99 |\n")),
    "scores of seeds without logs in a list": ("flat", None, lambda f: rewrite(f, scores_in_a_list)),
    "a title that names another": ("full", None, lambda f: edit(f / "README.md", r"^# .*", "# PR #1855 with a method")),
    "steps as text": ("full", None, in_json(steps_completed="4945/20000", github_id=None, hardware=dict(gpus=8))),
}


@pytest.mark.parametrize("name", ALARMS)
def test_what_people_write_is_no_alarm(name, tmp_path, capsys):
    schema, change, after = ALARMS[name]
    made(tmp_path / "a", schema, 0, change)
    if after:
        after(tmp_path / "a")
    code, found, _ = check(tmp_path / "a", capsys)
    assert (code, found) == (0, [])


# ------------------------------------------------------------------------------------------------------------- no miss


def test_errors_of_one_percent_are_found_in_every_field(tmp_path, capsys):
    """At least 95 of 100 of them, of both signs; what is missed are figures of runs that are not in the folder."""
    planted, missed = 0, []
    for schema in submissions.SCHEMAS:
        content = made(tmp_path / schema, schema)
        for path, value in submissions.leaves(content):
            for part in (0.01, -0.01):
                wrong = submissions.off_by(value, part)
                if wrong is None:
                    continue
                planted += 1
                text = submissions.dumps(submissions.replaced(content, path, wrong))
                (tmp_path / schema / "submission.json").write_text(text)
                if not check(tmp_path / schema, capsys)[1]:
                    missed.append((schema, ".".join(map(str, path))))
    others = [name for schema, name in missed if "superseded" in name]
    assert planted > 300 and len(missed) <= 0.05 * planted, missed
    assert len(missed) - len(others) <= 0.01 * planted, missed


def other_setting(name, value):
    def change(ts):
        ts[1].settings[name] = value

    return change


def other_shards(ts):
    ts[2].shards = 39


def new_setting(ts):
    ts[0].settings["ttt_hash_embed"] = "True"


PLANTS = {
    "rank": ("full", other_setting("lora_rank", "95"), None, "LORA_RANK is 96 on seed 42"),
    "step": ("full", other_setting("warmup_steps", "40"), None, "WARMUP_STEPS is"),
    "log": ("full", other_setting("log_every", "50"), None, "LOG_EVERY is"),
    "logit": ("by_seed", other_setting("logit_softcap", "20.0"), None, "LOGIT_SOFTCAP is"),
    "nested logs": ("listed", other_setting("matrix_lr", "0.03"), None, "MATRIX_LR is"),
    "a setting of one log alone": ("full", new_setting, None, "TTT_HASH_EMBED is printed by the log of seed 42 alone"),
    "a setting of one seed": (
        "full",
        other_setting("gptq_reserve_seconds", "4.0"),
        None,
        "GPTQ_RESERVE_SECONDS is 12.0 on seed 42",
    ),
    "shards": ("by_seed", other_shards, None, "train_shards: the logs have 39 and 80"),
    "code bytes": ("flat", None, in_json(bytes_code=30872), "bytes_code in submission.json"),
    "nats per byte": ("full", None, lambda f: rewrite(f, nats_per_byte), "is nats per byte"),
    "another script": (
        "full",
        None,
        lambda f: edit(f / "train_gpt.py", "# a comment", "# the comment"),
        "not the script",
    ),
    "a script without a setting": (
        "full",
        None,
        lambda f: edit(
            f / "train_gpt.py", r"lora_rank = os.environ.get\(\"LORA_RANK\"", 'rank_lora = os.environ.get("RANK_LO"'
        ),
        "has no lora_rank",
    ),
    "a package": ("full", None, lambda f: script(f, "import brotli"), "uses brotli, which neither"),
    "a program": (
        "full",
        None,
        lambda f: script(f, 'import subprocess; subprocess.run(["lrzip", "-z"])'),
        "uses lrzip",
    ),
    "a package of a packed script": ("full", None, lambda f: script(f, packed("import zstandard")), "uses zstandard"),
    "the log of seed 1337 under seed 0": (
        "full",
        None,
        lambda f: renamed(f),
        "seed in its name and in its text: 0 and 1337",
    ),
    "a log of another run": (
        "flat",
        None,
        lambda f: edit(
            f / "train.log", r"^(final_int6_sliding_window\S* val_loss:\S+ val_bpb:)\S+", r"\g<1>1.16660000", 2
        ),
        "val_bpb in submission.json and log: 1.0",
    ),
    "a mean that no log gives": ("seeds_as_rows", None, in_json(val_bpb=submissions.Decimal("1.0430")), "1.0430"),
    "a row that no log gives": (
        "full",
        None,
        lambda f: rewrite(f, lambda s: s["seed_results"]["314"].update(val_bpb=submissions.Decimal("1.04300000"))),
        "seed 314: val_bpb in submission.json and log: 1.04300000",
    ),
    "the deviation of the population": ("full", None, lambda f: rewrite(f, population), "(it is the population's)"),
    "no log of a seed": (
        "full",
        None,
        lambda f: (f / "train_seed314.log").unlink(),
        "seed 314: submission.json has it",
    ),
    "one log as two": (
        "full",
        None,
        lambda f: shutil.copy(f / "train_seed314.log", f / "train_seed42.log"),
        "two of them are the same file",
    ),
    "evaluation over 600 s": (
        "full",
        lambda ts: ts[0].eval_ms.update(ttt=601_000),
        None,
        "s of evaluation are over 600",
    ),
    "training over 600 s": ("full", lambda ts: setattr(ts[0], "step_ms", 130.0), None, "s of training, calibration"),
    "a cell of the page": (
        "full",
        None,
        lambda f: edit(f / "README.md", r"^(\| 42 \| )(\d)", lambda m: m[1] + str((int(m[2]) + 1) % 10 or 9)),
        "README.md: seed 42, Steps",
    ),
    "a cell of a column without a kind": (
        "full",
        None,
        table("Mixer (order 5)", "quantized_ttt", off=0.0108),
        "README.md: seed 42, Mixer (order 5)",
    ),
    "a cell below a title that names another": (
        "full",
        None,
        lambda f: (
            edit(f / "README.md", r"^# .*", "# PR #1855 with a method"),
            table("TTT BPB", "quantized_ttt", off=0.0108)(f),
        ),
        "README.md: seed 42, TTT BPB",
    ),
    "a deviation below a column": (
        "full",
        None,
        table("TTT BPB", "quantized_ttt", also="| **Std** | 0.02500 |"),
        "README.md: TTT BPB: std 0.02500 and the sample deviation of its rows",
    ),
    "bytes of a text": (
        "full",
        None,
        lambda f: page(f"\nThe largest artifact has {largest(f) + 1234:,} bytes.\n")(f),
        "bytes are in no other file",
    ),
    "a figure of a list": (
        "full",
        None,
        lambda f: page(items(f, 0.0108))(f),
        "README.md: val_bpb 1.",
    ),
    "a figure of a table of metrics": (
        "full",
        None,
        lambda f: page(
            f"\n| Metric | Value |\n|--|--|\n| Sliding val_bpb | {logged(f, 'quantized_sliding_window') * 1.01:.6f} |\n"
        )(f),
        "README.md: Sliding val_bpb: ",
    ),
    "a score as the value of its seed": (
        "full",
        None,
        lambda f: rewrite(
            f,
            lambda s: s.update(seeds={n: r["val_bpb"] + (n == "314") / 100 for n, r in s.pop("seed_results").items()}),
        ),
        "seed 314: ",
    ),
    "the page's headline": (
        "full",
        None,
        lambda f: edit(f / "README.md", r"val_bpb = 1.(\d)", lambda m: f"val_bpb = 1.{(int(m[1]) + 1) % 10}"),
        "README.md: ",
    ),
}


def nats_per_byte(s):
    s["val_loss"] = submissions.Decimal(f"{s['val_bpb'] * 0.69314718:.8f}")
    s.pop("val_loss_std")


def population(s):
    values = [row["val_bpb"] for row in s["seed_results"].values()]
    s["val_bpb_std"] = submissions.Decimal(f"{statistics.pstdev(values):.6f}")


def script(folder, text):
    """A script that does more, of as many bytes as the one that ran."""
    source = (folder / "train_gpt.py").read_text()
    less = len(text.encode()) + 1
    (folder / "train_gpt.py").write_text(text + "\n" + source[: len(source) - less].rstrip("\n") + "\n" * 0)
    short = len(source) - (folder / "train_gpt.py").stat().st_size
    with open(folder / "train_gpt.py", "a") as file:
        file.write("\n" * short)


def packed(text):
    body = (text + "\nimport os\n" + "".join(f"{n} = os.environ\n" for n in submissions.SETTINGS)).encode()
    text = base64.b85encode(lzma.compress(body)).decode()
    return f'import lzma, base64\nexec(lzma.decompress(base64.b85decode("{text}")))'


def renamed(folder):
    (folder / "train_seed1337.log").rename(folder / "train_seed0.log")


@pytest.mark.parametrize("name", PLANTS)
def test_every_kind_of_fault_is_found_and_named(name, tmp_path, capsys):
    schema, change, after, words = PLANTS[name]
    made(tmp_path / "a", schema, 0, change)
    if after:
        after(tmp_path / "a")
    code, found, _ = check(tmp_path / "a", capsys)
    assert code in (1, 3) and words in "\n".join(found), found


@pytest.mark.parametrize("total", [True, False])
def test_bytes_over_the_limit_are_found_where_the_json_leaves_out_the_code(total, tmp_path, capsys):
    """A total of 16,058,494 bytes in the log, or only its parts; submission.json states the model alone."""

    def change(ts):
        ts[0].model = 16_058_494 - ts[0].code

    made(tmp_path / "a", "full", 0, change)
    model = 16_058_494 - len(submissions.SCRIPT)
    if not total:
        edit(tmp_path / "a" / "train_seed42.log", r"^Total submission size.*\n", "")
    rewrite(tmp_path / "a", lambda s: s["seed_results"]["42"].update(artifact_bytes=model))
    code, found, _ = check(tmp_path / "a", capsys)
    assert code == 1 and re.search(r"error: seed 42: its artifact of 16058494 bytes.* is over 16000000", found[0]), (
        found
    )


# ------------------------------------------------------------------------------------------------------------ the form


def spoiled(folder):
    """A folder with findings of several causes."""
    made(folder, "full", 0, other_setting("lora_rank", "95"))
    rewrite(folder, population)
    shutil.copy(folder / "train_seed42.log", folder / "other.log")
    edit(folder / "other.log", r"^  seed: 42", "  seed: 7")
    for seed in (42, 314):
        edit(
            folder / f"train_seed{seed}.log",
            r"^Total submission size quantized\+brotli: \d+",
            "Total submission size: 16500000",
        )
    script(folder, "import brotli")


def test_findings_come_by_severity_and_harm_and_by_cause(tmp_path, capsys):
    spoiled(tmp_path / "a")
    code, found, lines = check(tmp_path / "a", capsys)
    severities = [line.partition(": ")[0] for line in lines[:-1]]
    assert code == 1 and severities == sorted(severities, key=check_submission.SEVERITIES.index)
    assert {"error", "warning", "note"} == set(severities)
    assert found[0].startswith("error: seed ") and "is over 16000000" in found[0]
    code = check_submission.main([str(tmp_path / "a"), "--json"])
    content = json.loads(capsys.readouterr().out)
    order = list(check_submission.CAUSES)
    places = [(check_submission.SEVERITIES.index(f["severity"]), order.index(f["cause"])) for f in content["findings"]]
    assert code == 1 and places == sorted(places) and len({f["cause"] for f in content["findings"]}) > 3
    assert sum(1 + len(f["more"]) for f in content["findings"] if f["severity"] == "error") == content["errors"]
    assert [f["text"] for f in content["findings"]] == [
        line.partition(": ")[2].partition(" (and ")[0] for line in lines[:-1]
    ]


def test_exit_codes_tell_errors_from_warnings_and_notes(tmp_path, capsys):
    made(tmp_path / "a", "full")
    assert check(tmp_path / "a", capsys)[0] == 0
    script(tmp_path / "a", "import brotli")
    code, found, _ = check(tmp_path / "a", capsys)
    assert code == 3 and [line[:9] for line in found] == ["warning: "]
    rewrite(tmp_path / "a", population)
    assert check(tmp_path / "a", capsys)[0] == 1
    for number in ("0:", "1:", "3:", "2:"):
        assert number in str(check_submission.__doc__)


def test_what_one_reason_explains_is_one_line(tmp_path, capsys):
    """A row that belongs to another run disagrees in all its figures, in one line."""
    made(tmp_path / "a", "full")
    rewrite(tmp_path / "a", lambda s: s["seed_results"].update({"314": dict(s["seed_results"]["42"], steps=1234)}))
    _, found, _ = check(tmp_path / "a", capsys)
    rows = [line for line in found if "seed 314: " in line and " in submission.json and log" in line]
    assert len(rows) <= 2 and any("more of the same" in line for line in rows), found


# ---------------------------------------------------------------------------------------------------- names and numbers


@pytest.mark.parametrize(
    "path, kind, part, statistic, seed",
    [
        (("train_time_ms",), "seconds", "train", "", None),
        (("seed_results", "42", "eval_time_s"), "seconds", "eval", "", 42),
        (("results", "seed_1337", "ttt_eval_ms"), "seconds", "eval", "", 1337),
        (("ms_per_step",), "step", "", "", None),
        (("step_avg_ms",), "step", "", "", None),
        (("step_avg_ms_mean",), "step", "", "mean", None),
        (("pre_quant_val_bpb",), "bpb", "pre", "", None),
        (("int6_zstd_val_loss",), "loss", "quant", "", None),
        (("sliding_bpb",), "bpb", "sliding", "", None),
        (("mean_val_bpb",), "bpb", "", "mean", None),
        (("std_val_bpb",), "bpb", "", "std", None),
        (("summary", "val_bpb", "std"), "bpb", "", "std", None),
        (("summary", "mean", "val_bpb"), "bpb", "", "mean", None),
        (("val_bpb_seeds", "2025"), "bpb", "", "", 2025),
        (("val_bpb_seed42",), "bpb", "", "", 42),
        (("bytes_model_int6_zstd",), "bytes", "model", "", None),
        (("artifact_size_bytes",), "bytes", "total", "", None),
        (("code_bytes",), "bytes", "code", "", None),
        (("bytes_total",), "bytes", "total", "", None),
        (("step_stop",), "steps", "", "", None),
        (("stepsCompleted",), "steps", "", "", None),
        (("warmup_steps",), "", "", "", None),
        (("model_params",), "parameters", "", "", None),
        (("wallclock_minutes",), "seconds", "train", "", None),
        (("p_value",), "p", "", "", None),
        (("lora_rank",), "", "", "", None),
    ],
)
def test_a_name_means_what_people_mean(path, kind, part, statistic, seed):
    m = claims.meaning(path)
    assert (m.kind, m.part, m.statistic, m.seed) == (kind, part, statistic, seed)


@pytest.mark.parametrize(
    "text, value, holds",
    [
        ("1.0810", 1.08103, True),
        ("1.0810", 1.08112, False),
        ("1.0811", 1.08118, True),  # cut off
        ("0.00009", 9.19e-05, True),
        ("9.2e-05", 9.19e-05, True),
        ("15,990,000", 15_991_930, True),
        ("15,991,930", 15_991_931, False),
        ("600", 600.03, True),
        ("4550", 4551, False),
    ],
)
def test_a_text_states_a_figure_to_its_last_digit(text, value, holds):
    assert claims.stands(text, value) is holds


# ----------------------------------------------------------------------------------------------- folders of two ages


def two_ages(folder):
    """Logs of an older version beside those that count, and a section of the page on them."""

    def older(ts):
        for t in ts:
            t.ttt, t.sliding = round(t.ttt + 0.0019, 8), round(t.sliding + 0.0019, 8)
            t.settings["matrix_lr"] = "0.03"

    made(folder / "old", "seeds_as_rows", 0, older)
    made(folder / "new", "seeds_as_rows")
    for seed in submissions.SEEDS:
        shutil.copy(folder / "old" / f"log_seed{seed}_v1.1.txt", folder / "new" / f"log_seed{seed}_v1.0.txt")
    page("\n<details>\n<summary>Superseded</summary>\n\n| Seed | val_bpb |\n|--|--|\n| 42 | 1.0321 |\n</details>\n")(
        folder / "new"
    )
    return folder / "new"


def test_logs_of_an_older_version_are_told_from_those_that_count(tmp_path, capsys):
    folder = two_ages(tmp_path)
    code, found, lines = check(folder, capsys)
    assert (code, found) == (0, []) and any("has further logs: log_seed42_v1.0" in line for line in lines)
    edit(folder / "log_seed42_v1.1.txt", r"^  lora_rank: 96", "  lora_rank: 32")
    assert "LORA_RANK is 32 on seed 42" in "\n".join(check(folder, capsys)[1])


def test_a_copy_of_a_log_under_another_name_is_no_alarm(tmp_path, capsys):
    made(tmp_path / "a", "by_seed")
    shutil.copy(tmp_path / "a" / "train_seed1337.log", tmp_path / "a" / "train.log")
    assert check(tmp_path / "a", capsys)[:2] == (0, [])


def test_the_best_seed_as_headline_is_a_note_where_no_rows_claim_a_mean(tmp_path, capsys):
    ts = submissions.truths(random.Random(3))
    made(tmp_path / "a", "stages")
    for path in (tmp_path / "a").glob("*.txt"):
        path.unlink()
    content, text, _ = submissions.stages(ts)
    (tmp_path / "a" / "submission.json").write_text(submissions.dumps(submissions.numbers(content)))
    (tmp_path / "a" / "README.md").write_text(text)
    for t in ts:
        (tmp_path / "a" / f"train_seed{t.seed}.log").write_text(submissions.line_log(t))
    code, found, lines = check(tmp_path / "a", capsys)
    assert (code, found) == (0, []) and any("is one seed's, and the seeds' mean is" in line for line in lines)


def test_the_populations_deviation_on_a_page_is_found(tmp_path, capsys):
    content: Any = made(tmp_path / "a", "full")
    values = [row["val_bpb"] for row in content["seed_results"].values()]
    sample, population = (f"{f(values):.5f}" for f in (statistics.stdev, statistics.pstdev))
    edit(tmp_path / "a" / "README.md", sample, population, 9)
    _, found, _ = check(tmp_path / "a", capsys)
    assert any(f"README.md: std {population}" in line and "(it is the population's)" in line for line in found), found


def test_a_strangers_folder_of_very_many_numbers_ends(tmp_path, capsys):
    """Names of every kind, a page of numbers and a log of many labels: what is compared is bounded."""
    made(tmp_path / "a", "full")
    rows = {str(i): dict(val_bpb=1.1 + i / 1e6, val_bpb_std=1e-4, gain_bpb=0.01, artifact_bytes=i) for i in range(4000)}
    more = {f"val_bpb_delta_{i}": i / 1e7 for i in range(500)} | {f"bpb_std_{i}": i / 1e7 for i in range(500)}
    rewrite(tmp_path / "a", lambda s: s.update(more, results=rows))
    with open(tmp_path / "a" / "train_seed42.log", "a") as file:
        file.write(
            "".join(
                f"stage{'abcdefghij'[i % 10] * (i % 97)} val_loss:{i / 1e4} val_bpb:{i / 1e4}\n" for i in range(4000)
            )
        )
    page("| Seed | val_bpb |\n|--|--|\n" + "| 42 | 1.23456 |\n" * 500 + "1.23457 " * 5000)(tmp_path / "a")
    code, found, lines = check(tmp_path / "a", capsys)
    assert code == 1 and found and sum(len(line) for line in lines) < 2_000_000
    assert max(len(log.figures) for log in [claims.read_figures(tmp_path / "a" / "train_seed42.log", tmp_path)]) < 800
